"""How the figures look: quiet axes, one colour for each method in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "draftune",
    "savefig.dpi": 130,
}
COLORS = {
    "ddpo": "#999999",
    "refl": "#8c564b",
    "alignprop": "#e377c2",
    "drtune": "#bcbd22",
    "leapalign": "#17becf",
    "adjoint_matching": "#9467bd",
    "draft_k(k=1)": "#1f77b4",
    "draft_k(k=10)": "#6baed6",
    "draft": "#08306b",
    "draft_lv": "#d62728",
}


def color(method: str) -> str | None:
    """A method's colour, by its name with its settings or without."""
    return COLORS.get(method, COLORS.get(method.partition("(")[0]))


def figure(rows: int, columns: int, width: float = 4.2, height: float = 3.2) -> tuple[Figure, Any]:
    """An empty figure and its axes [rows, columns]."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        drawn = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(drawn)
        return drawn, drawn.subplots(rows, columns, squeeze=False)


def legend(drawn: Figure, axes: Axes) -> None:
    """What the lines of one of its axes are, beside the figure, where it hides none of them."""
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def save(drawn: Figure, path: str | IO[bytes], format: str) -> None:
    from matplotlib import rc_context

    with rc_context(STYLE):
        # Without the date, so that the same numbers give the same file.
        drawn.savefig(path, format=format, metadata={"Date": None} if format == "svg" else None)


def band(axes: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The mean of several runs and, around it, the lowest and the highest."""
    values = np.array(runs, dtype=float)
    (line,) = axes.plot(x, values.mean(0), label=label, **style)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.18, linewidth=0)
