"""DRaFT-K for several K, from the first updates to the collapse of the images."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim, curves_by_seed
from experiments.runner import ExperimentRunner, Row, RunSpec
from experiments.statistics import Effect, interpolate, paired_effect, ratio_effect

MARGIN = 0.1
"""Irrelevant difference, relative to the gain of K = 1."""
COLLAPSED = 0.5
"""Share of the base model's recognized names below which the images have collapsed."""


def methods(budget: Budget) -> dict[int, str]:
    """Return the method of each K, the number of last steps with gradient."""
    steps = budget.num_inference_steps
    return {k: f"draft_k(k={k})" for k in (1, 5) if k < steps} | {steps: "draft"}


def jobs(budget: Budget) -> list[Job]:
    def measure(k: int, spec: RunSpec, runner: ExperimentRunner) -> list[Row]:
        cost, metrics = runner.cost(spec.method), runner.metrics(spec)
        norm = float(np.median([row["grad_norm"] for row in metrics[: budget.short[-1]]]))
        extra: dict[str, Any] = {"k": k, "grad_norm": norm, "peak_mb": cost["peak_mb"]}
        return [{**extra, "seconds": row["update"] * cost["seconds"], **row} for row in runner.curve(spec)]

    made = []
    for seed in range(budget.seeds):
        for k, method in methods(budget).items():
            spec = RunSpec(method, budget.collapse, seed)
            made.append(Job(f"depth k={k} seed={seed}", lambda r, k=k, s=spec: measure(k, s, r), [spec]))  # type: ignore[misc]
    return made


def gain(rows: list[Row], update: int) -> float:
    """Return the mean gain of K = 1 at an update."""
    return float(np.mean(by_seed(rows, "reward", k=1, update=update)) - np.mean(by_seed(rows, "reward", k=1, update=0)))


def at_equal_updates(rows: list[Row], k: int, update: int) -> Effect:
    """Return the reward of K minus that of K = T, relative to the gain of K = 1."""
    deepest = max(row["k"] for row in rows)
    first, second = (by_seed(rows, "reward", k=depth, update=update) for depth in (k, deepest))
    return paired_effect(first, second, gain(rows, update))


def at_equal_time(rows: list[Row], k: int, update: int) -> Effect:
    """Return the same difference in the time in which K = T makes `update` updates."""
    deepest = max(row["k"] for row in rows)
    seconds, second = (by_seed(rows, column, k=deepest, update=update) for column in ("seconds", "reward"))
    first = [
        interpolate([r["seconds"] for r in curve], [r["reward"] for r in curve], min(at, curve[-1]["seconds"]))
        for curve, at in zip(curves_by_seed(rows, k=k), seconds, strict=True)
    ]
    return paired_effect(first, second, gain(rows, update))


def claims(rows: list[Row]) -> list[Claim]:
    depths, updates = sorted({row["k"] for row in rows}), sorted({row["update"] for row in rows})[1:]
    early, last = updates[min(1, len(updates) - 1)], updates[-1]
    form, found = "{:+.0%} of K = 1's gain", []
    for k in depths[:2]:
        text = f"K = {k} beats full backpropagation at {early} updates"
        found.append(claim(text, at_equal_updates(rows, k, early), MARGIN, form=form))

    text = f"K = 1 beats full backpropagation at {last} updates"
    found.append(claim(text, at_equal_updates(rows, 1, last), MARGIN, form=form))
    text = f"K = 1 beats full backpropagation in the time of its {early} updates"
    found.append(claim(text, at_equal_time(rows, 1, early), MARGIN, form=form))
    deepest = depths[-1]
    one, full = (by_seed(rows, "name_accuracy", k=k, update=last) for k in (1, deepest))
    text = f"K = 1 keeps more names than full backpropagation after {last} updates"
    found.append(claim(text, paired_effect(one, full), 0.05, form="{:+.1%}"))

    norms = ratio_effect(by_seed(rows, "grad_norm", k=deepest, update=0), by_seed(rows, "grad_norm", k=1, update=0))
    return [*found, claim("the gradient's norm grows with K (K = T against K = 1)", norms, 1.1, form="{:.3g}×")]


def answer(rows: list[Row]) -> list[str]:
    depths, updates = sorted({row["k"] for row in rows}), sorted({row["update"] for row in rows})[1:]
    sentences = []
    for k in depths:
        ends = curves_by_seed(rows, k=k)
        judged = [max(r["p_3d"] * r["name_accuracy"] for r in curve) for curve in ends]
        reward, names, spread = (
            np.mean([c[-1][key] for c in ends]) for key in ("reward", "name_accuracy", "diversity")
        )
        kept = sum(curve[-1]["name_accuracy"] < COLLAPSED * curve[0]["name_accuracy"] for curve in ends)
        sentences.append(
            f"K = {k}: reward {reward:.3g}, names {names:.0%}, diversity {spread:.3g}, {kept} of {len(ends)} runs "
            f"collapsed, best product of both judges on the way {np.mean(judged):.3g}, "
            f"{ends[0][-1]['seconds'] / updates[-1]:.3g} s an update"
        )
    base = curves_by_seed(rows, k=1)
    spread = np.mean([c[0]["diversity"] for c in base])
    return [
        f"After {updates[-1]} updates: {'; '.join(sentences)}. The base model's diversity is {spread:.3g}.",
        f"A run has collapsed if the judge recognizes fewer than {COLLAPSED:.0%} of the base model's names.",
    ]


EXPERIMENT = Experiment(
    title="Truncation depth",
    question="Through how many sampling steps should the gradient flow?",
    setting="All K have the same learning rate and clip the gradient's norm at 1, so that a larger norm does not mean "
    "larger updates. Seconds are the updates times the median time of one.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[
        *(Panel("update", y, "k") for y in ("reward", "name_accuracy", "diversity")),
        Panel("seconds", "reward", "k", key="update", log=True),
        Panel("seconds", "name_accuracy", "k", key="update", log=True),
        Panel("reward", "name_accuracy", "k", key="update"),
    ],
    columns=3,
)
