"""One sampler step for every prediction type, and the rollout. Pure functions; gradient flows through all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from draftune.sampling.schedule import Prediction, Step

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


class Latents:
    """The latents [B, C, H, W] that a batch of noise passes, without a graph, where they were asked for.

    known: by the number of steps made; 0 is the noise. stride: how many steps are made as one.
    """

    def __init__(self, noise: Tensor, known: Mapping[int, Tensor] | None = None, stride: int = 1) -> None:
        self.known = {0: noise, **(known or {})}
        self.stride = stride

    @torch.no_grad()
    def after(self, count: int, denoise: Denoiser, steps: Sequence[Step]) -> Tensor:
        """The latent after the first `count` of these steps, from the nearest one that is known."""
        if count not in self.known:
            start = max(known for known in self.known if known < count)
            self.known[count] = rollout(denoise, strides(steps[start:count], self.stride), self.known[start])
        return self.known[count]


def strides(steps: Sequence[Step], stride: int) -> list[Step]:
    """The same way with `stride` steps made as one; where they don't come out even, the first stride is shorter."""
    ends = range(len(steps), 0, -stride)
    parts = [steps[max(0, end - stride) : end] for end in reversed(ends)]
    return [part[0]._replace(alpha_next=part[-1].alpha_next, sigma_next=part[-1].sigma_next) for part in parts]


def rollout(denoise: Denoiser, steps: Iterable[Step], x: Tensor) -> Tensor:
    """The latent [B, C, H, W] after `steps`, starting from `x`."""
    for step in steps:
        x = advance(denoise(x, step), step)
    return x
