"""Csv files, figures, and RESULTS.md with the sentences that they carry."""

from __future__ import annotations

import csv
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.utils.paths import atomic_write
from draftune.utils.plotting import figure, save
from draftune.utils.tables import write_csv
from experiments.experiment import Experiment, Panel
from experiments.runner import Row
from experiments.statistics import median_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "update": "updates",
    "reward": "training reward",
    "reward_queries": "scored images",
    "p_3d": "P(3D), judge",
    "name_accuracy": "names recognized, judge",
    "diversity": "diversity within a name",
}
"""Axis labels of columns. Other columns are labeled with their names."""
INTRODUCTION = """\
These experiments measure claims of the DRaFT paper ([Clark et al., ICLR 2024](https://arxiv.org/abs/2309.17400)) and
of related papers on the embedded model. It is small: its results need not hold for large models.

**Setup.** The model samples emoji in 10 steps without guidance. Unless a section says otherwise, a run has batches of 4
images of 45 names, a LoRA of rank 8, AdamW with learning rate 1e-3 and the reward `emoji_aesthetic`. An evaluation has
{images} images of names that no run trains on, other images for each seed, and the scores of judges that no run trains
against: `p_3d`, the probability of the 3D style, and `name_accuracy`, the share of images whose name is recognized.

**Statistics.** An effect is paired by seed, with its 95 % interval over seeds (Student's t; of a factor, of its
logarithm). *Confirmed* and *reversed* mean that the interval excludes no effect, in the claimed direction and in the
other. *No measurable difference* means that the interval contains no effect and is narrower than the stated margin.
Else the claim is *undecided*. Bands of figures are medians over seeds with their distribution-free interval, which for
five seeds is their range (94 %). No interval is corrected for the number of claims: one in twenty misses by chance."""

EARLIER = """\
## Earlier measurements

Two experiments on `draftune.experimental` were not repeated and are no longer in the code: of 2026-11-23, the embedded
model of 64 pixels, 24 images of 12 names, three seeds.


- [Optimizers](results/optimizers.csv), reward at 160 scored images: AdamW 6.61, EXTRAP 6.63, SGD 6.31, Step-Tuned SGD
  6.29, AdaMEKA 5.87.

- [Black-box rewards](results/black_box.csv): files of 1.56 kB shrank to 1.37 kB by gradients estimated in images (1,440
  scored images), and to 1.43 kB by the differentiable JPEG (160). A smoothed threshold brought 49 % of the images above
  it instead of 12 %, and training on the score itself 76 %."""


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
        read = [dict(row) for row in csv.DictReader(file)]
    # A commit such as 1234567 or 12e4567 is not a number.
    return [{key: text if key == "commit" else value(text) for key, text in row.items()} for row in read]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV with five significant digits, the columns of the measurement's origin last."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=("commit", "device", "date").__contains__)
    digits = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_csv(path, [{key: row.get(key) for key in columns} for row in digits])


