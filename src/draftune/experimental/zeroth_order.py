"""Zeroth-order gradient estimates: along random directions, along importance-sampled coordinates, or both.

Implemented from the abstract of ZO-HGD (Sharma et al., 2020, arXiv:2012.11518), which does not state the sampling
probabilities of coordinates nor the weights of the two estimates. Here both minimize the variance, given the running
estimate of the gradient's magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftune.errors import DraftuneError

Values = Callable[[Tensor], Tensor]
"""Evaluates points [N, d] to N numbers. A random function should use the same random numbers for every point."""


def along_directions(
    f: Values, x: Tensor, count: int, step: float, value: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate the gradient [d] at x [d] by random directions: d / count · Σ_j (f(x + step·u_j) − f(x)) / step · u_j.

    For a linear f the estimate is unbiased, with a total variance of (d − 1) / count · |gradient|².

    Args:
        f: The function.
        x: The point [d].
        count: Number of directions u_j, uniform on the unit sphere.
        step: Length of a step.
        value: f(x), for forward differences with `count` queries; without it, central ones with twice as many.
        generator: Source of random numbers; torch's own by default.
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
    """Estimate the gradient [d] at x [d] by coordinates that are sampled independently.

    The difference along a sampled coordinate is divided by its probability; the other components are 0. The expected
    number of queries is Σ chances, or twice that without `value`. For a linear f the estimate is unbiased, with a total
    variance of Σ gradient_i² · (1 / chance_i − 1).

    Args:
        f: The function.
        x: The point [d].
        chances: Probability of each coordinate [d], above 0.
        step: Length of a step.
        value: f(x), for forward differences; central ones without it.
        generator: Source of random numbers; torch's own by default.

    Returns:
        The estimate [d], and which coordinates were sampled, a mask [d].
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
    """Return finite differences [N] of f at x [d] along u [N, d]: forward ones from the value at x, or central ones."""
    if value is not None:
        return ((f(x + step * u) - value) / step).to(x)
    ahead, behind = f(torch.cat([x + step * u, x - step * u])).chunk(2)
    return ((ahead - behind) / (2 * step)).to(x)


def best_chances(levels: Tensor, count: float, floor: float = 0.0) -> Tensor:
    """Return the probabilities [d] of sum `count` for which `along_coordinates` has the least variance.

    They are min(1, c · levels) for the c that gives the sum, but at least `floor`, or count / d if that is less.

    Args:
        levels: Magnitudes of the gradient's components [d], 0 or more; if all are 0, the probabilities are equal.
        count: Expected number of sampled coordinates.
        floor: Lowest probability.
    """
    size = len(levels)
    if count >= size:
        return torch.ones_like(levels)
    floor = min(floor, count / size)
    if not levels.any():
        return torch.full_like(levels, count / size)
    strongest = levels.max()
    shares = (levels / strongest).clamp(min=torch.finfo(levels.dtype).eps)
    # Σ clamp(c · shares, floor, 1) is piecewise linear in c; its slope changes where a term meets a bound.
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
    """Estimates gradients [d] by directions, by coordinates, or by the weighted sum of both with the least variance.

    A coordinate's probability is proportional to its level: a moving average of the magnitudes of its differences. The
    same levels predict the variances of both estimates, and so their weights (this project's choice).

    Args:
        directions: Number of random directions, 0 for none.
        coordinates: Expected number of sampled coordinates, 0 for none.
        floor: Lowest probability of a coordinate, 0 to 1.
        memory: Weight of the previous average in the moving average, at least 0 and below 1.

    Raises:
        DraftuneError: for a number out of range.
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
        """Moving average of each coordinate's magnitude, [d] on the CPU; 0 if never sampled, empty before a call."""

    def known(self) -> Tensor:
        """Return the levels; coordinates that were never sampled get the highest, so that they are sampled soon."""
        return torch.where(self.levels > 0, self.levels, self.levels.max())

    def chances(self) -> Tensor:
        return best_chances(self.known(), self.coordinates, self.floor)

    def direction_weight(self) -> float:
        """Return the weight of the estimate by directions, 0 to 1, for the least variance of the weighted sum."""
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
        """Estimate the gradient [d] of f at x [d]; arguments as in `along_directions`.

        For a linear f the estimate is unbiased, since the levels depend on earlier calls only. Points of another length
        than before reset the levels.
        """
        if len(self.levels) != len(x):
            # In place, because a checkpoint restores this very tensor.
            self.levels.resize_(len(x)).zero_()
        share, gradient = self.direction_weight(), torch.zeros_like(x)
        if share > 0:
            gradient += share * along_directions(f, x, self.directions, step, value, generator)
        if share < 1:
            chances = self.chances()
            estimate, chosen = along_coordinates(f, x, chances, step, value, generator)
            gradient += (1 - share) * estimate
            self.remember(estimate.cpu().to(chances) * chances, chosen)
        return gradient

    def remember(self, differences: Tensor, chosen: Tensor) -> None:
        """Update the levels of sampled coordinates; a first difference is the level, non-finite ones are ignored."""
        chosen = chosen & differences.isfinite()
        memory = torch.where(self.levels > 0, self.memory, 0.0)
        levels = memory * self.levels + (1 - memory) * differences.abs()
        # A level of 0 would mean that the coordinate was never sampled.
        self.levels.copy_(torch.where(chosen, levels.clamp(min=torch.finfo(levels.dtype).tiny), self.levels))
