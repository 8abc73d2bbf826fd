"""One sampler step for every prediction type, and the rollout. Pure functions; gradient flows through all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from draftune.schedule import Prediction, Step

Denoiser = Callable[[Tensor, Step], Prediction]
"""The guided network: a noisy latent [B, C, H, W] at a step to the clean latent and the noise in it."""


def advance(prediction: Prediction, step: Step, tau: float = 0.0) -> Tensor:
    """alpha_s * x_0 + sqrt(sigma_s^2 - tau^2) * noise.

    With tau = 0 this is DDIM for diffusion models and Euler's step for flow models; with tau up to sigma_s, and tau
    times fresh noise added to it, the ancestral sampler.
    """
    clean, noise = prediction
    kept = math.sqrt(max(0.0, step.sigma_next**2 - tau**2)) if tau else step.sigma_next
    return step.alpha_next * clean + kept * noise


def rollout(denoise: Denoiser, steps: Iterable[Step], x: Tensor) -> Tensor:
    """The latent [B, C, H, W] after `steps`, starting from `x`."""
    for step in steps:
        x = advance(denoise(x, step), step)
    return x
