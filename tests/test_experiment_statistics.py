"""The statistics of the experiments: hand-computed intervals, their coverage in simulations, and verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.statistics import (
    Effect,
    factor_effect,
    mean_effect,
    median_band,
    paired_effect,
    queries_to_reach,
    ratio_effect,
    verdict,
)


def test_intervals_are_students() -> None:
    # t(0.975, 2) = 4.302653; the standard error of 1, 2, 3 is 1 / sqrt(3).
    effect, half = mean_effect([1.0, 2.0, 3.0]), 4.302653 / 3**0.5
    assert (effect.value, effect.low, effect.high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-6)
    assert paired_effect([3.0, 5.0, 7.0], [2.0, 3.0, 4.0]) == pytest.approx(effect)
    assert paired_effect([3.0, 5.0], [2.0, 3.0], unit=0.5).value == 3
    ratio = ratio_effect([math.e, math.e**2, math.e**3], [1.0, 1.0, 1.0])
    assert (ratio.value, ratio.low) == pytest.approx((math.e**2, math.exp(2 - half)), rel=1e-6)
    assert math.isnan(mean_effect([1.0]).low)
    assert mean_effect([1.0, 1.0]) == Effect(1.0, 1.0, 1.0, 2)


@pytest.mark.parametrize("count", [3, 5])
def test_intervals_cover_95_percent(count: int) -> None:
    samples = np.random.default_rng(0).normal(0.3, 2.0, (1500, count))
    effects = [mean_effect(list(row)) for row in samples]
    covered = np.mean([effect.low <= 0.3 <= effect.high for effect in effects])
    # The standard error of the share is 0.0056.
    assert covered == pytest.approx(0.95, abs=0.017)
    # A factor's interval is that of its logarithm.
    ratios = [ratio_effect(list(np.exp(row)), [1.0] * count) for row in samples[:500]]
    assert np.mean([ratio.low <= math.exp(0.3) <= ratio.high for ratio in ratios]) == pytest.approx(0.95, abs=0.03)


def test_medians_have_distribution_free_intervals() -> None:
    assert median_band([5.0, 1.0, 2.0, 4.0, 3.0]) == (3, 1, 5)
    # Of nine values, the second to the eighth cover the median with 96 %.
    assert median_band([float(i) for i in range(1, 10)]) == (5, 2, 8)


def test_scored_images_are_interpolated_in_their_logarithm() -> None:
    queries, scores = [0.0, 100.0, 1000.0, 10000.0], [1.0, 2.0, 2.0, 4.0]
    assert queries_to_reach(queries, scores, 3.0) == (pytest.approx(10**3.5), False)
    assert queries_to_reach(queries, scores, 1.25) == (25.0, False)
    assert queries_to_reach(queries, scores, 0.5) == (0.0, False)
    assert queries_to_reach(queries, scores, 4.1) == (10000.0, True)


def test_a_censored_factor_is_a_lower_bound() -> None:
    known = factor_effect([200.0, 800.0], [10.0, 10.0], [False, False])
    assert (known.value, known.censored) == (pytest.approx(40), 0)
    five = factor_effect([90.0, 200.0, 300.0, 300.0, 300.0], [10.0] * 5, [False, False, True, True, True])
    assert (five.value, five.low, five.high, five.censored) == (9, 9, math.inf, 3)
    assert five.full("{:.0f}×") == "at least 9× (9 to no upper bound)"
    # The median exceeds the smallest of three values with 87.5 % only.
    assert math.isnan(factor_effect([90.0, 200.0, 300.0], [10.0] * 3, [False, True, True]).low)
    assert factor_effect([math.nan, 1.0], [1.0, 1.0], [False, False]).text() == "not defined"
    # In a simulation, the bound is below the true median at least as often as it says.
    factors = np.random.default_rng(0).lognormal(3.0, 1.0, (2000, 5))
    limit = math.exp(3.2)
    bounds = [factor_effect(list(np.minimum(f, limit)), [1.0] * 5, list(f > limit)) for f in factors]
    held = [effect.low <= math.exp(3.0) for effect in bounds if effect.censored]
    assert np.mean(held) > 0.955


@pytest.mark.parametrize(
    ("low", "high", "neutral", "margin", "direction", "word"),
    [
        (0.1, 0.5, 0, 0.2, 1, "confirmed"),
        (0.1, 0.5, 0, 0.2, -1, "reversed"),
        (-0.5, -0.1, 0, 0.2, 1, "reversed"),
        (-0.1, 0.15, 0, 0.2, 1, "no measurable difference (below 0.2)"),
        (-0.1, 0.25, 0, 0.2, 1, "undecided at 5 seeds"),
        (1.1, 3.0, 1, 1.5, 1, "confirmed"),
        (0.5, 0.9, 1, 1.5, 1, "reversed"),
        (0.7, 1.4, 1, 1.5, 1, "no measurable difference (below 1.5)"),
        (0.6, 1.4, 1, 1.5, 1, "undecided at 5 seeds"),
        (9.0, math.inf, 1, 1.5, 1, "confirmed"),
        (math.nan, math.nan, 0, 0.2, 1, "undecided at 5 seeds"),
    ],
)
def test_verdicts(low: float, high: float, neutral: float, margin: float, direction: int, word: str) -> None:
    assert verdict(Effect(low, low, high, 5, neutral), margin, direction) == word
