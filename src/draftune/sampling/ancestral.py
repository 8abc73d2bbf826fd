"""Ancestral (DDPM) sampling, whose steps are Gaussian: used by policy gradients and adjoint matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from draftune.errors import DraftuneError
from draftune.sampling.sampler import Denoiser, ddim_step
from draftune.sampling.schedule import Prediction, Schedule, Step


def require_stochastic_steps(schedule: Schedule) -> None:
    """Raise DraftuneError unless the schedule has a stochastic step (`Step.ancestral_std` > 0)."""
    if not stochastic_steps(schedule):
        raise DraftuneError(
            f"this method needs a stochastic step before the last one: set num_inference_steps to at least 2, not "
            f"{len(schedule)}"
        )


def stochastic_steps(schedule: Schedule) -> list[int]:
    """Return the indices of the stochastic steps (`Step.ancestral_std` > 0)."""
    return [i for i, step in enumerate(schedule.steps) if step.ancestral_std > 0]


def mean(prediction: Prediction, step: Step) -> Tensor:
    """Return the mean of the ancestral step, `[B, C, H, W]`: p(x_s | x_t) = N(mean, tau^2 * I)."""
    return ddim_step(prediction, step, step.ancestral_std)


def ancestral_rollout(
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    mean_of: Callable[[Prediction, Step], Tensor] = mean,
) -> Iterator[tuple[Step, Tensor, Tensor, Tensor]]:
    """Sample with the ancestral sampler: x_s = mean + tau * eps, eps ~ N(0, I).

    Args:
        denoise: The guided denoiser.
        schedule: The sampling schedule.
        x: The initial noise `[B, C, H, W]`.
        randn_like: Returns N(0, I) noise in the shape of its argument.
        mean_of: The mean of a step; by default that of the ancestral sampler.

    Yields:
        For each step: the step, x_t, the mean of x_s and x_s, each `[B, C, H, W]`.
    """
    for step in schedule.steps:
        center = mean_of(denoise(x, step), step)
        following = center + step.ancestral_std * randn_like(x)
        yield step, x, center, following
        x = following


def step_log_prob(x: Tensor, mean: Tensor, step: Step) -> Tensor:
    """Compute log N(x; mean, tau^2 * I), up to a constant, averaged over the elements of each latent.

    -mean_i((x_i - mean_i)^2) / (2 * tau^2)

    Returns:
        One value per latent, `[B]`.
    """
    return -((x - mean) / step.ancestral_std).square().flatten(1).mean(1) / 2
