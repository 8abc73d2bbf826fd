"""Adjoint Matching (Domingo-Enrich et al., arXiv 2409.08861): a regression whose optimum is p_base * exp(scale * r)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method, register
from draftune.methods.draft import at_least
from draftune.sampling.ancestral import ancestral, mean, wants_noise
from draftune.sampling.schedule import Schedule


@register("adjoint_matching")
@dataclass(frozen=True)
class AdjointMatching(Method):
    """Adjoint Matching: towards p_base * exp(scale * reward), which keeps the diversity that the reward allows.

    Pictures are drawn by the memoryless ancestral sampler. From a = -scale * dr/dx_0 the lean adjoint is followed
    back along the path, a_t = (d mean_base(x_t) / d x_t)^T a_s, and each step's mean is pulled to mean_base - tau^2 a_s
    by half the squared distance over tau^2. `k` of the random steps, drawn anew for each batch, are trained on; the
    adjoint needs all T calls of the base model, with their gradient by x alone. The optimum is exact where the first
    step leads from pure noise; `scale` is the paper's lambda, whose value for a reward is to be tried.
    """

    half_precision = False

    scale: float = 10.0
    k: int = 10

    def __post_init__(self) -> None:
        at_least("k", self.k, 1)
        if not self.scale > 0:
            raise DraftuneError(f"scale must be more than 0, not {self.scale}")

    def check(self, schedule: Schedule) -> None:
        wants_noise(schedule)

    def spans_calls(self) -> bool:
        return False

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            path = []
            with torch.no_grad():
                for step, x, _, following in ancestral(batch):
                    path.append((step, x))
                    clean = following
            clean.requires_grad_()
            (adjoint,) = torch.autograd.grad(-self.scale * batch.reward(clean).sum(), clean)
            random = [i for i, (step, _) in enumerate(path) if step.tau > 0]
            drawn = torch.randperm(len(random), generator=batch.generator)[: self.k].tolist()
            trained = {random[i] for i in drawn}
            for i, (step, x) in reversed(list(enumerate(path))):
                x = x.requires_grad_()
                start = mean(batch.base(x, step), step)
                (before,) = torch.autograd.grad(start, x, adjoint)
                if i in trained:
                    shift = mean(batch.denoise(x.detach(), step), step) - start.detach()
                    yield (shift / step.tau + step.tau * adjoint).square().flatten(1).sum(1).mean() / 2
                adjoint = before
