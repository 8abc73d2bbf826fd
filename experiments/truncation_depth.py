"""DRaFT-K for several K: reward, gradient norm, time and memory."""

from __future__ import annotations

import numpy as np

from experiments.budget import Budget
from experiments.report import Experiment, Panel, ci95
from experiments.runner import ExperimentRunner, Row, RunSpec


def specs_of(budget: Budget) -> dict[int, list[RunSpec]]:
    """Return the runs of all seeds for each K, the number of last steps with gradient."""
    steps = budget.num_inference_steps
    methods = {k: f"draft_k(k={k})" for k in (1, 2, 5, 10, 20) if k < steps} | {steps: "draft"}
    return {k: [RunSpec(method, budget.steps, seed) for seed in range(budget.seeds)] for k, method in methods.items()}


def runs(budget: Budget) -> list[RunSpec]:
    return [spec for specs in specs_of(budget).values() for spec in specs]


def measure(runner: ExperimentRunner) -> list[Row]:
    rows = []
    for k, specs in specs_of(runner.budget).items():
        results, cost = [runner.run(spec) for spec in specs], runner.cost(specs[0].method)
        rewards = [result.final["emoji_aesthetic"] for result in results]
        row = {"k": k, "reward": float(np.mean(rewards)), "reward_ci95": ci95(rewards)}
        row["first_grad_norm"] = float(np.mean([result.metrics[0]["grad_norm"] for result in results]))
        row["median_grad_norm"] = float(np.median([line["grad_norm"] for r in results for line in r.metrics]))
        row["seconds_per_update"] = cost["seconds"]
        memory = {key: cost[key] for key in ("peak_mb", "peak_mb_without_checkpointing")}
        rows.append(row | memory)
    return rows


EXPERIMENT = Experiment(
    title="Truncation depth",
    question="Through how many sampling steps should the gradient flow?",
    runs=runs,
    measure=measure,
    table=lambda rows: rows,
    panels=[
        Panel("k", y, by="", log=True, xlabel="K")
        for y in ("reward", "median_grad_norm", "seconds_per_update", "peak_mb")
    ],
)
