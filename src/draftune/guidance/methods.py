"""Reward-guided sampling by name: `pgdiff_dynamic(strength=0.1)`, `gradient_guidance(rounds=4)`, for any model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from draftune.guidance.sampler import (
    GradientFn,
    NoiseFn,
    dynamic_scale,
    guided_sample,
    iterative_guidance,
    variance_scale,
)
from draftune.registry.factories import build, check_range, parse_call
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Schedule

INF = math.inf


class GuidanceMethod(ABC):
    """Base class of guidance methods, which sample clean latents along the gradient of a reward."""

    finetune_from_round = 0
    """First round that ends with an optimizer step on a LoRA, counted from 1; 0 trains nothing."""
    learning_rate = 0.0
    """Learning rate of that LoRA."""

    @property
    def num_samplings(self) -> int:
        """Number of times that each image is sampled."""
        return 1

    @abstractmethod
    def latents(
        self, denoise: Denoiser, schedule: Schedule, gradient_fn: GradientFn, noise_fn: NoiseFn
    ) -> Iterator[Tensor]:
        """Yield the clean latents [B, C, H, W] of each sampling. The last ones are the result."""


@dataclass(frozen=True)
class PGDiffDynamic(GuidanceMethod):
    """PGDiff with dynamic scale: after each step, move the latent by `strength` times the norm of the step.

        x_s <- x_s + strength * |x_t - x_s| * g / |g|,  g = d r(x_0) / d x_0

    Yang et al., 2023, arXiv:2309.10810. The gradient flows through the decoder, not through the denoiser. T denoiser
    calls and T + 1 reward queries an image. A strength has the same meaning for every reward.

    Attributes:
        strength: Length of the update relative to the step, 0 or more. PGDiff uses 0.0015 to 0.01 with 1,000 steps;
            fewer steps need more. Default: 0.1.
        eta: Noise of a step relative to the ancestral sampler: 0 (DDIM; Euler for flow models) to 1 (PGDiff's).
            Default: 1.
        repeats: Number of times each of the first 30% of the steps is run (N in PGDiff), 1 to 1000. Default: 1.
        per_channel: Use the norms of each channel, as PGDiff does for colorization. Default: false.
    """

    strength: float = 0.1
    eta: float = 1.0
    repeats: int = 1
    per_channel: bool = False

    def __post_init__(self) -> None:
        check_range(
            "pgdiff_dynamic", strength=(self.strength, 0, INF), eta=(self.eta, 0, 1), repeats=(self.repeats, 1, 1000)
        )

    def latents(
        self, denoise: Denoiser, schedule: Schedule, gradient_fn: GradientFn, noise_fn: NoiseFn
    ) -> Iterator[Tensor]:
        rule = dynamic_scale(self.strength, self.per_channel)
        x = schedule.initial_scale * noise_fn()
        yield guided_sample(denoise, schedule.steps, x, gradient_fn, rule, noise_fn, self.eta, self.repeats)


@dataclass(frozen=True)
class ClassifierStyle(GuidanceMethod):
    """Classifier guidance: shift the mean of each ancestral step by `strength` times its variance times the gradient.

        x_s <- x_s + strength * tau^2 * g,  g = d r(x_0) / d x_0

    Dhariwal and Nichol, 2021, arXiv:2105.05233, Algorithm 1, with the gradient taken at the predicted x_0: the static
    scale of PGDiff. T denoiser calls and T + 1 reward queries an image.

    Attributes:
        strength: Factor in units of 1 / reward, 0 or more. It depends on the reward, so there is no default.
    """

    strength: float

    def __post_init__(self) -> None:
        check_range("classifier_style", strength=(self.strength, 0, INF))

    def latents(
        self, denoise: Denoiser, schedule: Schedule, gradient_fn: GradientFn, noise_fn: NoiseFn
    ) -> Iterator[Tensor]:
        x = schedule.initial_scale * noise_fn()
        yield guided_sample(denoise, schedule.steps, x, gradient_fn, variance_scale(self.strength), noise_fn)


@dataclass(frozen=True)
class GradientGuidance(GuidanceMethod):
    """Gradient Guidance: sample in rounds, each conditioned on a linearized reward that is higher by `target_increase`.

    Guo et al., 2024, arXiv:2404.14743, Algorithm 1; the equation is in
    `draftune.guidance.sampler.posterior_guidance`. The gradient flows through the decoder once a round, and through one
    denoiser call at each step. It takes T (1 + rounds) denoiser calls, T rounds of them with a backward pass, and
    1 + 2 rounds reward queries an image.

    Attributes:
        target_increase: Increase of the linearized reward in each round, in the reward's units, 0 or more. The ratio
            target_increase / sigma^2 limits how far the images move. Default: 0.2, as in the authors' toy problem.
        sigma: Standard deviation of the target, in the reward's units, above 0. Default: 0.1, as there.
        rounds: Number of guided rounds, 1 to 100,000. Default: 8, as for the authors' images, which use a fixed
            target value.
        resample_noise: Start each round from new noise, as published. By default each image starts from its own
            noise, since the gradient at one image misleads another.
        eta: Noise of a step relative to the ancestral sampler, 0 (DDIM; Euler for flow models) to 1. Default: 0.
        finetune_from_round: Experimental (Algorithm 2). From this round on, each round ends with an Adam step of
            denoising score matching on the new images, for a new LoRA of rank 8. 0 trains nothing. Default: 0. The
            authors train all weights of a toy network, at 1e-6 from round 60 of 1,200.
        learning_rate: Learning rate of that LoRA, 0 or more. Default: 1e-4.
    """

    target_increase: float = 0.2
    sigma: float = 0.1
    rounds: int = 8
    resample_noise: bool = False
    eta: float = 0.0
    finetune_from_round: int = 0
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        name, rounds = "gradient_guidance", (self.rounds, 1, 100_000)
        check_range(name, target_increase=(self.target_increase, 0, INF), sigma=(self.sigma, 1e-6, INF), rounds=rounds)
        check_range(name, eta=(self.eta, 0, 1), finetune_from_round=(self.finetune_from_round, 0, self.rounds))
        check_range(name, learning_rate=(self.learning_rate, 0, INF))

    @property
    def num_samplings(self) -> int:
        return 1 + self.rounds

    def latents(
        self, denoise: Denoiser, schedule: Schedule, gradient_fn: GradientFn, noise_fn: NoiseFn
    ) -> Iterator[Tensor]:
        options = (self.rounds, self.target_increase, self.sigma, self.eta, self.resample_noise, schedule.initial_scale)
        return iterative_guidance(denoise, schedule.steps, gradient_fn, noise_fn, *options)


GUIDES: dict[str, type[GuidanceMethod]] = {
    "pgdiff_dynamic": PGDiffDynamic,
    "classifier_style": ClassifierStyle,
    "gradient_guidance": GradientGuidance,
}


def load_guide(text: str) -> GuidanceMethod:
    """Create a guidance method from its name and settings, such as "pgdiff_dynamic(strength=0.2)".

    Raises:
        DraftuneError: The method or one of its settings is unknown, or a value is not allowed.
    """
    call = parse_call(text, "guidance", "pgdiff_dynamic(strength=0.1)")
    return build(call, "guidance", GUIDES, GuidanceMethod)  # type: ignore[type-abstract]
