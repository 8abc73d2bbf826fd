"""Gradients from values alone: along random directions, along coordinates drawn by their importance, or both.

Written from the definitions in the abstract of ZO-HGD (Sharma et al., arXiv 2012.11518). No code of its authors was
found, and the abstract does not say how they draw coordinates and weigh the two kinds. Here both minimise the variance
for what is known of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftune.errors import DraftuneError

Values = Callable[[Tensor], Tensor]
"""Points [N, d] to N numbers. Where it draws random numbers, it should draw the same for every point."""


def along_directions(
    f: Values, x: Tensor, count: int, step: float, value: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The gradient [d] at x [d] from `count` random directions: d / count · Σ_j (f(x + step·u_j) − f(x)) / step · u_j.

    u_j is uniform on the unit sphere. Where `value`, which is f(x), is given, that takes `count` queries; without it
    differences are central and take twice as many. For a linear f it is unbiased, with a total variance of
    (d − 1) / count · |gradient|².
    """
    u = torch.randn(count, len(x), generator=generator, dtype=x.dtype)
    u = (u / u.norm(dim=1, keepdim=True)).to(x.device)
    return len(x) / count * differences(f, x, u, step, value) @ u


def along_coordinates(
    f: Values,
    x: Tensor,
    chances: Tensor,
    step: float,
    value: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient [d] at x [d] from some coordinates, each drawn with its chance [d] above 0, and which these were.

    A drawn coordinate has its difference divided by its chance, the others 0. Σ chances queries are to be expected, as
    forward differences from `value`, or twice as many. For a linear f it is unbiased, with a total variance of
    Σ gradient_i² · (1 / chance_i − 1).
    """
    chosen = torch.rand(len(x), generator=generator, dtype=chances.dtype).to(chances.device) < chances
    gradient = torch.zeros_like(x)
    which = chosen.nonzero()[:, 0].to(x.device)
    if len(which):
        unit = torch.zeros(len(which), len(x), dtype=x.dtype, device=x.device)
        unit[torch.arange(len(which), device=x.device), which] = 1
        gradient[which] = differences(f, x, unit, step, value) / chances.to(x)[which]
    return gradient, chosen


def differences(f: Values, x: Tensor, u: Tensor, step: float, value: Tensor | None) -> Tensor:
    """The slopes [N] of f at x [d] along u [N, d]: forward from the value at x, or central without it."""
    if value is not None:
        return ((f(x + step * u) - value) / step).to(x)
    ahead, behind = f(torch.cat([x + step * u, x - step * u])).chunk(2)
    return ((ahead - behind) / (2 * step)).to(x)


def best_chances(levels: Tensor, count: float, floor: float = 0.0) -> Tensor:
    """The chances [d] whose sum is `count` and with which `along_coordinates` varies least: min(1, c · levels).

    levels: [d], of the gradient's coordinates as far as they are known, 0 and above; where all are 0, all are drawn
    alike. No chance is below `floor`, or below count / d where that is less.
    """
    size = len(levels)
    if count >= size:
        return torch.ones_like(levels)
    floor = min(floor, count / size)
    if not levels.any():
        return torch.full_like(levels, count / size)
    strongest = levels.max()
    shares = (levels / strongest).clamp(min=torch.finfo(levels.dtype).eps)
    # Σ clamp(c · shares, floor, 1) rises with c, in straight lines between the c at which one of them meets a bound.
    bends = torch.cat([floor / shares, 1 / shares]).sort().values
    ordered = shares.sort().values
    sums = torch.cat([torch.zeros_like(ordered[:1]), ordered.cumsum(0)])
    low, high = (torch.searchsorted(ordered, bound / bends) for bound in (floor, 1))
    totals = floor * low + bends * (sums[high] - sums[low]) + (size - high)
    after = int(torch.searchsorted(totals, count).clamp(1, 2 * size - 1))
    rise = totals[after] - totals[after - 1]
    c = bends[after - 1] + (bends[after] - bends[after - 1]) * ((count - totals[after - 1]) / rise).nan_to_num(0)
    return (c * shares).clamp(floor, 1)


class Estimator:
    """Estimates gradients [d] along directions, along coordinates, or by the sum of both that varies least.

    `directions`, `coordinates`: how many of each; 0 for none of them. The coordinates are drawn by how strongly each
    answered so far, in a moving average that keeps `memory` of what it was; none is drawn more seldom than `floor`.
    Weighed by the same average, the two kinds' variances say how much of each is taken (this project's
    choice). With points of another length than before it begins anew. Raises DraftuneError for numbers out of range.
    """

    def __init__(self, directions: int = 0, coordinates: int = 0, floor: float = 0.02, memory: float = 0.9) -> None:
        if directions < 0 or coordinates < 0 or directions + coordinates == 0:
            raise DraftuneError(
                f"directions or coordinates must be above 0, and neither below, not {directions} and {coordinates}"
            )
        if not 0 <= floor <= 1:
            raise DraftuneError(f"floor must be from 0 to 1, not {floor}")
        if not 0 <= memory < 1:
            raise DraftuneError(f"memory must be at least 0 and below 1, not {memory}")
        self.directions, self.coordinates, self.floor, self.memory = directions, coordinates, floor, memory
        self.levels = torch.zeros(0)
        """How strongly each coordinate answered, on the CPU; 0 where it was never drawn, and none before a call."""

    def known(self) -> Tensor:
        """The levels; a coordinate that was never drawn counts as the strongest, so that it soon is."""
        return torch.where(self.levels > 0, self.levels, self.levels.max())

    def chances(self) -> Tensor:
        return best_chances(self.known(), self.coordinates, self.floor)

    def share_of_directions(self) -> float:
        """The weight of what is found along directions, 0 to 1, for the least variance of the sum."""
        if not (self.directions and self.coordinates):
            return float(self.coordinates == 0)
        squares = self.known().square() if self.levels.any() else torch.ones_like(self.levels)
        by_coordinates = float((squares * (1 / self.chances() - 1)).sum())
        by_directions = (len(squares) - 1) / self.directions * float(squares.sum())
        return by_coordinates / (by_coordinates + by_directions) if by_coordinates else 0.0

    def __call__(
        self,
        f: Values,
        x: Tensor,
        step: float,
        value: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The gradient [d] of f at x [d], by steps of that length; `value` as in `along_directions`.

        It is unbiased for a linear f, since what it remembers is of earlier calls. Without a generator the random
        numbers are torch's own.
        """
        if len(self.levels) != len(x):
            # In place, as always: whoever keeps them for a run that goes on has this very tensor.
            self.levels.resize_(len(x)).zero_()
        share, gradient = self.share_of_directions(), torch.zeros_like(x)
        if share > 0:
            gradient += share * along_directions(f, x, self.directions, step, value, generator)
        if share < 1:
            chances = self.chances()
            found, chosen = along_coordinates(f, x, chances, step, value, generator)
            gradient += (1 - share) * found
            self.remember(found.cpu().to(chances) * chances, chosen)
        return gradient

    def remember(self, answers: Tensor, chosen: Tensor) -> None:
        """The first answer of a coordinate counts in full; one that is not finite tells nothing."""
        chosen = chosen & answers.isfinite()
        kept = torch.where(self.levels > 0, self.memory, 0.0)
        levels = kept * self.levels + (1 - kept) * answers.abs()
        # Never 0 again, which would mean never drawn.
        self.levels.copy_(torch.where(chosen, levels.clamp(min=torch.finfo(levels.dtype).tiny), self.levels))
