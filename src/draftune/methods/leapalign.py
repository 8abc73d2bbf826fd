"""LeapAlign (arXiv:2604.15311): two one-step leaps carry the gradient, so that any step can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import BackpropMethod, Batch, register
from draftune.methods.drtune import linear_path, require_no_dynamic_thresholding
from draftune.sampling.sampler import ddim_step, rollout
from draftune.sampling.schedule import Prediction, Schedule, Step


@register("leapalign")
@dataclass(frozen=True)
class LeapAlign(BackpropMethod):
    """LeapAlign: the gradient flows through two leaps x_k -> x_j -> x_0 between random steps, not through all steps.

        leap(x_t -> s) = alpha_s x_0_theta(x_t) + sigma_s eps_theta(x_t),  corrected: x_s + leap - stop_grad(leap)

    arXiv:2604.15311. The image comes from all T steps: each leap gets a constant correction to end at the sampler's
    latent. In the second leap the gradient through the network's input is multiplied by `discount`. For a flow model
    with velocity v, sigma_t = t and k > j the levels of the two steps:

        d x_0 / d theta = -j dv(x_j) - (k - j) dv(x_k) + discount j (k - j) dv/dx(x_j) dv(x_k)

    T - 2 denoiser calls without gradient and 2 with gradient, for any depth. Use it to train early steps at a fixed
    cost, with at most one Jacobian in the gradient. With `lora_steps`, both steps are in the range. The paper's weight
    for the error of a leap is not implemented.

    Attributes:
        discount: Factor of the gradient through the second leap's network input, 0 to 1. Default: 0.2; 0.1 to 0.3 in
            the paper.
    """

    starts_without_grad = True

    discount: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise DraftuneError(f"discount must be between 0 and 1, got {self.discount}")

    def check(self, schedule: Schedule) -> None:
        if len(schedule) < 2:
            raise DraftuneError(f"leapalign needs num_inference_steps of at least 2, got {len(schedule)}")
        if (tuned := len(self.trained_steps(schedule))) < 2:
            raise DraftuneError(f"leapalign trains 2 steps, but lora_steps holds {tuned} of {len(schedule)}: extend it")
        require_no_dynamic_thresholding(schedule)

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        steps = batch.schedule.steps
        tuned = self.trained_steps(batch.schedule)
        k, j = (tuned[i] for i in torch.randperm(len(tuned), generator=batch.generator)[:2].sort().values.tolist())
        first = batch.denoise(batch.no_grad_latents(k), steps[k])
        with torch.no_grad():
            x = rollout(batch.denoise, steps[k + 1 : j], ddim_step(first, steps[k]))
        x = straight_through(leap(first, steps[k], steps[j].alpha, steps[j].sigma), x)
        discounted = self.discount * x + (1 - self.discount) * x.detach()
        second = linear_path(batch.denoise(discounted, steps[j]), x - discounted, steps[j], batch.schedule)
        with torch.no_grad():
            x = rollout(batch.denoise, steps[j + 1 :], ddim_step(second, steps[j]))
        yield straight_through(leap(second, steps[j], steps[-1].alpha_next, steps[-1].sigma_next), x)


def leap(prediction: Prediction, step: Step, alpha: float, sigma: float) -> Tensor:
    """Move from `step` to the noise level (alpha, sigma) in one DDIM step."""
    return ddim_step(prediction, step._replace(alpha_next=alpha, sigma_next=sigma), tau=0.0)


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of `x` (straight-through estimator)."""
    return value + (x - x.detach())
