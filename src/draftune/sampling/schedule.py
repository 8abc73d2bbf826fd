"""Noise schedules and sampling steps for DDIM (diffusion) and Euler (flow matching).

Notation: a noisy latent at noise level t is x_t = alpha_t * x_0 + sigma_t * noise, with noise ~ N(0, I). Diffusion
models have alpha^2 + sigma^2 = 1, flow models alpha + sigma = 1. A sampling step goes from level t to the next level s,
which has less noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.sampling.clip import ClipSample

SAMPLER_OPTIONS = ("timestep_spacing", "set_alpha_to_one")
"""The settings that choose the sampling timesteps, by their names in diffusers."""


class Step(NamedTuple):
    """One sampling step: one denoiser call at level t, then an update to the next level s.

    Attributes:
        timestep: The denoiser's timestep input at level t, in units of training steps.
        alpha: alpha_t, the coefficient of x_0 in x_t.
        sigma: sigma_t, the coefficient of the noise in x_t.
        alpha_next: alpha_s.
        sigma_next: sigma_s; 0 for a last step that ends at the clean latent.
        noise_std: The standard deviation of the fresh noise that the sampler adds; None for a deterministic sampler.
        fresh_noise: That noise for one batch, `[B, C, H, W]`, see `Schedule.with_noise`.
        tuned: Whether the fine-tuned model takes this step; False for the base model (`StepRange`).
    """

    timestep: float
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float
    noise_std: float | None = None
    fresh_noise: Tensor | None = None
    tuned: bool = True

    @property
    def ancestral_std(self) -> float:
        """The standard deviation of the noise that the ancestral sampler adds in this step.

        A sampler that is stochastic itself keeps its own, `noise_std`. For all others:

        tau = sigma_s * sqrt(1 - (alpha_t * sigma_s / (alpha_s * sigma_t))^2)

        For diffusion models this is the standard deviation of the DDPM posterior q(x_s | x_t, x_0) (Ho et al., 2020,
        arXiv:2006.11239, Eq. 7), equal to DDIM with eta = 1 (Song et al., 2020, arXiv:2010.02502, Eq. 16). For flow
        models it is the memoryless noise schedule, under which x_0 is independent of the initial noise (Domingo-Enrich
        et al., 2024, arXiv:2409.08861).
        """
        if self.noise_std is not None:
            return self.noise_std
        ratio = self.alpha * self.sigma_next / (self.alpha_next * self.sigma)
        return self.sigma_next * math.sqrt(max(0.0, 1 - ratio**2))


class Prediction(NamedTuple):
    """The denoiser's estimate for a noisy latent, whatever the network was trained to predict.

    Attributes:
        clean: The estimate of x_0, `[B, C, H, W]`.
        noise: The estimate of the noise, `[B, C, H, W]`.
    """

    clean: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Schedule:
    """A sampling schedule and the prediction type of the network.

    Attributes:
        steps: The sampling steps, noisiest first.
        prediction_type: What the network predicts. With z its output: "epsilon": z = noise. "sample": z = x_0.
            "v_prediction": z = alpha * noise - sigma * x_0 (Salimans & Ho, 2022, arXiv:2202.00512, App. D). "flow": the
            velocity z = noise - x_0 (Liu et al., 2022, arXiv:2209.03003).
        clip: The clipping of the predicted x_0; None for latent-space models.
        initial_scale: The factor of the initial noise, see `DiffusionModel.start`.
        timestep_scaling: For the boundary condition of consistency models; None for other models.

    Raises:
        DraftuneError: The prediction type is unknown. Or it is "epsilon" and a step has alpha = 0, that is zero
            signal-to-noise ratio, where the noise does not determine x_0.
    """

    steps: tuple[Step, ...]
    prediction_type: str = "epsilon"
    clip: ClipSample | None = None
    initial_scale: float = 1.0
    timestep_scaling: float | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "sample", "v_prediction", "flow"):
            raise DraftuneError(f"unsupported prediction_type {self.prediction_type!r}")
        if self.prediction_type == "epsilon" and any(step.alpha == 0 for step in self.steps):
            raise DraftuneError(
                "prediction_type='epsilon' can't be combined with zero signal-to-noise ratio (alpha = 0), where the "
                "noise does not determine x_0: use a model with prediction_type='v_prediction' or 'sample'"
            )

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_noises(self) -> int:
        """The number of steps that add fresh noise."""
        return sum(bool(step.noise_std) for step in self.steps)

    def with_noise(self, noises: Sequence[Tensor]) -> Schedule:
        """Return the schedule with the fresh noise of one batch, `[B, C, H, W]` for each step that adds noise."""
        rest = iter(noises)
        return replace(self, steps=tuple(s._replace(fresh_noise=next(rest)) if s.noise_std else s for s in self.steps))

    def to_prediction(self, output: Tensor, x: Tensor, step: Step) -> Prediction:
        """Convert the network's output to x_0 and noise, and clip x_0 if the schedule has a `clip`.

        A consistency model satisfies x_0(x, t = 0) = x by (Song et al., 2023, arXiv:2303.01469, Eq. 5), with t' the
        scaled timestep: x_0 = 0.25 / (t'^2 + 0.25) * x + t' / sqrt(t'^2 + 0.25) * predicted x_0

        Args:
            output: The network's output for `x`, `[B, C, H, W]`.
            x: The noisy latent x_t, `[B, C, H, W]`.
            step: The step whose level t `x` has.
        """
        clean, noise = self._to_prediction(output, x, step)
        clean = self.clip(clean) if self.clip else clean
        if self.timestep_scaling is not None:
            scaled = self.timestep_scaling * step.timestep
            clean = 0.25 / (scaled**2 + 0.25) * x + scaled / math.hypot(scaled, 0.5) * clean
        return Prediction(clean, noise)

    def output_difference(self, a: Prediction, b: Prediction, step: Step) -> Tensor:
        """Subtract prediction `b` from prediction `a`, both for the same noisy latent at `step`.

        The difference is taken in the space of the network's output. With d_noise and d_x_0 the differences of the
        noise and of x_0:

        - epsilon: d_noise.
        - v_prediction: the velocity, alpha * d_noise - sigma * d_x_0.
        - flow: the velocity, d_noise - d_x_0.
        - sample: d_x_0, computed as -sigma times the velocity difference, which equals d_x_0 without clipping.

        If two outputs differ by delta, the result is delta at every noise level. In another space the factor depends on
        the level. Measured in the noise, v is scaled by alpha and x_0 by alpha / sigma, both 0 at zero terminal SNR.
        Measured in the velocity, x_0 is scaled by 1 / sigma, which is unbounded near the clean latent.

        If the schedule has a `clip`, only x_0 is clipped, not the noise. The formula for "sample" equals d_x_0 without
        a clip. With one, it also includes a difference in the noise where the clipped x_0 are equal.

        Returns:
            The difference, `[B, C, H, W]`.
        """
        noise = a.noise - b.noise
        if self.prediction_type == "epsilon":
            return noise
        clean = a.clean - b.clean
        if self.prediction_type == "flow":
            return noise - clean
        velocity = step.alpha * noise - step.sigma * clean
        return -step.sigma * velocity if self.prediction_type == "sample" else velocity

    def _to_prediction(self, output: Tensor, x: Tensor, step: Step) -> Prediction:
        """Convert the network's output to x_0 and noise without clipping: linear in `x` and in the output."""
        _, alpha, sigma, *_ = step
        if self.prediction_type == "epsilon":
            return Prediction((x - sigma * output) / alpha, output)
        if self.prediction_type == "v_prediction":
            return Prediction(alpha * x - sigma * output, sigma * x + alpha * output)
        if self.prediction_type == "flow":
            # The output is the velocity noise - x_0, and x = (1 - sigma) * x_0 + sigma * noise.
            return Prediction(x - sigma * output, x + alpha * output)
        return Prediction(output, (x - alpha * output) / sigma)


def ddim_schedule(config: Mapping[str, Any], num_inference_steps: int, clipped: bool = False) -> Schedule:
    """Build the DDIM schedule (Song et al., 2020, arXiv:2010.02502) of a diffusers scheduler config.

    The noise levels equal those of diffusers' `DDIMScheduler`. As there, a "trailing" schedule ends slightly above the
    clean latent if the number of steps does not divide the number of training steps.

    Args:
        config: Of any scheduler whose noise levels are defined by betas. Apart from the betas these keys are used:
            `timestep_spacing` ("leading", "trailing" or "linspace"), `steps_offset`, and `set_alpha_to_one` (whether
            the last step ends at the clean latent, or else at the first training level).
        num_inference_steps: The number of denoiser calls, from 1 to `num_train_timesteps`.
        clipped: Whether `clip_sample` and `thresholding` of the config apply; for pixel-space models only, since
            latents have no fixed range.

    Raises:
        DraftuneError: `num_inference_steps` is out of range.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(dict(config))
    train_steps = scheduler.config.num_train_timesteps
    check_steps(num_inference_steps, train_steps)
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
        clip = ClipSample(scheduler.config.sample_max_value, scheduler.config.dynamic_thresholding_ratio)
    elif clipped and scheduler.config.clip_sample:
        clip = ClipSample(scheduler.config.clip_sample_range)
    return Schedule(tuple(steps), scheduler.config.prediction_type, clip)


def flow_schedule(
    config: Mapping[str, Any], num_inference_steps: int, sigmas: Sequence[float] | None = None, mu: float | None = None
) -> Schedule:
    """Build the flow-matching Euler schedule of a diffusers `FlowMatchEulerDiscreteScheduler` config.

    Here alpha = 1 - sigma, so that the DDIM update equals the Euler step x_s = x_t + (sigma_s - sigma_t) * velocity
    (Liu et al., 2022, arXiv:2209.03003; Esser et al., 2024, arXiv:2403.03206).

    Args:
        config: The scheduler's config.
        num_inference_steps: The number of denoiser calls, from 1 to `num_train_timesteps`.
        sigmas: The noise levels before the scheduler's shift; None for the scheduler's own.
        mu: The resolution-dependent shift, as in diffusers' `set_timesteps`; None for schedulers without one.

    Raises:
        DraftuneError: `num_inference_steps` is out of range, see `check_flow_steps`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    check_flow_steps(num_inference_steps, scheduler.config)
    if sigmas is None:
        scheduler.set_timesteps(num_inference_steps, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=list(sigmas), mu=mu)
    return flow_levels(scheduler)


def flow_steps(scheduler: Any, num_inference_steps: int) -> Schedule:
    """Build the Euler schedule of a diffusers scheduler with flow-matching noise levels, unshifted by the size.

    Args:
        scheduler: A `FlowMatchEulerDiscreteScheduler`, or another with `use_flow_sigmas`. Its timesteps are set.
        num_inference_steps: The number of denoiser calls, from 1 to `num_train_timesteps`.

    Raises:
        DraftuneError: `num_inference_steps` is out of range, see `check_flow_steps`.
    """
    check_flow_steps(num_inference_steps, scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    return flow_levels(scheduler)


def flow_levels(scheduler: Any) -> Schedule:
    """Return the schedule of the noise levels that a flow-matching scheduler was set to."""
    levels = scheduler.sigmas.double().tolist()
    steps = [
        Step(timestep, 1 - sigma, sigma, 1 - following, following)
        for timestep, sigma, following in zip(scheduler.timesteps.tolist(), levels[:-1], levels[1:], strict=True)
    ]
    return Schedule(tuple(steps), "flow")


def check_steps(num_inference_steps: int, train_steps: int) -> None:
    """Raise DraftuneError unless 1 <= num_inference_steps <= train_steps."""
    if not 1 <= num_inference_steps <= train_steps:
        raise DraftuneError(f"num_inference_steps must be between 1 and {train_steps}, not {num_inference_steps}")


def check_flow_steps(num_inference_steps: int, config: Mapping[str, Any]) -> None:
    """Raise DraftuneError for a number of steps out of range, or one step where the scheduler has a `shift_terminal`.

    All noise levels but the first are stretched to end at `shift_terminal`.
    """
    check_steps(num_inference_steps, config["num_train_timesteps"])
    terminal = config.get("shift_terminal")
    if terminal and num_inference_steps == 1:
        raise DraftuneError(
            "num_inference_steps must be at least 2 for this model, not 1: its scheduler has two given noise levels, "
            f"the first and the last (shift_terminal={terminal})"
        )
