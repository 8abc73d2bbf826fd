"""Matplotlib figures in one style, without a display."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

from draftune.errors import require

if TYPE_CHECKING:
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
    "savefig.dpi": 130,
}


def figure(rows: int, columns: int, width: float = 4.2, height: float = 3.2) -> tuple[Figure, Any]:
    """Return an empty figure and its axes, an array of shape [rows, columns]; sizes are inches of one panel."""
    require("matplotlib", "drawing figures", "plots")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        canvas = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(canvas)
        return canvas, canvas.subplots(rows, columns, squeeze=False)


def save(canvas: Figure, path: str | IO[bytes]) -> None:
    """Write a figure as PNG."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        canvas.savefig(path, format="png")
