"""DRTune (Wu et al., arXiv 2405.00760): deep steps are trained, but no gradient flows through the network's input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, RewardGradient, register
from draftune.methods.draft import at_least
from draftune.sampling.sampler import advance
from draftune.sampling.schedule import Prediction, Schedule, Step


@register("drtune")
@dataclass(frozen=True)
class DRTune(RewardGradient):
    """DRTune: k evenly spaced calls carry gradient, each to the weights alone; jumps to the clean latent early.

    The gradient is sum_t c_t d eps_t / d theta with the sampler's own coefficients c_t, and no product of the network's
    Jacobians, so that steps far from the end can be trained: for rewards of layout, such as symmetry. As in ReFL the
    sampler stops at one of the last m steps. The calls with gradient are spread, from a random start, over those that
    are made. No code of the authors was found: the defaults of k and m are this project's.
    """

    k: int = 5
    m: int = 5

    def __post_init__(self) -> None:
        at_least("k", self.k, 1)
        at_least("m", self.m, 1)

    def check(self, schedule: Schedule) -> None:
        if self.k + self.m > len(schedule) + 1:
            raise DraftuneError(
                f"k={self.k} calls with gradient and a stop at one of the last m={self.m} do not fit into "
                f"{len(schedule)} sampling steps (num_inference_steps): k + m may be one more"
            )
        wants_attachable(schedule)

    def spans_calls(self) -> bool:
        return self.k > 1

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        schedule, generator = batch.schedule, batch.generator
        remaining = int(torch.randint(1, self.m + 1, (), generator=generator))
        calls = schedule.steps[: len(schedule) - remaining + 1]
        stride = len(calls) // self.k
        first = int(torch.randint(0, len(calls) - stride * (self.k - 1), (), generator=generator))
        trained = range(first, first + stride * self.k, stride)
        x = batch.noise
        for i, step in enumerate(calls):
            with torch.set_grad_enabled(i in trained):
                prediction = batch.denoise(x.detach(), step)
            clean, noise_in_x = attached(prediction, x, step, schedule)
            x = advance(Prediction(clean, noise_in_x), step)
        yield clean


def attached(prediction: Prediction, x: Tensor, step: Step, schedule: Schedule) -> Prediction:
    """A prediction made from x.detach(), with the gradient that x has in it apart from the network's output.

    Before it is clipped, both of its parts are linear in x and in the output: nothing is added to them but the way
    back to x, which ends where the clean picture was clipped.
    """
    clean, noise = replace(schedule, clip=None).read(torch.zeros_like(x), x - x.detach(), step)
    if schedule.clip:
        clean = clean * schedule.clip.passes(prediction.clean)
    return Prediction(prediction.clean + clean, prediction.noise + noise)


def wants_attachable(schedule: Schedule) -> None:
    """Raises DraftuneError for dynamic thresholding, whose gradient `attached` can't tell."""
    if schedule.clip and schedule.clip.quantile is not None:
        raise DraftuneError("this method does not know dynamic thresholding: switch it off in the scheduler's config")
