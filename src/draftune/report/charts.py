"""Curves of a run as lists for JSON: values, their place on three x axes, and the width of their bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftune.evaluation.criterion import DENOISER_MSE, DIVERSITY, EVAL_PREFIX, PIXEL_L1
from draftune.evaluation.metrics import RETAINED_PREFIX
from draftune.report.images import evenly
from draftune.runs.logs import NOT_SCORES

Rows = Sequence[Mapping[str, Any]]
AXES = ("step", "reward_queries", "train_seconds")
PART = "reward/"
MOST_POINTS = 1500
BAND = ", ± 2 standard errors"


def charts(metrics: Rows, evaluations: Rows, reward: str | None) -> list[dict[str, Any]]:
    """Return the curves of a run in display order, without those that have no number.

    Args:
        metrics: Rows of metrics.jsonl.
        evaluations: Rows of evaluations.jsonl.
        reward: The reward's column in the evaluations, None without evaluations.
    """
    metrics = [metrics[i] for i in evenly(len(metrics), MOST_POINTS)]
    note = "mean ± standard deviation of the batch"
    curves = [in_training(metrics, "reward", "Reward in training", note, "reward")]
    if reward is not None:
        columns = dict.fromkeys(key for row in evaluations for key in row if key not in (*AXES, reward, *NOT_SCORES))
        curves.append(evaluation_curve(evaluations, reward, "Reward", "at the evaluations", "reward"))
        curves += [evaluation_curve(evaluations, key, *looks(key)) for key in columns]
    else:
        parts = dict.fromkeys(key for row in metrics for key in row if key.startswith(PART))
        curves += [in_training(metrics, key, *looks(key.removeprefix(PART))) for key in parts]
    curves.append(in_training(metrics, "grad_norm", "Gradient norm", "before clipping, logarithmic", "plain", log=True))
    return [chart for chart in curves if any(value is not None for value in chart["values"])]


def looks(key: str) -> tuple[str, str, str]:
    """Return a column's title, note, and kind, which selects its color."""
    known = {
        DIVERSITY: ("Diversity", "within a prompt", "diversity"),
        PIXEL_L1: ("Pixel L1 from base", "mean absolute difference to the base model's images", "plain"),
        DENOISER_MSE: ("Denoiser MSE from base", "mean squared difference to the base model's predictions", "plain"),
    }
    if key.startswith(EVAL_PREFIX):
        return known.get(key, (key.removeprefix(EVAL_PREFIX), "evaluation reward", "eval"))
    if key.startswith(RETAINED_PREFIX):
        return key.removeprefix(RETAINED_PREFIX), "reward of the earlier training", "eval"
    return known.get(key, (key, "part of the reward", "reward"))


def in_training(rows: Rows, key: str, title: str, note: str, kind: str, log: bool = False) -> dict[str, Any]:
    """Return the curve of a column of the updates, which the page smooths; its band is ± one standard deviation."""
    bands = [row.get(f"{key}_std") for row in rows]
    return curve(key, title, note, kind, along(rows), [row.get(key) for row in rows], bands) | {
        "noisy": True,
        "log": log,
    }


def evaluation_curve(rows: Rows, key: str, title: str, note: str, kind: str) -> dict[str, Any]:
    """Return the curve of a column of the evaluations; its band is ± two standard errors, if these are known."""
    bands = [doubled(row.get("stderr", {}).get(key)) for row in rows]
    return curve(key, title, note + BAND * any(bands), kind, along(rows), [row.get(key) for row in rows], bands)


def sweep_charts(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the curves of a sweep over LoRA scales, the reward first."""
    curves: list[dict[str, Any]] = []
    for key, values in sweep.get("columns", {}).items():
        bands = [doubled(error) for error in sweep.get("stderr", {}).get(key, [])]
        title, note, kind = looks(key)
        note = (note if curves else "the reward") + BAND * any(bands)
        curves.append(curve(key, title, note, kind, {"scale": sweep["scales"]}, values, bands))
    return curves


def along(rows: Rows) -> dict[str, list[float]]:
    """Return the x values of rows on each axis."""
    return {axis: [row.get(axis, 0) for row in rows] for axis in AXES}


def curve(
    key: str, title: str, note: str, kind: str, x: Mapping[str, Any], values: Sequence[Any], bands: Sequence[Any]
) -> dict[str, Any]:
    """Return a curve as the page reads it."""
    spread = list(bands) if any(bands) else None
    text = {"key": key, "title": title, "note": note, "kind": kind}
    return {**text, "x": x, "values": list(values), "spread": spread, "noisy": False, "log": False}


def doubled(error: float | None) -> float | None:
    return None if error is None else 2 * error


def reward_column(evaluations: Rows) -> str | None:
    """Return the reward's column: the first one after the counters."""
    return next((key for row in evaluations[:1] for key in row if key not in (*AXES, *NOT_SCORES)), None)
