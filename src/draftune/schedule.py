"""A sampler's grid: which noise levels the network is called at, and where each call leads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError


class Step(NamedTuple):
    """One call of the denoiser, from the level (alpha, sigma) to the level (alpha_next, sigma_next).

    A noisy latent at a level is alpha * x_0 + sigma * noise. `timestep` is what the network is told.
    """

    timestep: int
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float

    @property
    def tau(self) -> float:
        """The noise of the ancestral sampler's step, with which x_T is forgotten: DDPM's, DDIM's with eta = 1.

        sigma_s * sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2), the posterior's; for flow models it is memoryless.
        """
        kept = self.alpha * self.sigma_next / (self.alpha_next * self.sigma)
        return self.sigma_next * math.sqrt(max(0.0, 1 - kept**2))


class Prediction(NamedTuple):
    """What the network says of a noisy latent: the clean latent and the noise in it, both [B, C, H, W]."""

    clean: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Schedule:
    """The steps from pure noise to the image, noisiest first, and how the network's output is to be read."""

    steps: tuple[Step, ...]
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise DraftuneError(f"unsupported prediction_type {self.prediction_type!r}")
        if self.prediction_type == "epsilon" and any(step.alpha == 0 for step in self.steps):
            raise DraftuneError("a network that predicts the noise says nothing at zero signal-to-noise ratio")

    def __len__(self) -> int:
        return len(self.steps)

    def read(self, output: Tensor, x: Tensor, step: Step) -> Prediction:
        """The clean latent and the noise from the network's output for the noisy latent `x` at `step`."""
        _, alpha, sigma, *_ = step
        if self.prediction_type == "epsilon":
            return Prediction((x - sigma * output) / alpha, output)
        if self.prediction_type == "v_prediction":
            return Prediction(alpha * x - sigma * output, sigma * x + alpha * output)
        return Prediction(output, (x - alpha * output) / sigma)


def ddim_schedule(config: Mapping[str, Any], num_inference_steps: int) -> Schedule:
    """The DDIM grid of a diffusers scheduler's config (Song et al., arXiv 2010.02502).

    What matters of the config beside its betas: `timestep_spacing` ("leading", "trailing", "linspace"),
    `steps_offset`, and `set_alpha_to_one`, whether the last step leads to the clean latent or to the first training
    level. Latents are never clipped. The numbers are those of diffusers' DDIMScheduler; as there, a "trailing" grid
    whose number of steps does not divide that of training ends a little above the clean latent whatever the config.
    Raises DraftuneError for more steps than the model was trained with.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(dict(config))
    train_steps = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= train_steps:
        raise DraftuneError(f"num_inference_steps must be between 1 and {train_steps}, not {num_inference_steps}")
    scheduler.set_timesteps(num_inference_steps)

    def level(alpha_bar: Tensor) -> tuple[float, float]:
        return float(alpha_bar.sqrt()), float((1 - alpha_bar).sqrt())

    steps = []
    alphas_cumprod = scheduler.alphas_cumprod.to(torch.float64)
    final = scheduler.final_alpha_cumprod.to(torch.float64)
    for timestep in scheduler.timesteps.tolist():
        timestep = min(timestep, train_steps - 1)
        following = timestep - train_steps // num_inference_steps
        there = alphas_cumprod[following] if following >= 0 else final
        steps.append(Step(timestep, *level(alphas_cumprod[timestep]), *level(there)))
    return Schedule(tuple(steps), scheduler.config.prediction_type)
