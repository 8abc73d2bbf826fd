"""Early stopping: which evaluation is the best, whether to continue, and a warning of over-optimization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from draftune.evaluation.criterion import DIVERSITY, EVAL_PREFIX, weighted_sum
from draftune.runs.logs import NOT_SCORES

Row = Mapping[str, Any]
"""A line of evaluations.jsonl: numbers by column (null if not finite), and standard errors under "stderr"."""


class EarlyStopping:
    """Early stopping. The best evaluation has the highest weighted sum of columns.

    Args:
        weights: Weights by column.
        early_stopping_patience: Evaluations without improvement after which the run should stop; 0 never stops it.
        reward: Column of the training reward, for the warning of over-optimization.
    """

    def __init__(self, weights: Mapping[str, float], early_stopping_patience: int, reward: str) -> None:
        self.weights, self.early_stopping_patience, self.reward = weights, early_stopping_patience, reward
        self.rows: list[Row] = []
        self.best: Row | None = None

    def value(self, row: Row) -> float:
        """Return a row's weighted sum, -inf if it is not finite. Raises DraftuneError for an unknown column."""
        columns = {key: math.nan if value is None else value for key, value in row.items() if key not in NOT_SCORES}
        value: float = weighted_sum(self.weights, columns)
        return value if math.isfinite(value) else -math.inf

    def update(self, row: Row) -> bool:
        """Add an evaluation. Return whether it is the best so far."""
        value = self.value(row)
        self.rows.append(row)
        better = self.best is None or value > self.value(self.best)
        if better:
            self.best = row
        return better

    def evals_since(self, row: Row) -> int:
        """Return the number of evaluations after this one."""
        return len(self.rows) - 1 - self.rows.index(row)

    @property
    def should_stop(self) -> bool:
        """Return whether `early_stopping_patience` evaluations have passed without improvement."""
        return (
            bool(self.early_stopping_patience)
            and self.best is not None
            and self.evals_since(self.best) >= self.early_stopping_patience
        )

    def warning(self) -> str | None:
        """Return a warning of over-optimization, None if there is no sign of it.

        The sign is a training reward above its value at an evaluation reward's best, while that evaluation reward was
        lower by more than two standard errors in each of the last two evaluations. Diversity does not count: it falls
        in nearly every run.
        """
        now, fallen = self.rows[-1], []
        for key in (key for key in now if key.startswith(EVAL_PREFIX) and key != DIVERSITY):
            known = [row for row in self.rows if finite(row, key) and finite(row, self.reward)]
            if not known or known[-1] is not now:
                continue
            # A negative weight means that low values are good.
            sign = math.copysign(1.0, self.weights.get(key, 1.0))
            top = max(known, key=lambda row: sign * row[key])
            lower = all(sign * (top[key] - row[key]) > 2 * spread(key, top, row) for row in known[-2:])
            if lower and now[self.reward] > top[self.reward]:
                verb = "fell" if sign > 0 else "rose"
                fallen.append(f"{key} {verb} from {top[key]:.3f} at update {int(top['step'])} to {now[key]:.3f}")
        if not fallen:
            return None
        return f"over-optimization: the reward rises to {now[self.reward]:.3f}, but {', '.join(fallen)}"


def finite(row: Row, key: str) -> bool:
    """Return whether a column is a finite number."""
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])


def spread(key: str, *rows: Row) -> float:
    """Return the standard error of the difference of a column in two rows; a missing error counts as 0.

    It assumes independent rows. Evaluations share their seeds, so it overestimates the error.
    """
    return math.hypot(*(row.get("stderr", {}).get(key) or 0.0 for row in rows))
