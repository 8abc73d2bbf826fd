"""The number of updates that use one prefix follows the cosine of two gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from draftune.models import load_model
from draftune.sampling.sampler import rollout
from draftune.training.prefix_reuse import CHECK_INTERVAL, MAX_REUSE_STEPS, PrefixReuse
from draftune.training.trainer import Trainer

PROMPTS = ["a cat", "a dog", "a bird"]


def waves(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.sin(6 * images).mean((1, 2, 3))


def trainer(folder: Path, output: Path, reward: Any = waves, **values: Any) -> Trainer:
    model = load_model(StableDiffusionPipeline.from_pretrained(folder).to(torch.float64))
    settings = {"method": "draft_k(k=1)", "num_inference_steps": 4, "guidance_scale": 3.0, "batch_size": 2}
    settings |= {"learning_rate": 0.05, "device": "cpu", "prefix_reuse_steps": 2, "prefix_reuse_cosine": 0.9}
    return Trainer(model, reward, PROMPTS, output=str(output), **settings | values)


def weights(made: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in made.train_step.parameters.values()])


@pytest.mark.parametrize(
    ("cosine", "steps", "wait"),
    [(1.0, 16, 0), (0.99, 16, 0), (0.987, 8, 20), (0.96, 8, 20), (0.94, 4, 20), (-1.0, 4, 20), (math.nan, 8, 20)],
)
def test_the_number_doubles_up_to_half_of_the_angle_and_halves_above_it(cosine: float, steps: int, wait: int) -> None:
    reuse = PrefixReuse(8, 0.95)
    reuse.adapt(cosine)
    assert (reuse.steps, reuse.wait) == (steps, wait)
    assert CHECK_INTERVAL == 20


def test_the_number_stays_within_its_bounds() -> None:
    for start, cosine in ((1, 0.0), (MAX_REUSE_STEPS, 1.0)):
        reuse = PrefixReuse(start, 0.9)
        reuse.adapt(cosine)
        assert reuse.steps == start


def test_the_cosine_is_that_of_the_two_gradients(pipeline_folder: Path, tmp_path: Path) -> None:
    """In float64, against autograd through the last call. Measuring changes neither weights nor random numbers."""

    def noisy(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return waves(images, prompts) * (1 + 0.1 * torch.rand(1))

    made = trainer(pipeline_folder, tmp_path / "run", lambda images, prompts: waves(images, prompts))
    for step in (1, 2):
        row = made.train_step.run(step)
        assert row["prefix_reuse_steps"] == 2
        assert "prefix_reuse_cosine" not in row
    item, schedule, parameters = made.train_step.pending[0], made.schedule, list(made.train_step.parameters.values())
    prompts = [PROMPTS[i] for i in item.prompt_indices]
    denoise = made.model.denoiser_for(prompts, schedule, 3.0)
    with torch.no_grad():
        new = rollout(denoise, schedule.steps[:-1], item.noise)
    gradients = []
    for latent in (item.prefix_cache.latents[3], new):
        clean = rollout(denoise, schedule.steps[-1:], latent)
        images = made.model.decode(clean).float()  # as rewards get them
        found = torch.autograd.grad(waves(images, prompts).mean(), parameters)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    cosine = float(torch.nn.functional.cosine_similarity(*gradients, dim=0))
    assert 0 < cosine < 1 - 1e-6
    queries = made.train_step.scorer.queries
    row = made.train_step.run(3)
    assert row["prefix_reuse_cosine"] == pytest.approx(cosine, abs=1e-12)
    assert row["reward_queries"] == queries + 3 * 2  # two of the measurement, one of the update

    # A threshold between which nothing changes: then all updates are those without a measurement.
    runs = []
    for name, threshold in (("fixed", 0.0), ("measured", math.cos(1.5 * math.acos(cosine)))):
        made = trainer(pipeline_folder, tmp_path / name, noisy, method="draft_lv(n=1)", prefix_reuse_cosine=threshold)
        torch.manual_seed(0)
        rows = [made.train_step.run(step) for step in range(1, 4)]
        runs.append((weights(made), sum("prefix_reuse_cosine" in row for row in rows)))
    (fixed, none), (measured, some) = runs
    assert (none, some) == (0, 1)
    assert torch.equal(fixed, measured)


@pytest.mark.parametrize(("rate", "numbers"), [(1e-4, [2, 2, 4, 4, 4, 4, 8]), (0.5, [2, 2, 1, 1, 1, 1, 1])])
def test_a_fast_lora_reuses_less_and_a_slow_one_more(
    pipeline_folder: Path, tmp_path: Path, rate: float, numbers: list[int]
) -> None:
    made = trainer(pipeline_folder, tmp_path / "run", learning_rate=rate)
    assert [made.train_step.run(step)["prefix_reuse_steps"] for step in range(1, 8)] == numbers


def test_a_reward_that_is_not_finite_measures_nothing(pipeline_folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(1)
        return waves(images, prompts) * (math.nan if len(calls) == 4 else 1)  # of one image: the measurement's second

    made = trainer(pipeline_folder, tmp_path / "run", broken, batch_size=1, prefix_reuse_steps=1)
    made.train_step.run(1)
    calls.extend([1, 1])
    row = made.train_step.run(2)
    assert math.isnan(row["prefix_reuse_cosine"])
    assert row["prefix_reuse_steps"] == 1
    assert row["grad_norm"] > 0
