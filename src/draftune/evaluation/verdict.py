"""The one rule of every statement that a score rose or fell: the interval of its change excludes 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from draftune.runs.logs import CHANGE

Row = Mapping[str, Any]
"""A line of evaluations.jsonl: numbers by column (null if not finite), and standard errors under "stderr"."""
UNDECIDED = "no measurable difference"
ERRORS = 2.0
"""Standard errors on each side of a change where there are no paired values: about 95 % for many prompts."""


def direction(low: float, high: float) -> int:
    """Return the sign of a change by its interval: 1 or -1 if the interval excludes 0; 0 if nothing can be said."""
    return 1 if low > 0 else -1 if high < 0 else 0


def two_errors(change: float, error: float | None) -> tuple[float, float]:
    """Return a change ± two standard errors; everything from -inf to inf without a known error."""
    margin = math.inf if error is None or not math.isfinite(error) else ERRORS * error
    return change - margin, change + margin


def known(row: Row, key: str) -> bool:
    """Return whether a column is a finite number."""
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])


def standard_error(row: Row, key: str) -> float | None:
    """Return the standard error of a column's mean in an evaluation, None if it is not known."""
    errors = row.get("stderr") or {}
    return errors[key] if known(errors, key) else None


def change_error(key: str, first: Row, last: Row) -> float | None:
    """Return the standard error of a column's change between two evaluations, None if it is not known.

    It assumes independent evaluations. They share their prompts and seeds, so it overestimates the error.
    """
    errors = standard_error(first, key), standard_error(last, key)
    return None if errors[0] is None or errors[1] is None else math.hypot(errors[0], errors[1])


def change_bounds(key: str, first: Row, last: Row) -> tuple[float, float]:
    """Return the interval of a column's change between two evaluations.

    From the base model on it is the 95 % interval of the run, paired by prompt; else ± two standard errors.
    """
    bounds = (last.get(CHANGE) or {}).get(key) if first["step"] == 0 else None
    return (bounds[0], bounds[1]) if bounds else two_errors(last[key] - first[key], change_error(key, first, last))


def interval(bounds: tuple[float, float]) -> str:
    """Format the interval of a change."""
    low, high = bounds
    return f"{low:+.3g} to {high:+.3g}" if math.isfinite(low) else "its error is not known"


def verdict(first: float, last: float, bounds: tuple[float, float]) -> str:
    """Return the verdict on a change with its interval, as words without the values."""
    if first == last:
        return "none"
    sign = direction(*bounds)
    return f"{'rose' if sign > 0 else 'fell' if sign < 0 else UNDECIDED} ({interval(bounds)})"


def moved(first: float | None, last: float | None, bounds: tuple[float, float]) -> str:
    """Describe a change as a verb phrase.

    Args:
        first: The value before.
        last: The value after.
        bounds: The interval of the change; infinite if it is not known.
    """
    if first is None or last is None:
        return "is unknown"
    if first == last:
        return f"stayed at {number(first)}"
    ends = f"from {number(first)} to {number(last)}"
    if sign := direction(*bounds):
        return f"{'rose' if sign > 0 else 'fell'} {ends} ({interval(bounds)})"
    return f"went {ends}, {UNDECIDED} ({interval(bounds)})"


def within(value: float, error: float | None) -> str:
    """Format a value with its two standard errors, as far as these are known."""
    return number(value) + (f" ± {ERRORS * error:.2g}" if error is not None else "")


def number(value: float) -> str:
    """Format a number with four significant digits, or without decimals from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
