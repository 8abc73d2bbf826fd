"""Follows the evaluations of a run: which was the best, whether to go on, and whether the reward is being gamed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from draftune.errors import DraftuneError, unknown
from draftune.registry.expression import Call, parse

if TYPE_CHECKING:
    from draftune.rewards import Reward

HELD_OUT = "held-out/"
DIVERSITY = f"{HELD_OUT}diversity"
DENOISER_MSE = "denoiser_mse_from_base"
"""The column of `draftune.evaluation.metrics.denoiser_mse_from_base`."""
COLUMN = re.compile(r"""(?!-)[^\s"'*+]*/[^\s"'*+]*""")
"""A single column, which needs no quotes."""
APART = ("errors", "best")
Row = Mapping[str, Any]
"""A line of evaluations.jsonl: columns, null for what is not finite, and under "errors" their standard errors."""
T = TypeVar("T", bound=Any)


def weights_of(rule: str) -> dict[str, float]:
    """Parse one column, as `held-out/judge`, or a sum of quoted ones, as `"held-out/judge" + 0.5*"distance"`.

    Returns:
        The weights by column.

    Raises:
        DraftuneError: for anything else.
    """
    tree = Call(rule) if COLUMN.fullmatch(rule) else parse(rule)
    terms = [(1.0, tree)] if isinstance(tree, Call) else tree.terms
    if any(call.settings or call.inner for _, call in terms):
        raise DraftuneError(f"best_by must be a sum of quoted columns of the evaluations, not {rule!r}")
    weights: dict[str, float] = {}
    for weight, call in terms:
        weights[call.name] = weights.get(call.name, 0.0) + weight
    return weights


def rule_of(best_by: str, held_out: Reward | None) -> dict[str, float]:
    """By which columns the best is chosen: as asked, else the held-out rewards as they were weighed; else by none."""
    if best_by or held_out is None:
        return weights_of(best_by) if best_by else {}
    return {f"{HELD_OUT}{label}": weight for label, (weight, _) in held_out.columns.items()}


def weighed(weights: Mapping[str, float], row: Mapping[str, T]) -> T:
    """The weighted sum of a row's columns, numbers or tensors. Raises DraftuneError for a column that is not there."""
    for column in weights:
        if column not in row:
            raise unknown("column of the evaluations", column, row)
    total: Any = sum(weight * row[column] for column, weight in weights.items())
    return total


class Guard:
    """The best evaluation is that with the highest weighted sum of its columns."""

    def __init__(self, weights: Mapping[str, float], patience: int, reward: str) -> None:
        self.weights, self.patience, self.reward = weights, patience, reward
        self.rows: list[Row] = []
        self.best: Row | None = None

    def value(self, row: Row) -> float:
        """What is to be highest; least where it is not finite. Raises DraftuneError for a column that is not there."""
        columns = {key: math.nan if value is None else value for key, value in row.items() if key not in APART}
        value: float = weighed(self.weights, columns)
        return value if math.isfinite(value) else -math.inf

    def see(self, row: Row) -> bool:
        """Takes an evaluation in; whether it is the best so far."""
        value = self.value(row)
        self.rows.append(row)
        better = self.best is None or value > self.value(self.best)
        if better:
            self.best = row
        return better

    def since(self, row: Row) -> int:
        """How many evaluations came after this one."""
        return len(self.rows) - 1 - self.rows.index(row)

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations as patience allows have passed without a better one."""
        return bool(self.patience) and self.best is not None and self.since(self.best) >= self.patience

    def warning(self) -> str | None:
        """What to say where the reward rises while a held-out one was clearly lower at the last two evaluations.

        Clearly: by more than two standard errors. Diversity is not a reward: it falls in nearly every run.
        """
        now, fallen = self.rows[-1], []
        for key in (key for key in now if key.startswith(HELD_OUT) and key != DIVERSITY):
            known = [row for row in self.rows if finite(row, key) and finite(row, self.reward)]
            if not known or known[-1] is not now:
                continue
            # Of one that was to be low, the highest is the worst.
            sign = math.copysign(1.0, self.weights.get(key, 1.0))
            top = max(known, key=lambda row: sign * row[key])
            lower = all(sign * (top[key] - row[key]) > 2 * spread(key, top, row) for row in known[-2:])
            if lower and now[self.reward] > top[self.reward]:
                went = "fell" if sign > 0 else "rose"
                fallen.append(f"{key} {went} from {top[key]:.3f} at update {int(top['step'])} to {now[key]:.3f}")
        if not fallen:
            return None
        return f"over-optimisation: the reward rises to {now[self.reward]:.3f}, but {', '.join(fallen)}"


def finite(row: Row, key: str) -> bool:
    """Whether a column of the row is a finite number."""
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])


def spread(key: str, *rows: Row) -> float:
    """The standard error of the difference of a column in two rows, as far as they tell theirs.

    As if they were independent: drawn with the same seeds they differ by less chance, so it errs on the careful side.
    """
    return math.hypot(*(row.get("errors", {}).get(key) or 0.0 for row in rows))
