"""The curves of a run as plain lists: where each value lies on the three axes, and how wide its band is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftune.evaluation.criterion import DENOISER_MSE, DIVERSITY, HELD_OUT, PIXEL_L1
from draftune.evaluation.metrics import KEPT_COLUMN
from draftune.report.pictures import evenly

Rows = Sequence[Mapping[str, Any]]
AXES = ("step", "reward_queries", "train_seconds")
PART = "reward/"
MOST_POINTS = 1500
UNDRAWN = ("stderr", "best")
BAND = ", ± 2 standard errors"


def charts(metrics: Rows, evaluations: Rows, reward: str | None) -> list[dict[str, Any]]:
    """Every curve of a run, in the order in which they are looked at; those without a number are left out."""
    metrics = [metrics[i] for i in evenly(len(metrics), MOST_POINTS)]
    noted = "mean ± standard deviation of the batch"
    found = [in_training(metrics, "reward", "Reward in training", noted, "reward")]
    if reward is not None:
        columns = dict.fromkeys(key for row in evaluations for key in row if key not in (*AXES, reward, *UNDRAWN))
        found.append(evaluated(evaluations, reward, "Reward", "at the evaluations", "reward"))
        found += [evaluated(evaluations, key, *looks(key)) for key in columns]
    else:
        parts = dict.fromkeys(key for row in metrics for key in row if key.startswith(PART))
        found += [in_training(metrics, key, *looks(key.removeprefix(PART))) for key in parts]
    found.append(in_training(metrics, "grad_norm", "Gradient norm", "before clipping, logarithmic", "plain", log=True))
    return [chart for chart in found if any(value is not None for value in chart["values"])]


def looks(key: str) -> tuple[str, str, str]:
    """A column's title, what is said of it, and its kind, which decides its colour."""
    known = {
        DIVERSITY: ("Diversity", "within a prompt", "diversity"),
        PIXEL_L1: ("Distance", "mean change of a pixel from the base model", "plain"),
        DENOISER_MSE: ("Denoiser MSE from base", "how far the denoiser has moved", "plain"),
    }
    if key.startswith(HELD_OUT):
        return known.get(key, (key.removeprefix(HELD_OUT), "held out", "held-out"))
    if key.startswith(KEPT_COLUMN):
        return key.removeprefix(KEPT_COLUMN), "what was trained before", "held-out"
    return known.get(key, (key, "part of the reward", "reward"))


def in_training(rows: Rows, key: str, title: str, note: str, kind: str, log: bool = False) -> dict[str, Any]:
    """A column of the updates, which is smoothed where there is much of it; its band is ± one standard deviation."""
    bands = [row.get(f"{key}_std") for row in rows]
    return drawn(key, title, note, kind, along(rows), [row.get(key) for row in rows], bands) | {
        "noisy": True,
        "log": log,
    }


def evaluated(rows: Rows, key: str, title: str, note: str, kind: str) -> dict[str, Any]:
    """A column of the evaluations; its band is ± two standard errors, where these are known."""
    bands = [doubled(row.get("stderr", {}).get(key)) for row in rows]
    return drawn(key, title, note + BAND * any(bands), kind, along(rows), [row.get(key) for row in rows], bands)


def sweep_charts(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The columns of a sweep over the LoRA's scale, the reward first."""
    found: list[dict[str, Any]] = []
    for key, values in sweep.get("columns", {}).items():
        bands = [doubled(error) for error in sweep.get("stderr", {}).get(key, [])]
        title, note, kind = looks(key)
        note = (note if found else "the reward") + BAND * any(bands)
        found.append(drawn(key, title, note, kind, {"scale": sweep["scales"]}, values, bands))
    return found


def along(rows: Rows) -> dict[str, list[float]]:
    """Where rows lie on each of the axes."""
    return {axis: [row.get(axis, 0) for row in rows] for axis in AXES}


def drawn(
    key: str, title: str, note: str, kind: str, x: Mapping[str, Any], values: Sequence[Any], bands: Sequence[Any]
) -> dict[str, Any]:
    """A curve as the page draws it."""
    spread = list(bands) if any(bands) else None
    said = {"key": key, "title": title, "note": note, "kind": kind}
    return {**said, "x": x, "values": list(values), "spread": spread, "noisy": False, "log": False}


def doubled(error: float | None) -> float | None:
    return None if error is None else 2 * error


def reward_column(evaluations: Rows) -> str | None:
    """The column of the reward: the first after the counters."""
    return next((key for row in evaluations[:1] for key in row if key not in AXES), None)
