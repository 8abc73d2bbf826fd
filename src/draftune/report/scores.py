"""The table of a run's scores: base model, fine-tuned model, the interval of the change, and the best evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from draftune.evaluation.criterion import DENOISER_MSE, EVAL_PREFIX, PIXEL_L1
from draftune.evaluation.metrics import RETAINED_PREFIX
from draftune.evaluation.verdict import change_bounds, known, standard_error, verdict, within
from draftune.runs.logs import COUNTERS, EVALUATIONS, NOT_SCORES, TEMPLATE

Row = Mapping[str, Any]
NO_REWARDS = {*COUNTERS[EVALUATIONS], *NOT_SCORES, PIXEL_L1, DENOISER_MSE}
"""Columns of evaluations.jsonl that are no scores of a reward."""


class ScoreTable(NamedTuple):
    head: list[str]
    rows: list[list[str]]
    """One row a score: its name, its role in the run, and its cells."""
    note: str


def score_table(evaluations: Sequence[Row], reward: str | None, template: str, step: int | None = None) -> ScoreTable:
    """Compare the scores of the base model with those of a later evaluation.

    Args:
        evaluations: Rows of evaluations.jsonl.
        reward: Column of the reward; the table is empty without it.
        template: Prompts with which the base model was also evaluated, such as "3d {prompt}".
        step: Update of the later evaluation; None, or an update without evaluation: the last one.
    """
    if reward is None or not evaluations:
        return ScoreTable([], [], "")
    by_step = {row["step"]: row for row in evaluations}
    first, last = evaluations[0], by_step.get(step, evaluations[-1])
    best = next((row for row in reversed(evaluations) if row.get("best") is True), last)
    head, shown = ["score", "role", "base model"], [first]
    notes = ["Means over the evaluation images ± two standard errors"]
    if last is not first:
        head += [f"update {last['step']:,}", "change"]
        notes.append("changes with their 95 % intervals")
        shown.append(last)
    if best is not last:
        head.append(f"best/, update {best['step']:,}")
        shown.append(best)
    if asked := first.get(TEMPLATE):
        head.append(f'base model, "{template}"')
        shown.append(asked)

    def cells(key: str) -> list[str]:
        found = [cell(row, key) for row in shown]
        return [*found[:2], change(first, last, key), *found[2:]] if last is not first else found

    keys = [key for key in first if key not in NO_REWARDS]
    return ScoreTable(head, [[*named(key, reward), *cells(key)] for key in keys], f"{'; '.join(notes)}.")


def named(key: str, reward: str) -> tuple[str, str]:
    """Return the name of a column's score and its role."""
    if key.startswith(RETAINED_PREFIX):
        return key.removeprefix(RETAINED_PREFIX), "earlier reward"
    if key.startswith(EVAL_PREFIX):
        return key.removeprefix(EVAL_PREFIX), "not trained on"
    return key, "trained on" if key == reward else "a part of it"


def cell(row: Row, key: str) -> str:
    """Return a score with two standard errors. Scores that a row does not have are empty."""
    if known(row, key):
        return within(row[key], standard_error(row, key))
    return "not finite" if key in row else ""


def change(first: Row, last: Row, key: str) -> str:
    """Return the verdict on a change with its interval; empty if one of the scores is unknown."""
    if not (known(first, key) and known(last, key)):
        return ""
    return verdict(first[key], last[key], change_bounds(key, first, last))
