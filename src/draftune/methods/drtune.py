"""DRTune (Wu et al., 2024, arXiv:2405.00760): train early steps without gradient through the network's input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import BackpropMethod, Batch, register
from draftune.methods.draft import check_min
from draftune.sampling.sampler import ddim_step
from draftune.sampling.schedule import Prediction, Schedule, Step


@register("drtune")
@dataclass(frozen=True)
class DRTune(BackpropMethod):
    """DRTune: k evenly spaced calls carry gradient to the weights, but not to the network's input.

        grad = sum over the trained steps t of  (d r / d x_0) c_t d eps_theta(stop_grad(x_t)) / d theta

    Wu et al., 2024, arXiv:2405.00760. c_t is the sampler's own coefficient of eps_theta at step t. No product of
    Jacobians occurs, so that the gradient of an early step does not grow with the number of later calls. As in ReFL,
    sampling stops at a step t0 ~ uniform{1, ..., m} from the end and jumps to x_0. The trained calls are spread from a
    random start over the calls that are made and, with `lora_steps`, in the range.

    T - t0 + 1 - k denoiser calls without gradient and k with gradient. Use it for rewards of layout, such as symmetry,
    that depend on early steps. No code of the authors was available; the defaults are this project's.

    Attributes:
        k: Number of calls with gradient, 1 or more; k + m is at most T + 1. Default: 5.
        m: Number of last steps at which sampling may stop, 1 or more. Default: 5.
    """

    k: int = 5
    m: int = 5

    def __post_init__(self) -> None:
        check_min("k", self.k, 1)
        check_min("m", self.m, 1)

    def check(self, schedule: Schedule) -> None:
        if self.k + self.m > len(schedule) + 1:
            raise DraftuneError(
                f"k + m must be at most {len(schedule) + 1}, one more than the sampling steps (num_inference_steps), "
                f"got k={self.k} and m={self.m}: lower them, or sample at least {self.k + self.m - 1} steps"
            )
        calls = schedule.steps[: len(schedule) - self.m + 1]
        if (tuned := sum(step.tuned for step in calls)) < self.k:
            raise DraftuneError(
                f"drtune trains k={self.k} calls, but only {tuned} of the first {len(calls)} steps are in lora_steps: "
                "lower k or m, or extend the range"
            )
        require_no_dynamic_thresholding(schedule)

    def backprops_multiple_calls(self) -> bool:
        return self.k > 1

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        schedule, generator = batch.schedule, batch.generator
        remaining = int(torch.randint(1, self.m + 1, (), generator=generator))
        calls = schedule.steps[: len(schedule) - remaining + 1]
        tuned = [i for i, step in enumerate(calls) if step.tuned]
        stride = len(tuned) // self.k
        first = int(torch.randint(0, len(tuned) - stride * (self.k - 1), (), generator=generator))
        trained = tuned[first : first + stride * self.k : stride]
        x = batch.noise
        for i, step in enumerate(calls):
            with torch.set_grad_enabled(i in trained):
                prediction = batch.denoise(x.detach(), step)
            clean, noise_in_x = linear_path(prediction, x, step, schedule)
            x = ddim_step(Prediction(clean, noise_in_x), step)
        yield clean


def linear_path(prediction: Prediction, x: Tensor, step: Step, schedule: Schedule) -> Prediction:
    """Add the gradient of the sampler's linear path through x to a prediction computed from `x.detach()`.

    x_0 and noise are linear in x and in the network's output (`Schedule._to_prediction`). This adds the term in x with
    the value 0, so that the values stay the same. Where x_0 was clipped, its gradient is 0.

    Args:
        prediction: The denoiser's result for `x.detach()`.
        x: The noisy latent [B, C, H, W] with its graph.
    """
    clean, noise = replace(schedule, clip=None).to_prediction(torch.zeros_like(x), x - x.detach(), step)
    if schedule.clip:
        clean = clean * schedule.clip.grad_mask(prediction.clean)
    return Prediction(prediction.clean + clean, prediction.noise + noise)


def require_no_dynamic_thresholding(schedule: Schedule) -> None:
    """Raise DraftuneError for dynamic thresholding, which `linear_path` cannot differentiate."""
    if schedule.clip and schedule.clip.quantile is not None:
        raise DraftuneError(
            "this method does not support dynamic thresholding; set thresholding=false in the scheduler's config"
        )
