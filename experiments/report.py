"""Tables and figures of the experiments: averages over seeds with 95 % intervals, CSV, Markdown, plots."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from scipy import stats

from draftune.utils.images import save_image
from draftune.utils.paths import atomic_write
from draftune.utils.plotting import figure, save
from draftune.utils.tables import write_csv
from experiments.budget import Budget
from experiments.runner import ExperimentRunner, Row, RunSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "update": "updates",
    "reward": "training reward",
    "reward_queries": "scored images",
    "p_3d": "P(3D), evaluation",
    "name_accuracy": "name accuracy, evaluation",
    "diversity": "diversity within a prompt",
}
"""Axis labels of columns. Other columns are labeled with their names."""


@dataclass(frozen=True)
class Panel:
    """One plot of a figure. Values are means over seeds; a line's band is from the lowest to the highest seed.

    With `ci` the band is the 95 % interval of the mean.
    """

    x: str
    y: str
    by: str = "method"
    """Column whose values become separate lines or colors; "" for one line."""
    kind: Literal["line", "scatter", "bar"] = "line"
    log: bool = False
    """Logarithmic x axis, linear from 0 to the first positive value."""
    xlabel: str = ""
    ylabel: str = ""
    where: Mapping[str, Any] | None = None
    """Values that a row must have to be shown."""
    ci: bool = False


@dataclass(frozen=True)
class Experiment:
    """A question, the runs and measurements that answer it, and its table and figure.

    Attributes:
        runs: Independent runs, which shards can share. `measure` may add runs that depend on their results.
        measure: Returns the rows of `NAME.csv`. Table and figure are made from this file only.
        table: Returns the rows of the table in `NAME.md`.
        panels: Plots of `NAME.png`.
        columns: Columns of panels in the figure.
        images: Returns sample images for `NAME_images.png`, if the experiment shows any.
        needs_examples: Whether the experiment needs real images (`--examples`).
        repeated: Whether the runs are repeated over seeds.
    """

    title: str
    question: str
    runs: Callable[[Budget], list[RunSpec]]
    measure: Callable[[ExperimentRunner], list[Row]]
    table: Callable[[list[Row]], list[Row]]
    panels: Sequence[Panel]
    columns: int = 2
    images: Callable[[ExperimentRunner], Image.Image] | None = None
    needs_examples: bool = False
    repeated: bool = True


def ci95(values: Sequence[float]) -> float:
    """Return the half-width of the 95 % confidence interval of the mean (Student's t); NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def aggregate(rows: Sequence[Row], by: str, columns: Sequence[str], ci: str = "reward") -> list[Row]:
    """Average the last update's rows of each value of `by` over seeds.

    Args:
        rows: Rows of one experiment.
        by: Column, or several separated by spaces, that name what is compared.
        columns: Columns of the means. A mean of integers that are all the same stays an integer.
        ci: Columns, separated by spaces, whose 95 % intervals are added as `<column>_ci95`.
    """
    keys, table = by.split(), []
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        own = [row for row in rows if tuple(row[key] for key in keys) == group]
        last = [row for row in own if row.get("update") == own[-1].get("update")]
        line: Row = dict(zip(keys, group, strict=True))
        for column in columns:
            values = [row[column] for row in last if row.get(column) is not None]
            same = values and all(value == values[0] for value in values)
            line[column] = values[0] if same else float(np.mean(values)) if values else None
            if column in ci.split():
                line[f"{column}_ci95"] = ci95(values)
        table.append(line)
    return table


def value_at(points: Sequence[Row], x: str, level: float, y: str) -> float:
    """Interpolate a piecewise linear curve at `x = level`: its highest `y` there, or NaN if it never reaches it."""
    values = []
    for a, b in pairwise(points):
        low, high = sorted((a[x], b[x]))
        if low <= level <= high and high > low:
            values.append(a[y] + (b[y] - a[y]) * (level - a[x]) / (b[x] - a[x]))
    return max(values, default=math.nan)


def markdown(table: Sequence[Row]) -> str:
    """Return a Markdown table without empty columns; numbers have three decimals below 100."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            small = 1e-4 < abs(value) < 0.01
            return "" if math.isnan(value) else f"{value:{'.2g' if small else '.3f' if abs(value) < 100 else '.0f'}}"
        return "" if value is None else str(value)

    columns = list(dict.fromkeys(key for row in table for key, value in row.items() if cell(value)))
    lines = [columns, ["---"] * len(columns), *[[cell(row.get(key)) for key in columns] for row in table]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_csv(path: Path) -> list[Row]:
    """Read rows written by `write_rows`; empty cells are None."""

    def value(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None

    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV with five significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    digits = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_csv(path, [{key: row.get(key) for key in columns} for row in digits])


def write_report(name: str, experiment: Experiment, folder: Path, environment: str) -> None:
    """Write `NAME.md` and `NAME.png` from `NAME.csv`."""
    rows = read_csv(folder / f"{name}.csv")
    with atomic_write(folder / f"{name}.md") as temporary:
        temporary.write_text(f"{markdown(experiment.table(rows))}\n\n{environment}\n", encoding="utf-8")
    with atomic_write(folder / f"{name}.png") as temporary:
        save(plot(rows, experiment.panels, experiment.columns), str(temporary))


def write_experiment(name: str, experiment: Experiment, runner: ExperimentRunner, folder: Path, how: str) -> None:
    """Measure an experiment and write its files."""
    write_rows(folder / f"{name}.csv", experiment.measure(runner))
    if experiment.images:
        save_image(experiment.images(runner), folder / f"{name}_images.png")
    write_report(name, experiment, folder, how)


def curves(rows: Sequence[Row], panel: Panel) -> dict[str, tuple[Any, Any]]:
    """Return, for each value of `panel.by`, the panel's x and y values, arrays [seeds, points]."""
    kinds = str if panel.kind == "bar" else (int, float)
    rows = [row for row in rows if isinstance(row.get(panel.x), kinds) and row.get(panel.y) is not None]
    rows = [row for row in rows if all(row[key] == value for key, value in (panel.where or {}).items())]
    groups: dict[str, dict[Any, list[Row]]] = {}
    for row in rows:
        groups.setdefault(str(row.get(panel.by, "")), {}).setdefault(row.get("seed"), []).append(row)
    return {
        name: (
            np.array([[row[panel.x] for row in own] for own in seeds.values()]),
            np.array([[row[panel.y] for row in own] for own in seeds.values()]),
        )
        for name, seeds in groups.items()
    }


def draw(axes: Axes, rows: Sequence[Row], panel: Panel) -> None:
    """Draw one panel."""
    for name, (x, y) in curves(rows, panel).items():
        mean = y.mean(0)
        if panel.kind == "bar":
            axes.bar([str(value).replace(", ", ",\n") for value in x[0]], mean, color="C0")
        elif panel.kind == "scatter":
            (points,) = axes.plot(x.mean(0), mean, "o", label=name)
            axes.plot(x.T, y.T, ".", color=points.get_color(), alpha=0.4)
        else:
            (line,) = axes.plot(x.mean(0), mean, ".-", label=name)
            low, high = y.min(0), y.max(0)
            if panel.ci:
                half = np.array([ci95(list(values)) for values in y.T])
                low, high = mean - half, mean + half
            axes.fill_between(x.mean(0), low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    if panel.log:
        positive = [row[panel.x] for row in rows if isinstance(row.get(panel.x), (int, float)) and row[panel.x] > 0]
        axes.set_xscale("symlog", linthresh=min(positive, default=1.0))
    labels = (LABELS.get(column, column.replace("_", " ")) for column in (panel.x, panel.y))
    xlabel, ylabel = (own or label for own, label in zip((panel.xlabel, panel.ylabel), labels, strict=True))
    axes.set(xlabel=xlabel, ylabel=ylabel)


def plot(rows: Sequence[Row], panels: Sequence[Panel], columns: int = 2) -> Figure:
    """Return a figure of all panels, with one legend beside them."""
    columns = min(columns, len(panels))
    canvas, axes = figure(math.ceil(len(panels) / columns), columns)
    labels: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw(axis, rows, panel)
        labels |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels(), strict=True) if text}
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    if len(labels) > 1:
        canvas.legend(list(labels.values()), list(labels), title=panels[-1].by, loc="outside right upper", fontsize=8)
    return canvas
