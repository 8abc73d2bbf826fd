"""DRaFT-1 for four timestep spacings: how much the last sampling step can change the image."""

from __future__ import annotations

from experiments.budget import Budget
from experiments.report import Experiment, Panel
from experiments.runner import DRAFT_1, ExperimentRunner, Row, RunSpec, evaluation_rows


def runs(budget: Budget) -> list[RunSpec]:
    return [
        RunSpec(DRAFT_1, budget.steps, 0, {"timestep_spacing": spacing, "set_alpha_to_one": to_clean})
        for spacing in ("leading", "trailing")
        for to_clean in (False, True)
    ]


def last_step_gain(runner: ExperimentRunner, spacing: str, to_clean: bool) -> float:
    """Compute d x_0 / d v of the last DDIM step at a fixed network input; the embedded model predicts v."""
    model = runner.model()
    model.set_sampler_options(spacing, to_clean)
    step = model.schedule(runner.budget.num_inference_steps).steps[-1]
    return step.sigma_next * step.alpha - step.alpha_next * step.sigma


def measure(runner: ExperimentRunner) -> list[Row]:
    rows = []
    for spec in runs(runner.budget):
        result, (spacing, to_clean) = runner.run(spec), spec.settings.values()
        first, *_, last = evaluation_rows(spec, result)
        row: Row = {"spacing": f"{spacing}, {'to clean' if to_clean else 'not to clean'}", **spec.settings}
        row |= {"last_step_gain": last_step_gain(runner, spacing, to_clean)}
        row |= {"first_grad_norm": result.metrics[0]["grad_norm"], "base_reward": first["reward"]}
        row |= {"reward": last["reward"], "reward_gain": last["reward"] - first["reward"]}
        rows.append(row | {key: last[key] for key in ("p_3d", "name_accuracy")})
    return rows


EXPERIMENT = Experiment(
    title="Timestep spacing",
    question="At which timestep should the last sampling step be?",
    runs=runs,
    measure=measure,
    table=lambda rows: [{key: value for key, value in row.items() if key != "spacing"} for row in rows],
    panels=[Panel("spacing", y, by="spacing", kind="bar") for y in ("first_grad_norm", "reward_gain")],
    repeated=False,
)
