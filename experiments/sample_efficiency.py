"""Reward against scored images and against training time, for each method."""

from __future__ import annotations

from functools import partial

from experiments.budget import Budget
from experiments.report import Experiment, Panel, aggregate
from experiments.runner import DRAFT_1, DRAFT_LV, ExperimentRunner, Row, RunSpec, evaluation_rows


def half_depth(budget: Budget) -> str:
    """Return DRaFT-K with gradients through half of the sampling steps."""
    return f"draft_k(k={budget.num_inference_steps // 2})"


def drtune(budget: Budget) -> str:
    quarter = max(2, budget.num_inference_steps // 4)
    return f"drtune(k={quarter}, m={quarter})"


def gradient_methods(budget: Budget) -> list[str]:
    """Return methods that use the reward's gradient. ReFL's m is the paper's 20 of 50 steps, scaled."""
    steps = budget.num_inference_steps
    return [
        DRAFT_1,
        DRAFT_LV,
        half_depth(budget),
        "draft",
        f"refl(m={max(2, round(0.4 * steps))})",
        f"alignprop(cut=uniform, m={steps // 2})",
        drtune(budget),
        "leapalign",
    ]


def ddpo(budget: Budget, seed: int) -> RunSpec:
    settings = {"batch_size": 8, "gradient_accumulation_steps": budget.ddpo_batches}
    return RunSpec("ddpo(min_count=4, timestep_fraction=0.25)", budget.ddpo_updates, seed, settings)


def runs(budget: Budget) -> list[RunSpec]:
    seeds = range(budget.seeds)
    specs = [RunSpec(method, budget.steps, seed) for seed in seeds for method in gradient_methods(budget)]
    return specs + [ddpo(budget, seed) for seed in seeds]


def measure(runner: ExperimentRunner) -> list[Row]:
    rows = []
    for spec in runs(runner.budget):
        # One update is timed separately: another process may have slowed the run down.
        batches = spec.settings.get("gradient_accumulation_steps", 1)
        seconds = runner.cost(spec.method, spec.settings.get("batch_size", 4))["seconds"] * batches
        rows += [row | {"seconds": row["update"] * seconds} for row in evaluation_rows(spec, runner.run(spec))]
    return rows


SCORES = ("reward", "p_3d", "name_accuracy", "diversity")
EXPERIMENT = Experiment(
    title="Sample efficiency",
    question="How many scored images, and seconds, does each method need?",
    runs=runs,
    measure=measure,
    table=partial(aggregate, by="method", columns=("update", *SCORES, "reward_queries", "seconds")),
    panels=[
        Panel(x, y, log=True, xlabel=label)
        for y in ("reward", "p_3d")
        for x, label in (("reward_queries", ""), ("seconds", "seconds of training"))
    ],
)
