"""Adjoint Matching (Domingo-Enrich et al., 2024, arXiv:2409.08861): sample from p_base * exp(scale * r)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.methods.base import Batch, Method, register
from draftune.methods.draft import check_min
from draftune.sampling.ancestral import ancestral_rollout, mean, require_stochastic_steps, stochastic_steps
from draftune.sampling.schedule import Schedule

CHOICES = ("uniform", "halves")
"""Distributions of the steps in the loss of Adjoint Matching."""


@register("adjoint_matching")
@dataclass(frozen=True)
class AdjointMatching(Method):
    """Adjoint Matching: regression to the distribution p_base * exp(scale * reward), which preserves diversity.

        a_0 = -scale d r / d x_0,   a_t = (d mean_base(x_t) / d x_t)^T a_s           (lean adjoint)
        loss = sum over k random steps of  |mean(x_t) - (mean_base(x_t) - tau^2 a_s)|^2 / (2 tau^2)

    Domingo-Enrich et al., 2024, arXiv:2409.08861. Images come from the memoryless ancestral sampler, whose step from
    x_t to x_s has the mean `mean(x_t)` and the standard deviation tau (`Step.ancestral_std`). The optimum is exact if
    the first step starts from pure noise, alpha_T = 0.

    T denoiser calls without gradient, T base calls with gradient to x_t only, and k denoiser calls with gradient to
    the weights. Use it where diversity matters more than the highest reward.

    In the authors' code (microsoft/soc-fine-tuning-sd, src/trainers/am_trainer.py and configs/multi_prompt.yaml), scale
    is 100 for ImageReward, and k is 4 of 50 steps with choice=halves. It leaves out images and steps whose loss is
    above the moving average of its 0.9 quantile, which is not implemented here. It uses guidance for sampling only;
    here adjoint and loss are guided too, its third variant, of which it reports that the adjoint grows too large. Set
    guidance_scale=1 for its second variant.

    Attributes:
        scale: Factor of the reward, above 0; lambda in the paper. It depends on the reward's range. Default: 10.
        k: Number of random steps in the loss, sampled for each batch, 1 or more. Default: 10.
        choice: How they are sampled. uniform: all steps alike; halves: k // 2 of the first 60 % of the sampling steps
            and the others of the rest. Default: uniform.
    """

    supports_fp16 = False

    scale: float = 10.0
    k: int = 10
    choice: str = "uniform"

    def __post_init__(self) -> None:
        check_min("k", self.k, 1)
        if not self.scale > 0:
            raise DraftuneError(f"scale must be above 0, got {self.scale}")
        if self.choice not in CHOICES:
            raise unknown("choice of adjoint_matching", str(self.choice), CHOICES)

    def check(self, schedule: Schedule) -> None:
        require_stochastic_steps(schedule)

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return stochastic_steps(schedule)

    def backprops_multiple_calls(self) -> bool:
        return False

    def sample_steps(self, schedule: Schedule, generator: torch.Generator) -> set[int]:
        """Sample the indices of the steps in the loss."""
        steps, middle = self.trained_steps(schedule), round(0.6 * len(schedule))
        parts = [(steps, self.k)]
        if self.choice == "halves":
            early = [i for i in steps if i < middle]
            parts = [(early, self.k // 2), (steps[len(early) :], self.k - self.k // 2)]
        return {
            part[i] for part, count in parts for i in torch.randperm(len(part), generator=generator)[:count].tolist()
        }

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            path = []
            with torch.no_grad():
                for step, x, _, following in ancestral_rollout(
                    batch.denoise, batch.schedule, batch.noise, batch.randn_like
                ):
                    path.append((step, x))
                    clean = following
            clean.requires_grad_()
            (adjoint,) = torch.autograd.grad(-self.scale * batch.reward(clean).sum(), clean)
            trained = self.sample_steps(batch.schedule, batch.generator)
            for i, (step, x) in reversed(list(enumerate(path))):
                x = x.detach().requires_grad_()
                base_mean = mean(batch.base_denoise(x, step), step)
                (earlier_adjoint,) = torch.autograd.grad(base_mean, x, adjoint)
                if i in trained:
                    shift = mean(batch.denoise(x.detach(), step), step) - base_mean.detach()
                    residual = shift / step.ancestral_std + step.ancestral_std * adjoint
                    yield residual.square().flatten(1).sum(1).mean() / 2
                adjoint = earlier_adjoint
