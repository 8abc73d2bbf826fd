"""The samplers of few-step diffusion models: LCM, TCD, Euler and Euler ancestral, each as in diffusers.

Every step predicts x_0 and noise, moves to the next level, and may add fresh noise (`Step.noise_std`):

    x_s = alpha_s * x_0 + sqrt(sigma_s^2 - tau^2) * noise + tau * eps,  eps ~ N(0, I)

    sampler           tau
    Euler             0
    Euler ancestral   `Step.ancestral_std`
    TCD               sqrt(1 - (alpha_s / alpha_r)^2), r = floor((1 - gamma) s)
    LCM               sigma_s
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from draftune.errors import DraftuneError
from draftune.sampling.schedule import Schedule, Step, check_steps

GAMMA = 0.3
"""TCD's stochasticity, `eta` of diffusers' pipelines, from 0 to 1: diffusers' default, and that of TCD's model card."""


def few_step_schedule(scheduler: Any, num_inference_steps: int) -> Schedule:
    """Build the schedule of a diffusers scheduler whose class is in `SAMPLERS`. Its timesteps are set.

    Raises:
        DraftuneError: `num_inference_steps` is below 1 or above what the scheduler allows.
    """
    config = scheduler.config
    check_steps(num_inference_steps, config.get("original_inference_steps") or config.num_train_timesteps)
    scheduler.set_timesteps(num_inference_steps)
    return SAMPLERS[type(scheduler).__name__](scheduler)


def euler_schedule(scheduler: Any) -> Schedule:
    """Build the Euler schedule of the scheduler's levels x_0 + s * noise (Karras et al., 2022, arXiv:2206.00364).

    The initial noise has the scheduler's `init_noise_sigma`, which differs from the scale sqrt(s^2 + 1) of a noisy
    latent if the timesteps are trailing.
    """
    sigmas = scheduler.sigmas.double().tolist()
    levels = [(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)) for sigma in sigmas]
    steps = [Step(*step) for step in zip(scheduler.timesteps.tolist(), *columns(levels), strict=True)]
    scale = 1.0 if scheduler.config.timestep_spacing == "leading" else levels[0][1]
    return Schedule(tuple(steps), scheduler.config.prediction_type, initial_scale=scale)


def euler_ancestral_schedule(scheduler: Any) -> Schedule:
    """Build the schedule of the ancestral Euler sampler of k-diffusion, which is that of DDPM on other timesteps."""
    schedule = euler_schedule(scheduler)
    return replace(schedule, steps=tuple(step._replace(noise_std=step.ancestral_std) for step in schedule.steps))


def tcd_schedule(scheduler: Any) -> Schedule:
    """Build the schedule of Trajectory Consistency Distillation (Zheng et al., 2024, arXiv:2402.19159).

    As in diffusers, the last step ends at the first training level, slightly above the clean latent. gamma is the key
    `eta` of the scheduler's config, which diffusers stores and does not read, or `GAMMA`. 0 adds no noise.

    Raises:
        DraftuneError: gamma is not between 0 and 1.
    """
    gamma = scheduler.config.get("eta", GAMMA)
    if not 0 <= gamma <= 1:
        raise DraftuneError(f"eta of a TCDScheduler must be between 0 and 1, not {gamma}")
    timesteps, bars = scheduler.timesteps.tolist(), scheduler.alphas_cumprod.double()
    ends = [*timesteps[1:], 0]
    # In float32, as in diffusers.
    between = [int(torch.floor((1 - gamma) * torch.tensor(end))) for end in ends]
    stds = [math.sqrt(1 - bars[end] / bars[r]) if gamma else None for end, r in zip(ends, between, strict=True)]
    levels = [(float(bar.sqrt()), float((1 - bar).sqrt())) for bar in bars[[*timesteps, 0]]]
    steps = [Step(*step) for step in zip(timesteps, *columns(levels), stds, strict=True)]
    return Schedule(tuple(steps), scheduler.config.prediction_type)


def lcm_schedule(scheduler: Any) -> Schedule:
    """Build the schedule of latent consistency models (Luo et al., 2023, arXiv:2310.04378), which ends at x_0."""
    timesteps, bars = scheduler.timesteps.tolist(), scheduler.alphas_cumprod.double()
    levels = [*((float(bar.sqrt()), float((1 - bar).sqrt())) for bar in bars[timesteps]), (1.0, 0.0)]
    alphas, sigmas, alphas_next, sigmas_next = columns(levels)
    steps = zip(timesteps, alphas, sigmas, alphas_next, sigmas_next, sigmas_next, strict=True)
    scaling = scheduler.config.timestep_scaling
    return Schedule(tuple(Step(*step) for step in steps), scheduler.config.prediction_type, timestep_scaling=scaling)


def columns(levels: list[tuple[float, float]]) -> list[list[float]]:
    """Return alpha, sigma, alpha_next and sigma_next of the steps between consecutive levels."""
    alphas, sigmas = [alpha for alpha, _ in levels], [sigma for _, sigma in levels]
    return [alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:]]


SAMPLERS: dict[str, Callable[[Any], Schedule]] = {
    "LCMScheduler": lcm_schedule,
    "TCDScheduler": tcd_schedule,
    "EulerDiscreteScheduler": euler_schedule,
    "EulerAncestralDiscreteScheduler": euler_ancestral_schedule,
}
