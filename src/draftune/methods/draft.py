"""DRaFT, DRaFT-K, DRaFT-LV and ReFL (Clark et al., arXiv 2309.17400, Algorithm 1).

They differ in where the gradient is cut: before the last T, K, 1 or randint(1, m) calls of the denoiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.methods.base import Batch, RewardGradient, register
from draftune.sampling.sampler import advance, rollout
from draftune.sampling.schedule import Schedule


def at_most(name: str, value: int, schedule: Schedule) -> None:
    if value > len(schedule):
        raise DraftuneError(f"{name}={value} is more than the {len(schedule)} sampling steps (num_inference_steps)")


def at_least(name: str, value: int, bound: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < bound:
        raise DraftuneError(f"{name} must be a whole number of at least {bound}, not {value!r}")


@register("draft")
@dataclass(frozen=True)
class Draft(RewardGradient):
    """Full DRaFT: the gradient flows through every sampling step."""

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        yield rollout(batch.denoise, batch.schedule.steps, batch.noise)


@register("draft_k")
@dataclass(frozen=True)
class DraftK(RewardGradient):
    """DRaFT-K: the gradient flows through the last k sampling steps; k = 1 is the cheapest, k = T is full DRaFT."""

    k: int = 1

    def __post_init__(self) -> None:
        at_least("k", self.k, 1)

    def check(self, schedule: Schedule) -> None:
        at_most("k", self.k, schedule)

    def has_prefix(self) -> bool:
        return True

    def shares_prefix(self) -> bool:
        return True

    def spans_calls(self) -> bool:
        return self.k > 1

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        prefix = len(batch.schedule) - self.k
        yield rollout(batch.denoise, batch.schedule.steps[prefix:], batch.without_graph(prefix))


@register("draft_lv")
@dataclass(frozen=True)
class DraftLV(RewardGradient):
    """DRaFT-LV: DRaFT-1 plus n re-noised copies of its sample, each denoised once, for a gradient of lower variance.

    x_1 = alpha_1 * stop_grad(x_0) + sigma_1 * fresh noise, x_0' = (x_1 - sigma_1 * eps(x_1)) / alpha_1. The
    gradients of the 1 + n rewards are added. With AdamW, a mean would differ through gradient clipping and eps alone:
    its weight decay is decoupled from the gradient. n = 2 in the paper.
    """

    n: int = 2

    def __post_init__(self) -> None:
        at_least("n", self.n, 0)

    def has_prefix(self) -> bool:
        return True

    def shares_prefix(self) -> bool:
        return True

    def spans_calls(self) -> bool:
        return False

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        last = batch.schedule.steps[-1]
        clean = rollout(batch.denoise, [last], batch.without_graph(len(batch.schedule) - 1))
        yield clean
        clean = clean.detach()
        for _ in range(self.n):
            x = last.alpha * clean + last.sigma * batch.fresh_noise(clean)
            yield batch.denoise(x, last).clean


@register("refl")
@dataclass(frozen=True)
class ReFL(RewardGradient):
    """ReFL (Xu et al., arXiv 2304.05977): stops at one of the last m steps and jumps to the clean latent there.

    One step is drawn for the whole batch. With m = 1, on a grid that ends at the clean latent, it is DRaFT-1.
    """

    m: int = 20

    def __post_init__(self) -> None:
        at_least("m", self.m, 1)

    def check(self, schedule: Schedule) -> None:
        at_most("m", self.m, schedule)

    def has_prefix(self) -> bool:
        return True

    def shares_prefix(self) -> bool:
        return self.m == 1

    def spans_calls(self) -> bool:
        return False

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        prefix = len(batch.schedule) - int(torch.randint(1, self.m + 1, (1,), generator=batch.generator))
        yield batch.denoise(batch.without_graph(prefix), batch.schedule.steps[prefix]).clean


CUTS = ("normal", "uniform")


@register("alignprop")
@dataclass(frozen=True)
class AlignProp(RewardGradient):
    """AlignProp (Prabhudesai et al., arXiv 2310.03739): DRaFT-K whose k is drawn at random, from 1 to m.

    Before the cut the network's output carries no gradient, and nothing else depends on the weights there, so the
    steps before the earliest cut run without a graph. `m` is by default all steps but the first.

    `cut=normal` draws one k for the batch, k = T - int(N(0.84 T, 0.1 T)), again until it is from 1 to m: the default of
    the authors' code, N(42, 5) of 50 steps (mihirp1998/AlignProp, config/alignprop_config.py lines 111-112,
    sd_pipeline.py lines 124-132 and 224). `cut=uniform` draws k uniformly from 1 to m, for each image, as the paper
    describes it; the authors' code draws one for the batch there too.
    """

    cut: str = "normal"
    m: int | None = None

    def __post_init__(self) -> None:
        if self.cut not in CUTS:
            raise unknown("cut of alignprop", str(self.cut), CUTS)
        if self.m is not None:
            at_least("m", self.m, 1)

    def check(self, schedule: Schedule) -> None:
        if self.m is not None:
            at_most("m", self.m, schedule)

    def has_prefix(self) -> bool:
        return True

    def shares_prefix(self) -> bool:
        return self.m == 1

    def spans_calls(self) -> bool:
        return self.m != 1

    def draw(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """Draw how many of `steps` sampling steps carry gradient, for each of `count` images [count]."""
        most = self.m or max(1, steps - 1)
        if self.cut == "uniform":
            return torch.randint(1, most + 1, (count,), generator=generator)
        while True:
            k = steps - int((0.84 + 0.1 * float(torch.randn((), generator=generator))) * steps)
            if 1 <= k <= most:
                return torch.full((count,), k)

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        drawn = self.draw(len(batch.all_prompts), len(batch.schedule), batch.generator)
        # The earliest of all processes' cuts: they call the network equally often, which a sharded one needs.
        prefix = len(batch.schedule) - int(drawn.max())
        remaining = batch.processes.share(drawn).to(batch.noise.device)
        x = batch.without_graph(prefix)
        for i, step in enumerate(batch.schedule.steps[prefix:], prefix):
            cut = (remaining == len(batch.schedule) - i)[:, None, None, None]
            x = torch.where(cut, x.detach(), x)
            x = advance(batch.denoise(x, step), step)
        yield x
