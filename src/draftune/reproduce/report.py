"""What an experiment says, and how it is written down."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.figures import save
from draftune.reproduce.lab import Lab, Scale, Work
from draftune.utils.paths import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERDICTS = ("confirmed", "weaker", "not seen", "reversed")


@dataclass(frozen=True)
class Claim:
    """What the paper says, what was measured, and which of the four words fits."""

    paper: str
    measured: str
    verdict: str

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, self.verdict


@dataclass
class Report:
    """An experiment's numbers, every one in `rows` and the main ones in `table`, its figure and its findings."""

    rows: list[dict[str, Any]]
    table: list[dict[str, Any]]
    figure: Figure
    text: str
    claims: list[Claim]
    seeds: int


@dataclass(frozen=True)
class Experiment:
    """A question with the runs that answer it."""

    title: str
    question: str
    work: Callable[[Scale], list[Work]]
    report: Callable[[Lab], Report]
    wants_examples: bool = False
    """Whether it can't be made without real pictures."""


def write(name: str, report: Report, folder: Path) -> None:
    """NAME.csv, NAME.png and NAME.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / f"{name}.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in report.rows for key in row)))
        writer.writeheader()
        writer.writerows({key: rounded(value) for key, value in row.items()} for row in report.rows)
    for suffix in ("png", "svg"):
        with written_whole(folder / f"{name}.{suffix}") as temporary:
            save(report.figure, str(temporary), suffix)


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds; that of one seed is not known, and anything may lie within it."""
    return statistics.stdev(values) if len(values) > 1 else math.inf


def compared(difference: float, noise: float, enough: float = 0.0) -> str:
    """The word for a difference that the paper expects to be positive, and to be `enough` to count in full."""
    if abs(difference) <= 2 * noise:
        return "not seen"
    if difference < 0:
        return "reversed"
    return "confirmed" if difference >= enough else "weaker"


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def shown(value: Any) -> str:
    """A number as a table has it."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in table for key in row))
    lines = [columns, ["---"] * len(columns), *[[shown(row.get(key)) for key in columns] for row in table]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def findings(report: Report) -> str:
    """The claims beside what was measured, as a table."""
    if not report.claims:
        return "The paper makes no claim here."
    return markdown([{"the paper": c.paper, "measured": c.measured, "": f"**{c.verdict}**"} for c in report.claims])
