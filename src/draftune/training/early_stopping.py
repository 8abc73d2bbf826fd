"""Early stopping: which evaluation is the best, whether to continue, and a warning of over-optimization."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping
from operator import itemgetter

from draftune.evaluation.criterion import DIVERSITY, EVAL_PREFIX, weighted_sum
from draftune.evaluation.verdict import Row, direction, known, standard_error, two_errors
from draftune.runs.logs import NOT_SCORES


class EarlyStopping:
    """Early stopping. The best evaluation has the highest weighted sum of columns.

    Args:
        weights: Weights by column.
        early_stopping_patience: Evaluations without improvement after which the run should stop; 0 never stops it.
        reward: Column of the training reward, for the warning of over-optimization.
        eval_weights: Weights of the evaluation rewards by column; a negative one means that low values are good.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        early_stopping_patience: int,
        reward: str,
        eval_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.eval_weights = eval_weights or {}
        self.weights, self.early_stopping_patience, self.reward = weights, early_stopping_patience, reward
        self.rows: list[Row] = []
        self.best: Row | None = None

    def value(self, row: Row) -> float:
        """Return a row's weighted sum, -inf if it is not finite. Raises DraftuneError for an unknown column."""
        columns = {key: math.nan if value is None else value for key, value in row.items() if key not in NOT_SCORES}
        value: float = weighted_sum(self.weights, columns)
        return value if math.isfinite(value) else -math.inf

    def update(self, row: Row) -> bool:
        """Add an evaluation. Return whether it is the best so far.

        A resumed run whose reward was changed evaluates its base model again: rows are in the order of the updates.
        """
        value = self.value(row)
        insort(self.rows, row, key=itemgetter("step"))
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

    @property
    def reason(self) -> str:
        """Return the message of a run that ends early."""
        last, best = (int(row["step"]) for row in (self.rows[-1], self.best or self.rows[-1]))
        return (
            f"early stopping after update {last}: the best evaluation is that of update {best}; to continue, resume "
            f"with more than --early-stopping-patience {self.early_stopping_patience}, or 0"
        )

    def warning(self) -> str | None:
        """Return a warning of over-optimization, None if there is no sign of it.

        The sign is a training reward above its value at an evaluation reward's best, while that evaluation reward was
        lower by more than two standard errors in each of the last two evaluations. An unknown error counts as 0: the
        warning asks to look. Diversity does not count: it falls in nearly every run.
        """
        now, fallen = self.rows[-1], []
        for key in (key for key in now if key.startswith(EVAL_PREFIX) and key != DIVERSITY):
            measured = [row for row in self.rows if known(row, key) and known(row, self.reward)]
            if not measured or measured[-1] is not now:
                continue
            sign = math.copysign(1.0, self.eval_weights.get(key, 1.0))
            top = max(measured, key=lambda row: sign * row[key])
            lower = all(changed(key, top, row) == -sign for row in measured[-2:])
            if lower and now[self.reward] > top[self.reward]:
                verb, at = "fell" if sign > 0 else "rose", f"at update {int(top['step'])}"
                fallen.append(
                    f"{key} {verb} from {top[key]:.3f} {at} to {now[key]:.3f}, and the reward went from "
                    f"{top[self.reward]:.3f} to {now[self.reward]:.3f}"
                )
        return f"over-optimization: {'; '.join(fallen)}" if fallen else None


def changed(key: str, first: Row, last: Row) -> int:
    """Return the sign of a column's change between two evaluations, 0 if it is within two standard errors."""
    error = math.hypot(*(standard_error(row, key) or 0.0 for row in (first, last)))
    return direction(*two_errors(last[key] - first[key], error))
