"""The DDIM / flow-matching Euler step, the sampling loop and the prefix cache. All functions are differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.sampling.schedule import Prediction, Step

Denoiser = Callable[[Tensor, Step], Prediction]
"""The guided denoiser: maps a noisy latent x_t `[B, C, H, W]` and its step to the predicted x_0 and noise."""


def ddim_step(prediction: Prediction, step: Step, tau: float | None = None) -> Tensor:
    """Compute one sampling step from level t to level s.

    x_s = alpha_s * x_0 + sqrt(sigma_s^2 - tau^2) * noise + tau * eps

    By default tau and eps are the step's `noise_std` and `fresh_noise`, and 0 for deterministic samplers. With a `tau`
    the last term is left to the caller.

    With tau = 0 this is the DDIM step (Song et al., 2020, arXiv:2010.02502, Eq. 12) for diffusion models, and the Euler
    step of flow matching for flow models. `tau=step.ancestral_std` gives the mean of ancestral (DDPM) sampling.

    Args:
        prediction: The predicted x_0 and noise at level t, each `[B, C, H, W]`.
        step: The step, which holds alpha_s and sigma_s.
        tau: The standard deviation of the noise that the caller adds, from 0 to sigma_s.

    Returns:
        x_s, or its mean given a `tau`, `[B, C, H, W]`.

    Raises:
        DraftuneError: The sampler is stochastic, and the step has no `fresh_noise`.
    """
    std = (step.noise_std or 0.0) if tau is None else tau
    noise_scale = math.sqrt(max(0.0, step.sigma_next**2 - std**2)) if std else step.sigma_next
    mean = step.alpha_next * prediction.clean + noise_scale * prediction.noise
    if tau is not None or not std:
        return mean
    if step.fresh_noise is None:
        raise DraftuneError("this sampler adds noise in each step: take the steps of DiffusionModel.start's schedule")
    return mean + std * step.fresh_noise


class PrefixCache:
    """The prefix cache: latents of one batch after given numbers of sampling steps, computed without gradient.

    Args:
        noise: The initial noise `[B, C, H, W]`, which is the latent after 0 steps.
        known: Latents that were computed before, by the number of steps that lead to them.
        stride: How many schedule steps are merged into one denoiser call.
    """

    def __init__(self, noise: Tensor, known: Mapping[int, Tensor] | None = None, stride: int = 1) -> None:
        self.latents = {0: noise, **(known or {})}
        self.stride = stride

    @torch.no_grad()
    def get(self, count: int, denoise: Denoiser, steps: Sequence[Step]) -> Tensor:
        """Return the latent after the first `count` of `steps`, starting from the nearest cached latent before it."""
        if count not in self.latents:
            start = max(known for known in self.latents if known < count)
            self.latents[count] = rollout(denoise, skip_steps(steps[start:count], self.stride), self.latents[start])
        return self.latents[count]


def skip_steps(steps: Sequence[Step], stride: int) -> list[Step]:
    """Merge every `stride` consecutive steps into one larger step between the same first and last noise levels.

    If `stride` does not divide the number of steps, the first merged step spans the remainder. Steps with the LoRA and
    steps without it (`Step.tuned`) are merged among themselves.
    """
    parts: list[Sequence[Step]] = []
    for _, group in groupby(steps, key=attrgetter("tuned")):
        own = list(group)
        parts += [own[max(0, end - stride) : end] for end in reversed(range(len(own), 0, -stride))]
    return [part[0]._replace(alpha_next=part[-1].alpha_next, sigma_next=part[-1].sigma_next) for part in parts]


def rollout(denoise: Denoiser, steps: Iterable[Step], x: Tensor) -> Tensor:
    """Run the sampling loop over `steps` from the latent `x` and return the final latent `[B, C, H, W]`."""
    for step in steps:
        x = ddim_step(denoise(x, step), step)
    return x
