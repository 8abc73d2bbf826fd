"""The LoRA scale against early stopping and a KL penalty: diversity and evaluation rewards at equal reward."""

from __future__ import annotations

from draftune.lora import set_lora_scales
from experiments.budget import Budget
from experiments.report import Experiment, Panel
from experiments.runner import DRAFT_LV, ExperimentRunner, Row, RunSpec, evaluation_rows, rename_columns

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
BETAS = (1.0, 10.0)


def runs(budget: Budget) -> list[RunSpec]:
    kl = [RunSpec(f"kl({DRAFT_LV}, beta={beta})", budget.long_steps) for beta in BETAS]
    return [RunSpec(DRAFT_LV, budget.long_steps), *kl]


def sweep(runner: ExperimentRunner) -> list[dict[str, float]]:
    """Evaluate the LoRA of the longest run at each scale."""
    model, scores = runner.model({"lora": runner.lora(runs(runner.budget)[0])}), []
    for scale in SCALES:
        set_lora_scales(model, {"lora": scale})
        scores.append(rename_columns(runner.evaluate(model)))
    return scores


def measure(runner: ExperimentRunner) -> list[Row]:
    specs = runs(runner.budget)
    sweep_scores = runner.cached("lora-scale", lambda: sweep(runner))
    rows = [{"knob": "LoRA scale", "value": s, **row} for s, row in zip(SCALES, sweep_scores, strict=True)]
    for row in evaluation_rows(specs[0], runner.run(specs[0])):
        rows.append({"knob": "early stopping", "value": row["update"], **{key: row[key] for key in sweep_scores[0]}})
    for beta, spec in zip((0.0, *BETAS), specs, strict=True):
        rows.append({"knob": "KL penalty", "value": beta, **rename_columns(runner.run(spec).final)})
    return rows


EXPERIMENT = Experiment(
    title="LoRA scale",
    question="Does the LoRA scale trade reward against diversity better than early stopping or a KL penalty?",
    runs=runs,
    measure=measure,
    table=lambda rows: rows,
    panels=[
        Panel("value", "reward", by="knob", where={"knob": "LoRA scale"}, xlabel="LoRA scale"),
        Panel("reward", "diversity", by="knob"),
        Panel("reward", "p_3d", by="knob"),
    ],
    columns=3,
    repeated=False,
)
