"""DRaFT-LV for several n: learning curves, variance of the gradient, time."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch

from draftune.lora import add_lora, lora_parameters
from draftune.methods import load_method
from experiments.budget import Budget
from experiments.report import Experiment, Panel, aggregate, value_at
from experiments.runner import DRAFT_1, ExperimentRunner, Row, RunSpec, evaluation_rows


def method(n: int) -> str:
    return f"draft_lv(n={n})" if n else DRAFT_1


def runs(budget: Budget) -> list[RunSpec]:
    return [RunSpec(method(n), budget.steps, seed) for n in budget.lv_samples for seed in range(budget.seeds)]


def gradient_terms(runner: ExperimentRunner, n: int, seed: int) -> torch.Tensor:
    """Return the gradients [1 + n, P] of DRaFT-LV's losses by a new LoRA's P weights, for noise from `seed`."""
    model = runner.model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(model, 8)
    parameters, terms = list(lora_parameters(model).values()), []
    for loss in load_method(method(n)).losses([runner.batch(model, seed)]):
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        terms.append(torch.cat([g.flatten() for g in gradient if g is not None]))
    return torch.stack(terms)


def gradient_variance(runner: ExperimentRunner) -> list[dict[str, float]]:
    """Return, for each n, the gradient's total variance over noise seeds and the squared norm of its mean.

    The gradient of n samples is the sum of the first 1 + n terms of the largest n. The squared norm is corrected for
    the variance of a mean over finitely many seeds.
    """
    seeds, values = runner.budget.gradient_seeds, runner.budget.lv_samples
    terms = [gradient_terms(runner, values[-1], seed) for seed in range(seeds)]
    moments = []
    for n in values:
        gradients = torch.stack([t[: n + 1].sum(0) for t in terms]).double()
        variance = float(gradients.var(0).sum())
        moments.append({"variance": variance, "signal": float(gradients.mean(0).square().sum()) - variance / seeds})
    return moments


def measure(runner: ExperimentRunner) -> list[Row]:
    budget = runner.budget
    moments = runner.cached("lv-gradients", lambda: gradient_variance(runner))
    evaluations = [row for spec in runs(budget) for row in evaluation_rows(spec, runner.run(spec))]
    rows, target = [], math.nan
    for n, moment in zip(budget.lv_samples, moments, strict=True):
        own = [row for row in evaluations if row["method"] == method(n)]
        updates = sorted({row["update"] for row in own})
        curve = [{"update": u, "reward": np.mean([r["reward"] for r in own if r["update"] == u])} for u in updates]
        target = curve[-1]["reward"] if n == 0 else target
        extra: dict[str, Any] = {
            "updates_to_draft_1": first_reached(curve, target),
            "seconds_per_update": runner.cost(method(n))["seconds"],
            # If the mean is smaller than its noise, the ratio is unknown.
            "relative_variance": moment["variance"] / moment["signal"]
            if moment["signal"] > moment["variance"] / budget.gradient_seeds
            else math.nan,
            "variance_of_average": moment["variance"] / (n + 1) ** 2,
        }
        rows += [{"n": n, **row, **extra} for row in own]
    return rows


def first_reached(curve: list[Row], target: float) -> float:
    """Return the interpolated update at which the mean reward first reaches `target`; NaN if it never does."""
    if curve[0]["reward"] >= target:
        return float(curve[0]["update"])
    for i in range(1, len(curve)):
        if curve[i]["reward"] >= target:
            return value_at(curve[i - 1 : i + 1], "reward", target, "update")
    return math.nan


EXTRA = ("updates_to_draft_1", "seconds_per_update", "relative_variance", "variance_of_average")
EXPERIMENT = Experiment(
    title="DRaFT-LV",
    question="What do the noised samples of DRaFT-LV bring, and cost?",
    runs=runs,
    measure=measure,
    table=partial(aggregate, by="n", columns=("reward", *EXTRA)),
    panels=[
        Panel("update", "reward", by="n"),
        Panel("n", "relative_variance", by="", where={"update": 0}),
    ],
)
