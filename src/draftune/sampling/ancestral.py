"""The ancestral sampler, whose steps are Gaussian: what policy gradients and adjoint matching draw with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from draftune.errors import DraftuneError
from draftune.sampling.sampler import advance
from draftune.sampling.schedule import Prediction, Schedule, Step

if TYPE_CHECKING:
    from draftune.methods.base import Batch


def wants_noise(schedule: Schedule) -> None:
    """Raises DraftuneError where the ancestral sampler has no random step."""
    if not any(step.tau > 0 for step in schedule.steps):
        raise DraftuneError("this method wants a random step before the last: at least 2 of num_inference_steps")


def mean(prediction: Prediction, step: Step) -> Tensor:
    """Where the ancestral sampler's step leads on average."""
    return advance(prediction, step, step.tau)


def ancestral(batch: Batch) -> Iterator[tuple[Step, Tensor, Tensor, Tensor]]:
    """The steps of the batch: (step, x before it, its mean, x after it)."""
    x = batch.noise
    for step in batch.schedule.steps:
        middle = mean(batch.denoise(x, step), step)
        following = middle + step.tau * batch.fresh_noise(x)
        yield step, x, middle, following
        x = following


def log_probability(x: Tensor, mean: Tensor, step: Step) -> Tensor:
    """Of x under N(mean, tau^2), the mean over its numbers without the constant [B]."""
    return -((x - mean) / step.tau).square().flatten(1).mean(1) / 2
