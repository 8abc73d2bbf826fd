"""Each method trained beyond its best point."""

from __future__ import annotations

from experiments.budget import Budget
from experiments.report import Experiment, Panel
from experiments.runner import ExperimentRunner, Row, RunSpec, evaluation_rows
from experiments.sample_efficiency import SCORES, ddpo, gradient_methods


def runs(budget: Budget) -> list[RunSpec]:
    adjoint = f"adjoint_matching(scale=10, k={max(2, budget.num_inference_steps // 4)})"
    return [*(RunSpec(name, budget.long_steps) for name in (*gradient_methods(budget), adjoint)), ddpo(budget, 0)]


def measure(runner: ExperimentRunner) -> list[Row]:
    return [row for spec in runs(runner.budget) for row in evaluation_rows(spec, runner.run(spec))]


def table(rows: list[Row]) -> list[Row]:
    """Return each method's last evaluation, and the one with the highest product of both evaluation rewards."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        best = max(own, key=lambda row: row["p_3d"] * row["name_accuracy"])
        peak = {f"best_{key}": best[key] for key in ("update", "p_3d", "name_accuracy", "reward")}
        lines.append({"method": method, **peak, **{key: own[-1][key] for key in ("update", *SCORES)}})
    return lines


EXPERIMENT = Experiment(
    title="Reward hacking",
    question="What happens far beyond the best point?",
    runs=runs,
    measure=measure,
    table=table,
    panels=[Panel("update", y) for y in SCORES],
    repeated=False,
)
