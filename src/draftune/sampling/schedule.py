"""A sampler's grid: which noise levels the network is called at, and where each call leads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError

GRID = ("timestep_spacing", "set_alpha_to_one")
"""The settings of a sampler's grid, by their names in diffusers."""


class Step(NamedTuple):
    """One call of the denoiser, from the level (alpha, sigma) to the level (alpha_next, sigma_next).

    A noisy latent at a level is alpha * x_0 + sigma * noise. `timestep` is what the network is told.
    """

    timestep: float
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
class Clip:
    """Keeps the clean picture that is read from the network's output in its range, -`limit` to `limit`.

    With a `quantile` it is Imagen's dynamic thresholding (Saharia et al., arXiv 2205.11487): each picture is clipped at
    that quantile of its magnitudes, at least 1 and at most `limit`, and divided by it.
    """

    limit: float
    quantile: float | None = None

    def __call__(self, clean: Tensor) -> Tensor:
        if self.quantile is None:
            return clean.clamp(-self.limit, self.limit)
        bound = clean.abs().flatten(1).quantile(self.quantile, 1).clamp(1, self.limit)[:, None, None, None]
        return clean.clamp(-bound, bound) / bound

    def passes(self, clean: Tensor) -> Tensor:
        """Where what was clipped to `clean` moves with what it was: its derivative, if there is no quantile."""
        return clean.abs() < self.limit


@dataclass(frozen=True)
class Schedule:
    """The steps from pure noise to the image, noisiest first, and how the network's output is to be read."""

    steps: tuple[Step, ...]
    prediction_type: str = "epsilon"
    clip: Clip | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "sample", "v_prediction", "flow"):
            raise DraftuneError(f"unsupported prediction_type {self.prediction_type!r}")
        if self.prediction_type == "epsilon" and any(step.alpha == 0 for step in self.steps):
            raise DraftuneError("a network that predicts the noise says nothing at zero signal-to-noise ratio")

    def __len__(self) -> int:
        return len(self.steps)

    def read(self, output: Tensor, x: Tensor, step: Step) -> Prediction:
        """The clean latent, clipped where it is to be, and the noise, from the output for the noisy latent `x`."""
        prediction = self.unclipped(output, x, step)
        return prediction._replace(clean=self.clip(prediction.clean)) if self.clip else prediction

    def prediction_error(self, a: Prediction, b: Prediction, step: Step) -> Tensor:
        """Subtract prediction `b` from prediction `a`, both of the same noisy latent at `step`.

        The space is that of the network's own output. With d_noise and d_x_0 the differences of noise and x_0:

        - epsilon: d_noise.
        - v_prediction: the velocity, alpha * d_noise - sigma * d_x_0.
        - flow: the velocity, d_noise - d_x_0.
        - sample: x_0, written as -sigma * (alpha * d_noise - sigma * d_x_0).

        A change of the output by delta is then delta at every noise level. Other spaces scale it by a factor that
        depends on the level. The noise scales v by alpha and x_0 by alpha / sigma, both 0 at zero terminal SNR. The
        velocity scales x_0 by 1 / sigma, which grows without bound towards the clean latent.

        The sampler uses x_0 clipped where the schedule has a `clip`, and the noise unclipped. The sum for "sample" is
        d_x_0 without a clip; with one it also sees what changes the noise alone.

        Returns:
            A tensor of the latents' shape [B, C, H, W].
        """
        noise = a.noise - b.noise
        if self.prediction_type == "epsilon":
            return noise
        clean = a.clean - b.clean
        if self.prediction_type == "flow":
            return noise - clean
        velocity = step.alpha * noise - step.sigma * clean
        return -step.sigma * velocity if self.prediction_type == "sample" else velocity

    def unclipped(self, output: Tensor, x: Tensor, step: Step) -> Prediction:
        """The same before it is clipped: linear in `x` and in the output."""
        _, alpha, sigma, *_ = step
        if self.prediction_type == "epsilon":
            return Prediction((x - sigma * output) / alpha, output)
        if self.prediction_type == "v_prediction":
            return Prediction(alpha * x - sigma * output, sigma * x + alpha * output)
        if self.prediction_type == "flow":
            # The velocity noise - x_0 of x = (1 - sigma) x_0 + sigma * noise.
            return Prediction(x - sigma * output, x + alpha * output)
        return Prediction(output, (x - alpha * output) / sigma)


def ddim_schedule(config: Mapping[str, Any], num_inference_steps: int, clipped: bool = False) -> Schedule:
    """The DDIM grid of a diffusers scheduler's config (Song et al., arXiv 2010.02502).

    What matters of the config beside its betas: `timestep_spacing` ("leading", "trailing", "linspace"),
    `steps_offset`, and `set_alpha_to_one`, whether the last step leads to the clean latent or to the first training
    level; and where `clipped` is true also "clip_sample" and "thresholding", which latents have no range for. The
    numbers are those of diffusers' DDIMScheduler; as there, a "trailing" grid whose number of steps does not divide
    that of training ends a little above the clean latent whatever the config. Raises DraftuneError for more steps
    than the model was trained with.
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
    clip = None
    if clipped and scheduler.config.thresholding:
        clip = Clip(scheduler.config.sample_max_value, scheduler.config.dynamic_thresholding_ratio)
    elif clipped and scheduler.config.clip_sample:
        clip = Clip(scheduler.config.clip_sample_range)
    return Schedule(tuple(steps), scheduler.config.prediction_type, clip)


def flow_schedule(
    config: Mapping[str, Any], num_inference_steps: int, sigmas: Sequence[float] | None = None, mu: float | None = None
) -> Schedule:
    """The grid of a diffusers FlowMatchEulerDiscreteScheduler's config: x = (1 - sigma) * x_0 + sigma * noise.

    `sigmas` before they are shifted, and `mu` where the shift depends on the picture's size, as in diffusers'
    `set_timesteps`. One step is Euler's (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206). Raises
    DraftuneError for more steps than the model was trained with.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    train_steps = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= train_steps:
        raise DraftuneError(f"num_inference_steps must be between 1 and {train_steps}, not {num_inference_steps}")
    if sigmas is None:
        scheduler.set_timesteps(num_inference_steps, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=list(sigmas), mu=mu)
    levels = scheduler.sigmas.double().tolist()
    steps = [
        Step(timestep, 1 - sigma, sigma, 1 - following, following)
        for timestep, sigma, following in zip(scheduler.timesteps.tolist(), levels[:-1], levels[1:], strict=True)
    ]
    return Schedule(tuple(steps), "flow")
