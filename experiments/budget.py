"""Sizes of the experiments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Sizes of the experiments: `FULL` for the published results, `QUICK` to see that everything works."""

    steps: int = 40
    """Updates of a run."""
    long_steps: int = 80
    """Updates of a run that continues beyond its best point."""
    validation_steps: int = 10
    seeds: int = 3
    num_inference_steps: int = 20
    train_prompts: int = 45
    eval_prompts: int = 12
    num_validation_images: int = 2
    gradient_seeds: int = 12
    """Noise seeds over which the variance of a gradient is estimated."""
    grid: int = 5
    """Weights of each merged LoRA, and strengths of the guidance."""
    repeats: int = 5
    """Repetitions of a timing; the median is used."""
    rates: int = 3
    """Learning rates that a search starts with."""
    lv_samples: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Values of n in DRaFT-LV. The paper uses 2."""
    retain_weights: int = 2
    ddpo_updates: int = 40
    ddpo_batches: int = 4
    """Batches of 8 images in one DDPO update."""
    few_updates: int = 40
    few_batches: int = 5
    few_steps: tuple[int, ...] = (3, 5)
    """Sampling steps of the experiment `few_steps`."""
    few_names: int = 64
    kid_max_steps: int = 50
    """Largest number of sampling steps of the base model for which KID is measured."""
    comparisons: tuple[int, ...] = (25, 50, 100, 200)
    """Comparisons of the simulated rater in the experiment `taste`."""
    rating_pool: int = 10
    """Images of each training name that the simulated rater compares."""


FULL = Budget()
QUICK = Budget(
    steps=2,
    long_steps=3,
    validation_steps=2,
    seeds=1,
    num_inference_steps=4,
    train_prompts=4,
    eval_prompts=2,
    gradient_seeds=2,
    grid=2,
    repeats=1,
    rates=1,
    lv_samples=(0, 2),
    retain_weights=1,
    ddpo_updates=2,
    ddpo_batches=1,
    few_updates=2,
    few_batches=1,
    few_steps=(3,),
    few_names=2,
    kid_max_steps=5,
    comparisons=(12,),
    rating_pool=4,
)
