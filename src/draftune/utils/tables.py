"""Tables in files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftune.utils.paths import written_whole

NAME = 35
"""Characters of a name in a printed table, which is to fit into 100."""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the same columns, whole or not at all; what is not finite is an empty cell."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(finite(list(rows)))
    with written_whole(path) as temporary:
        temporary.write_text(lines.getvalue(), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all; what is not finite, which JSON does not know, is null."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shortened(text: str, width: int = NAME) -> str:
    """The text, or its end, where names and paths differ."""
    return text if len(text) <= width else "…" + text[1 - width :]
