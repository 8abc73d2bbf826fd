"""Sizes of the experiments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Sizes of the experiments: `FULL` for the published results, `TINY` to see that everything works."""

    seeds: int = 5
    """Seeds of the experiments whose claims matter."""
    few_seeds: int = 3
    """Seeds of the other experiments."""
    num_inference_steps: int = 10
    train_prompts: int = 45
    """Training names. The paper trains on 45 animals."""
    eval_prompts: int = 64
    """Held-out names, on which no run trains."""
    images_per_prompt: int = 4
    """Images of each held-out name in an evaluation. Each seed evaluates other images."""
    grid_images: int = 1
    """The same for the points of a grid, such as that of two LoRAs' weights."""
    every: int = 5
    """Updates between checkpoints, and to the first evaluation of DDPO."""
    short: tuple[int, ...] = (10, 20, 40)
    """Updates with an evaluation in a short run, which stays before the best point."""
    pair: tuple[int, ...] = (20, 40)
    """The same where two methods are compared in many settings."""
    long: tuple[int, ...] = (20, 40, 80, 120)
    """The same in a run beyond its best point."""
    collapse: tuple[int, ...] = (20, 40, 80, 160, 240)
    """The same in a run until its images collapse."""
    ddpo_images: int = 30_000
    """Scored images after which a DDPO run that has not reached its target ends."""
    ddpo_batches: int = 8
    """Batches of 8 images in one update of DDPO."""
    search_updates: int = 20
    """Updates of DDPO at each learning rate of the search."""
    noises: int = 8
    """Initial noises, and re-noisings of each of their images, in the measurement of gradient variances."""
    repeats: int = 5
    """Repetitions of a timing; the median is used."""
    few_updates: int = 40
    """Updates of five batches in `few_steps`."""
    comparisons: tuple[int, ...] = (25, 50, 100, 200)
    """Comparisons of the simulated rater."""
    rating_pool: int = 10
    """Images of each training name that the simulated rater compares."""


FULL = Budget()
TINY = Budget(
    seeds=2,
    few_seeds=2,
    num_inference_steps=4,
    train_prompts=4,
    eval_prompts=2,
    images_per_prompt=2,
    every=1,
    short=(2,),
    pair=(2,),
    long=(1, 2),
    collapse=(1, 2),
    ddpo_images=16,
    ddpo_batches=1,
    search_updates=1,
    noises=2,
    repeats=1,
    few_updates=1,
    comparisons=(12,),
    rating_pool=4,
)
