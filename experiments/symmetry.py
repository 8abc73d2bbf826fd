"""Last-step and deeper gradients for a reward of the image's layout: left-right symmetry."""

from __future__ import annotations

from experiments.budget import Budget
from experiments.report import Experiment, Panel
from experiments.runner import DRAFT_1, ExperimentRunner, Row, RunSpec, rename_columns
from experiments.sample_efficiency import drtune, half_depth


def runs(budget: Budget) -> list[RunSpec]:
    settings = {"reward": "symmetry", "learning_rate": 2e-3}
    return [RunSpec(name, budget.steps, 0, settings) for name in (DRAFT_1, half_depth(budget), drtune(budget))]


def measure(runner: ExperimentRunner) -> list[Row]:
    rows: list[Row] = []
    for spec in runs(runner.budget):
        evaluations = runner.run(spec).evaluations
        for method, row in (("base", evaluations[0]), (spec.method, evaluations[-1])):
            scores = rename_columns(row)
            line = {"method": method, "symmetry": row["symmetry"], "name_accuracy": scores["name_accuracy"]}
            rows.append(line | {"diversity": scores["diversity"]})
    return [row for i, row in enumerate(rows) if row["method"] != "base" or i == 0]


EXPERIMENT = Experiment(
    title="Symmetry",
    question="Can gradients through the last step only teach the model symmetry?",
    runs=runs,
    measure=measure,
    table=lambda rows: rows,
    panels=[Panel("symmetry", "name_accuracy", kind="scatter")],
    repeated=False,
)
