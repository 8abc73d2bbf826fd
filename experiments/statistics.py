"""Effects with 95 % intervals over seeds, and the words that an interval allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Effect:
    """An estimate with its 95 % interval.

    Attributes:
        value, low, high: The estimate and the bounds of its interval; infinite or NaN for a bound that is unknown.
        seeds: Number of independent values.
        neutral: The value of no effect: 0 for a difference, 1 for a ratio.
        censored: Number of values of which only a lower bound is known.
    """

    value: float
    low: float
    high: float
    seeds: int
    neutral: float = 0.0
    censored: int = 0

    def text(self, form: str = "{:+.3g}") -> str:
        """Return the estimate in a format."""
        if math.isnan(self.value):
            return "not defined"
        return ("at least " if self.censored else "") + form.format(self.value)

    def full(self, form: str = "{:+.3g}") -> str:
        """Return the estimate with its interval in parentheses, in a format."""
        interval = self.interval(form)
        return f"{self.text(form)} ({interval})" if interval else self.text(form)

    def interval(self, form: str = "{:+.3g}") -> str:
        """Return the interval in a format; empty for one seed."""
        if math.isnan(self.low) or self.seeds < 2:
            return ""
        form = form[: form.index("}") + 1]  # without the unit
        high = "no upper bound" if math.isinf(self.high) else form.format(self.high)
        return f"{form.format(self.low)} to {high}"


def mean_effect(values: Sequence[float]) -> Effect:
    """Return the mean of independent values with its interval by Student's t.

    mean ± t_{0.975, n - 1} * std / sqrt(n). A bootstrap of so few seeds covers less than 95 %.
    """
    array = np.asarray(values, float)
    low = high = math.nan
    if len(array) > 1 and np.ptp(array) == 0:
        low = high = float(array[0])
    elif len(array) > 1:
        low, high = map(float, stats.t.interval(0.95, len(array) - 1, array.mean(), stats.sem(array)))
    return Effect(float(array.mean()), low, high, len(array))


def paired_effect(first: Sequence[float], second: Sequence[float], unit: float = 1.0) -> Effect:
    """Return the mean of `(first - second) / unit`, paired by seed."""
    return mean_effect([(a - b) / unit for a, b in zip(first, second, strict=True)])


def ratio_effect(first: Sequence[float], second: Sequence[float]) -> Effect:
    """Return the geometric mean of `first / second`, paired by seed, with the interval of the mean logarithm."""
    effect = mean_effect([math.log(a / b) for a, b in zip(first, second, strict=True)])
    value, low, high = (math.exp(number) for number in (effect.value, effect.low, effect.high))
    return Effect(value, low, high, effect.seeds, 1.0)


def factor_effect(first: Sequence[float], second: Sequence[float], censored: Sequence[bool]) -> Effect:
    """Return the factor `first / second`, where `first` may be a lower bound, of a run that ended too early.

    It is NaN if a value is, as where the score to reach is not above the base model's.

    Without censored values this is `ratio_effect`. With them the estimate is the smallest ratio. The median is above
    the smallest of n values with a probability of 1 - 2^-n (97 % for five), also if larger ones are only bounds.
    """
    if math.isnan(sum(first) + sum(second)):
        return Effect(math.nan, math.nan, math.nan, len(first), 1.0)
    if not any(censored):
        return ratio_effect(first, second)
    smallest = min(a / b for a, b in zip(first, second, strict=True))
    low = smallest if len(first) >= 5 else math.nan
    return Effect(smallest, low, math.inf, len(first), 1.0, sum(censored))


def median_band(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its distribution-free interval: for five seeds, the range, which covers it with 94 %."""
    ordered, count = np.sort(np.asarray(values, float)), len(values)
    skipped = max(0, int(stats.binom.ppf(0.025, count, 0.5)) - 1)
    return float(np.median(ordered)), float(ordered[skipped]), float(ordered[count - 1 - skipped])


def queries_to_reach(
    queries: Sequence[float], scores: Sequence[float], target: float, logarithm: bool = True
) -> tuple[float, bool]:
    """Return the scored images after which a curve first reaches a score, and whether it never does.

    Between two evaluations the score is linear in the logarithm of the scored images, before the first positive
    number of them in their number.

    Args:
        queries: Scored images at each evaluation, ascending.
        scores: Scores at these evaluations.
        target: The score to reach.
        logarithm: Whether the score is linear in the logarithm; else it is linear in the number.

    Returns:
        The scored images and False, or the last number of scored images and True if the curve stays below.
    """
    if scores[0] >= target:
        return float(queries[0]), False
    for (q0, y0), (q1, y1) in pairwise(zip(queries, scores, strict=True)):
        if y1 >= target > y0:
            share = (target - y0) / (y1 - y0)
            return (q0 * (q1 / q0) ** share if q0 and logarithm else q0 + (q1 - q0) * share), False
    return float(queries[-1]), True


def interpolate(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Return a curve's value at `at`, linear between ascending points and NaN outside."""
    return float(np.interp(at, x, y, left=math.nan, right=math.nan))


def verdict(effect: Effect, margin: float, direction: int = 1, form: str = "{:.3g}") -> str:
    """Return what the interval says of a claim.

    "confirmed" or "reversed" where it excludes no effect. Where it contains no effect and lies within `margin` of it,
    "no measurable difference". Otherwise "undecided".

    Args:
        effect: The effect of what is claimed to be larger (`direction` 1) or smaller (-1).
        margin: Largest irrelevant effect: a difference, or a factor above 1 for a ratio.
        direction: Sign of the claimed effect.
        form: The format of the margin.
    """
    undecided = f"undecided at {effect.seeds} seed{'s' if effect.seeds > 1 else ''}"
    if math.isnan(effect.low):
        return undecided
    if effect.low > effect.neutral or effect.high < effect.neutral:
        return "confirmed" if (effect.low > effect.neutral) == (direction > 0) else "reversed"
    ratio = effect.neutral == 1
    within = effect.high < margin and effect.low > 1 / margin if ratio else max(effect.high, -effect.low) < margin
    return f"no measurable difference (below {form.replace('+', '').format(margin)})" if within else undecided
