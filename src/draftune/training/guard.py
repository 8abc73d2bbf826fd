"""Follows the evaluations of a run: which was the best, whether to go on, and whether the reward is being gamed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from draftune.errors import DraftuneError, unknown
from draftune.expression import Call, parse

if TYPE_CHECKING:
    from draftune.rewards import Reward

HELD_OUT = "held-out/"
T = TypeVar("T", bound=Any)


def weights_of(rule: str) -> dict[str, float]:
    """A weighted sum of columns, "held-out/judge + 0.5*held-out/diversity", by column. Raises DraftuneError."""
    tree = parse(rule)
    terms = [(1.0, tree)] if isinstance(tree, Call) else tree.terms
    if any(call.settings or call.inner for _, call in terms):
        raise DraftuneError(f"best_by is a sum of columns of the evaluations, not {rule!r}")
    return {call.name: weight for weight, call in terms}


def rule_of(best_by: str, held_out: Reward | None, columns: Iterable[str]) -> dict[str, float]:
    """By which columns the best is chosen: as asked, else the held-out rewards as they were weighed; else by none."""
    if best_by:
        return weights_of(best_by)
    judged = (key for key in columns if key.startswith(HELD_OUT) and key != f"{HELD_OUT}diversity")
    weights = [weight for weight, _ in held_out.terms] if held_out is not None else []
    return dict(zip(judged, weights, strict=False))


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
        self.rows: list[Mapping[str, float]] = []
        self.best: Mapping[str, float] | None = None

    def value(self, row: Mapping[str, float]) -> float:
        """What is to be highest. Raises DraftuneError for a column that is not there."""
        return weighed(self.weights, row)

    def see(self, row: Mapping[str, float]) -> bool:
        """Takes an evaluation in; whether it is the best so far."""
        value = self.value(row)
        self.rows.append(row)
        better = self.best is None or value > self.value(self.best)
        if better:
            self.best = row
        return better

    def since(self, row: Mapping[str, float]) -> int:
        """How many evaluations came after this one."""
        return len(self.rows) - 1 - self.rows.index(row)

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations as patience allows have passed without a better one."""
        return bool(self.patience) and self.best is not None and self.since(self.best) >= self.patience

    def warning(self) -> str | None:
        """What to say where the reward rises while a held-out one has been lower at the last two evaluations."""
        now, fallen = self.rows[-1], []
        for key in (key for key in now if key.startswith(HELD_OUT)):
            top = max(self.rows, key=lambda row: row[key])
            lower = self.since(top) >= 2 and all(row[key] < top[key] for row in self.rows[-2:])
            if lower and now[self.reward] > top[self.reward]:
                fallen.append(f"{key} fell from {top[key]:.3f} at update {int(top['step'])} to {now[key]:.3f}")
        if not fallen:
            return None
        return f"over-optimisation: the reward rises to {now[self.reward]:.3f}, but {', '.join(fallen)}"
