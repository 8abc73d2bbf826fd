"""DRaFT, DRaFT-K, DRaFT-LV and ReFL (Clark et al., arXiv 2309.17400, Algorithm 1).

They differ only in where the gradient is cut: before the last T, K, 1 or randint(1, m) calls of the denoiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Method, fresh_noise, register
from draftune.sampling import Denoiser, rollout
from draftune.schedule import Schedule


def without_graph(denoise: Denoiser, schedule: Schedule, count: int, noise: Tensor) -> Tensor:
    """The latent after the first `count` steps, as a leaf: these steps keep nothing for the backward pass."""
    with torch.no_grad():
        return rollout(denoise, schedule.steps[:count], noise)


def at_most(name: str, value: int, schedule: Schedule) -> None:
    if value > len(schedule):
        raise DraftuneError(f"{name}={value} is more than the {len(schedule)} sampling steps (num_inference_steps)")


def at_least(name: str, value: int, bound: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < bound:
        raise DraftuneError(f"{name} must be a whole number of at least {bound}, not {value!r}")


@register("draft")
@dataclass(frozen=True)
class Draft(Method):
    """Full DRaFT: the gradient flows through every sampling step."""

    def samples(
        self, denoise: Denoiser, schedule: Schedule, noise: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        yield rollout(denoise, schedule.steps, noise)


@register("draft-k")
@dataclass(frozen=True)
class DraftK(Method):
    """DRaFT-K: the gradient flows through the last k sampling steps; k = 1 is the cheapest, k = T is full DRaFT."""

    k: int = 1

    def __post_init__(self) -> None:
        at_least("k", self.k, 1)

    def check(self, schedule: Schedule) -> None:
        at_most("k", self.k, schedule)

    def samples(
        self, denoise: Denoiser, schedule: Schedule, noise: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        prefix = len(schedule) - self.k
        x = without_graph(denoise, schedule, prefix, noise)
        yield rollout(denoise, schedule.steps[prefix:], x)


@register("draft-lv")
@dataclass(frozen=True)
class DraftLV(Method):
    """DRaFT-LV: DRaFT-1 plus n re-noised copies of its sample, each denoised once, for a gradient of lower variance.

    x_1 = alpha_1 * stop_grad(x_0) + sigma_1 * fresh noise, x_0' = (x_1 - sigma_1 * eps(x_1)) / alpha_1. The
    gradients of the 1 + n rewards are added; the paper does not say whether they are added or averaged, which with
    AdamW matters through clipping and weight decay alone. n = 2 in the paper.
    """

    n: int = 2

    def __post_init__(self) -> None:
        at_least("n", self.n, 0)

    def samples(
        self, denoise: Denoiser, schedule: Schedule, noise: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        last = schedule.steps[-1]
        x = without_graph(denoise, schedule, len(schedule) - 1, noise)
        clean = rollout(denoise, [last], x)
        yield clean
        clean = clean.detach()
        for _ in range(self.n):
            x = last.alpha * clean + last.sigma * fresh_noise(clean, generator)
            yield denoise(x, last).clean


@dataclass(frozen=True)
class DrawnCut(Method):
    """What is cut before one of the last m steps, drawn once for the whole batch."""

    m: int = 20

    def __post_init__(self) -> None:
        at_least("m", self.m, 1)

    def check(self, schedule: Schedule) -> None:
        at_most("m", self.m, schedule)

    def draw(self, generator: torch.Generator) -> int:
        """How many steps remain after the cut."""
        return int(torch.randint(1, self.m + 1, (), generator=generator))


@register("refl")
@dataclass(frozen=True)
class ReFL(DrawnCut):
    """ReFL (Xu et al., arXiv 2304.05977): stops at one of the last m steps and jumps to the clean latent there.

    One step is drawn for the whole batch. With m = 1, on a grid that ends at the clean latent, it is DRaFT-1.
    """

    def samples(
        self, denoise: Denoiser, schedule: Schedule, noise: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        prefix = len(schedule) - self.draw(generator)
        x = without_graph(denoise, schedule, prefix, noise)
        yield denoise(x, schedule.steps[prefix]).clean


@register("alignprop")
@dataclass(frozen=True)
class AlignProp(DrawnCut):
    """AlignProp (Prabhudesai et al., arXiv 2310.03739): DRaFT-K whose k is drawn anew for each batch, from 1 to m.

    Before the cut the network's output carries no gradient, and nothing else depends on the weights there, so these
    steps run without a graph.
    """

    m: int = 10

    def samples(
        self, denoise: Denoiser, schedule: Schedule, noise: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        yield from DraftK(self.draw(generator)).samples(denoise, schedule, noise, generator)
