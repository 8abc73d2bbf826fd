"""Read the logs of a run: one JSON object per line."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
LOGS = (METRICS, EVALUATIONS, SAMPLES)
COUNTERS = {
    METRICS: ("step", "reward_queries", "train_seconds"),
    EVALUATIONS: ("step", "reward_queries", "train_seconds"),
    SAMPLES: ("step",),
}
"""Columns of each log that are always numbers."""
TEMPLATE = "template"
"""Column of evaluations.jsonl: the base model's scores with the prompts of a template, by column."""
CHANGE = "change"
"""Column of evaluations.jsonl: the 95 % interval of each score's change from the base model, by column."""
NOT_SCORES = ("stderr", "best", TEMPLATE, CHANGE)
"""Columns of evaluations.jsonl that are not scores of the evaluated model."""
NO_NUMBERS: dict[str, Any] = {"stderr": {}, TEMPLATE: {}, CHANGE: {}, "scores": [], "prompts": []}
"""Columns that are objects or lists, and their defaults."""
LARGEST = 2**63
"""What a counter is below."""


def read_rows(path: Path, last: float = math.inf) -> list[dict[str, Any]]:
    """Read the rows of a log.

    Args:
        path: The file; without it there are no rows.
        last: Last step to return.

    Returns:
        The rows up to that step, without an incomplete last line, which an interrupted run leaves.

    Raises:
        DraftuneError: the file cannot be read, or another line is not a row of this log.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DraftuneError(f"cannot read the log {str(path)!r}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if is_row(row, path.name):
            rows.append(row)
        elif number < len(lines):
            raise DraftuneError(
                f"{str(path)!r} is not a log of 'draftune train': line {number} is invalid; correct or delete it"
            )
    return [row for row in rows if row["step"] <= last]


def is_row(row: Any, log: str) -> bool:
    """Return whether a value is a row of the log of this name: numbers by column, null if not finite."""
    if not isinstance(row, dict) or not all(is_count(row.get(key)) for key in COUNTERS.get(log, ())):
        return False
    other: dict[str, Any] = {key: row.get(key, default) for key, default in NO_NUMBERS.items()}
    if log == SAMPLES and not (row.keys() >= {"prompts", "scores"} and isinstance(other["prompts"], list)):
        return False
    if any(type(other[key]) is not type(default) for key, default in NO_NUMBERS.items() if key != "prompts"):
        return False
    if not all(isinstance(bounds, list) and len(bounds) == 2 for bounds in other[CHANGE].values()):
        return False
    values = [value for key, value in row.items() if key not in NO_NUMBERS]
    values += [*other["stderr"].values(), *other[TEMPLATE].values(), *other["scores"], *chain(*other[CHANGE].values())]
    return all(isinstance(value, int | float | None) for value in values)


def is_count(value: Any) -> bool:
    """Return whether a value is a number that a counter can have: neither NaN nor infinite."""
    return isinstance(value, int | float) and abs(value) < LARGEST
