"""One sampler step for every prediction type, and the rollout. Pure functions; gradient flows through all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from draftune.schedule import Prediction, Step

Denoiser = Callable[[Tensor, Step], Prediction]
"""The guided network: a noisy latent [B, C, H, W] at a step to the clean latent and the noise in it."""


def advance(prediction: Prediction, step: Step, tau: float = 0.0, fresh_noise: Tensor | None = None) -> Tensor:
    """x_s = alpha_s * x_0 + sqrt(sigma_s^2 - tau^2) * noise + tau * fresh_noise.

    With tau = 0 this is DDIM for diffusion models and Euler's step for flow models; with `tau` up to sigma_s and
    `fresh_noise` ~ N(0, I) it is the ancestral sampler.
    """
    clean, noise = prediction
    if fresh_noise is None:
        return step.alpha_next * clean + step.sigma_next * noise
    return step.alpha_next * clean + math.sqrt(step.sigma_next**2 - tau**2) * noise + tau * fresh_noise


def rollout(denoise: Denoiser, steps: Iterable[Step], x: Tensor) -> Tensor:
    """The latent [B, C, H, W] after `steps`, starting from `x`."""
    for step in steps:
        x = advance(denoise(x, step), step)
    return x