def markdown(table: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table of texts."""
    columns = list(table[0])
    lines = [columns, ["---"] * len(columns), *[[spaced_percent(row[key]) for key in columns] for row in table]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_figure(path: Path, experiment: Experiment, rows: Sequence[Row]) -> None:
    with atomic_write(path) as temporary:
        save(plot(rows, experiment.panels, experiment.columns), str(temporary))


def write_results(path: Path, experiments: Mapping[str, Experiment], rows: Mapping[str, list[Row]]) -> None:
    """Write RESULTS.md of the experiments that have rows, with the names of the others."""
    summary: list[dict[str, str]] = []
    for name, own in rows.items():
        for claim in experiments[name].claims(own):
            line = {"claim": claim.text, "effect": claim.effect.text(claim.form)}
            line |= {"95 % interval": claim.effect.interval(claim.form), "verdict": claim.verdict}
            summary.append(line | {"seeds": str(claim.effect.seeds), "command": f"`{name}`"})
    sections = [section(name, experiments[name], own) for name, own in rows.items()]
    everything = [row for own in rows.values() for row in own]
    images = max((row["images"] for row in everything if row.get("images")), default=0)
    parts = ["# Results", INTRODUCTION.format(images=images), "## Summary", markdown(summary), wrap(origin(everything))]
    if missing := [f"`{name}`" for name in experiments if name not in rows]:
        parts.append(wrap(f"Not measured with these weights yet: {', '.join(missing)}."))
    text = "\n\n".join([*parts, *sections, EARLIER])
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def section(name: str, experiment: Experiment, rows: Sequence[Row]) -> str:
    """Return the section of an experiment: question, setting, answer, figure, link to all values."""
    answer = "\n".join(wrap(sentence, "- ") for sentence in experiment.answer(list(rows)))
    figures = f"![{experiment.title}](results/{name}.png) [All values](results/{name}.csv)."

    if experiment.image:
        figures += f" ![Images](results/{name}_images.png)"
    text = wrap(f"*{experiment.question}* {experiment.setting}")
    return "\n\n".join([f"## {experiment.title}", text, answer, figures])


def origin(rows: Sequence[Row]) -> str:
    """Return the sentence with command, devices, commits and dates of the rows."""

    def values(column: str) -> list[str]:
        return sorted({str(row[column]) for row in rows if row.get(column) is not None})

    dates = values("date")
    period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        "Commands: `python -m experiments NAME` from a clone with the `dev` extra; `--dry-run` says how long it takes. "
        f"Measured {period} on {'; '.join(values('device'))}, commit {', '.join(values('commit'))}; each row of a csv "
        "file has its own."
    )


def wrap(text: str, start: str = "") -> str:
    """Wrap text to 120 columns."""

    wrapper = textwrap.TextWrapper(120, start, " " * len(start), break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(spaced_percent(text))


def spaced_percent(text: str) -> str:
    """Return a text with a space before each percent sign, which Python's format lacks."""
    return re.sub(r"(?<=\d)%", " %", text)


Point = tuple[float, tuple[float, float, float]]


def points(rows: Sequence[Row], panel: Panel) -> dict[str, list[tuple[Any, Point]]]:
    """Return, for each line of a panel, its keys with the median x and the median and interval of y over seeds.

    A line ends where the run of a seed ends.
    """
    wanted = {k: v if isinstance(v, tuple) else (v,) for k, v in (panel.where or {}).items()}
    lines: dict[str, dict[Any, list[Row]]] = {}
    for row in rows:
        complete = row.get(panel.x) is not None and row.get(panel.y) is not None
        if complete and all(row.get(key) in values for key, values in wanted.items()):
            lines.setdefault(str(row.get(panel.by, "")), {}).setdefault(row[panel.key or panel.x], []).append(row)
    result = {}
    for name, own in lines.items():
        most = max(map(len, own.values())) if panel.kind == "line" else 0
        whole = {key: group for key, group in own.items() if len(group) >= most}
        x = {key: 0.0 if panel.kind == "names" else band(group, panel.x)[0] for key, group in whole.items()}
        result[name] = [(key, (x[key], band(group, panel.y))) for key, group in whole.items()]
    return result


def band(rows: Sequence[Row], column: str) -> tuple[float, float, float]:
    return median_band([row[column] for row in rows])


def draw(axes: Axes, rows: Sequence[Row], panel: Panel) -> None:
    """Draw one panel."""
    smallest = math.inf
    for number, (name, line) in enumerate(points(rows, panel).items()):
        x, y, low, high = zip(*((x, *y) for _, (x, y) in line), strict=True)
        errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        smallest = min([smallest, *(value for value in x if value > 0)])
        if panel.kind == "names":
            axes.set_xticks(range(len(line)), [str(key) for key, _ in line])
            axes.errorbar([i + 0.1 * number for i in range(len(line))], y, yerr=errors, fmt="o", label=name)

        elif panel.kind == "points":
            axes.errorbar(x, y, yerr=errors, fmt="o", label=name, alpha=0.8)
        else:
            (curve,) = axes.plot(x, y, ".-", label=name)
            axes.fill_between(x, low, high, color=curve.get_color(), alpha=0.15, linewidth=0)
    if panel.log and math.isfinite(smallest):
        axes.set_xscale("symlog", linthresh=smallest)
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
