"""LeapAlign (arXiv 2604.15311): two leaps instead of the whole way, so that any step can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, RewardGradient, register
from draftune.methods.drtune import attached, wants_attachable
from draftune.sampling.sampler import advance, rollout
from draftune.sampling.schedule import Prediction, Schedule, Step


@register("leapalign")
@dataclass(frozen=True)
class LeapAlign(RewardGradient):
    """LeapAlign: two leaps x_k to x_j to x_0 between steps drawn at random carry the gradient, instead of all steps.

    The picture is that of all T steps; each leap is made from one call of the denoiser and corrected by a constant to
    end where the sampler did. In the second leap the gradient through the network's input is multiplied by `discount`,
    0 to 1. For flow models, with v the network: -j dv(x_j) - (k - j) dv(x_k) + discount j (k - j) dv/dx dv(x_k). The
    paper uses a discount of 0.1 to 0.3; its weight for how well a leap meets the sampler is not part of this.
    """

    discount: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise DraftuneError(f"discount must be between 0 and 1, not {self.discount}")

    def check(self, schedule: Schedule) -> None:
        if len(schedule) < 2:
            raise DraftuneError("leapalign wants at least 2 sampling steps (num_inference_steps)")
        wants_attachable(schedule)

    def has_prefix(self) -> bool:
        return True

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        steps = batch.schedule.steps
        k, j = torch.randperm(len(steps), generator=batch.generator)[:2].sort().values.tolist()
        first = batch.denoise(batch.without_graph(k), steps[k])
        with torch.no_grad():
            x = rollout(batch.denoise, steps[k + 1 : j], advance(first, steps[k]))
        x = corrected(leap(first, steps[k], steps[j].alpha, steps[j].sigma), x)
        discounted = self.discount * x + (1 - self.discount) * x.detach()
        second = attached(batch.denoise(discounted, steps[j]), x - discounted, steps[j], batch.schedule)
        with torch.no_grad():
            x = rollout(batch.denoise, steps[j + 1 :], advance(second, steps[j]))
        yield corrected(leap(second, steps[j], steps[-1].alpha_next, steps[-1].sigma_next), x)


def leap(prediction: Prediction, step: Step, alpha: float, sigma: float) -> Tensor:
    """From `step` to the level (alpha, sigma) in one go."""
    return advance(prediction, step._replace(alpha_next=alpha, sigma_next=sigma))


def corrected(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `x`."""
    return value + (x - x.detach())
