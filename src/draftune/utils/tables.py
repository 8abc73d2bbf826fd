"""Write tables as CSV and JSON, and format them for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftune.utils.paths import atomic_write

NAME = 40
"""Maximum width of names in a printed table, so that a line has at most 105 characters."""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same columns atomically; numbers that are not finite are empty cells."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(finite(list(rows)))
    with atomic_write(path) as temporary:
        temporary.write_text(lines.getvalue(), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; numbers that are not finite are null."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, recursively."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shortened(text: str, width: int = NAME) -> str:
    """Return a name, shortened to its start if it is an expression, and to its end, where paths differ, otherwise."""
    if len(text) <= width:
        return text
    return f"{text[: width - 1]}…" if "(" in text else f"…{text[1 - width :]}"


def duration(seconds: float) -> str:
    """Format a duration by its two largest units: "12 s", "3 min 20 s", "2 h", "3 d 4 h"."""
    left, parts = round(seconds), list[tuple[int, str]]()
    for unit, size in {"d": 86400, "h": 3600, "min": 60, "s": 1}.items():
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count) or "0 s"
