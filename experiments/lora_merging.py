"""Two LoRAs of different rewards, added with a grid of weights."""

from __future__ import annotations

import numpy as np

from draftune.lora import set_lora_scales
from draftune.rewards import load_reward
from experiments.budget import Budget
from experiments.report import Experiment, Panel
from experiments.runner import DRAFT_LV, ExperimentRunner, Row, RunSpec, rename_columns

ORANGE = "color(target=orange)"


def runs(budget: Budget) -> list[RunSpec]:
    # No other experiment makes runs of these seeds longer: the LoRA is from the last update.
    return [RunSpec(DRAFT_LV, budget.steps, 1), RunSpec(DRAFT_LV, budget.steps, 0, {"reward": ORANGE})]


def evaluate_grid(runner: ExperimentRunner) -> list[dict[str, float]]:
    """Evaluate the sum of both LoRAs for each pair of weights."""
    style, orange = (runner.lora(spec) for spec in runs(runner.budget))
    model, reward, rows = runner.model({"style": style, "orange": orange}), runner.reward + load_reward(ORANGE), []
    weights = [float(w) for w in np.linspace(0, 1, runner.budget.grid)]
    for a, b in ((a, b) for a in weights for b in weights):
        set_lora_scales(model, {"style": a, "orange": b})
        scores = runner.evaluate(model, reward)
        short = rename_columns(scores)
        color = next(value for key, value in scores.items() if key.startswith("color"))
        weighted = {"style_weight": a, "orange_weight": b, "reward": short["reward"], "color": color}
        rows.append(weighted | {"name_accuracy": short["name_accuracy"]})
    return rows


def measure(runner: ExperimentRunner) -> list[Row]:
    return list(runner.cached("lora-merging", lambda: evaluate_grid(runner)))


EXPERIMENT = Experiment(
    title="LoRA merging",
    question="Does the sum of two LoRAs keep the gains of both?",
    runs=runs,
    measure=measure,
    table=lambda rows: [row for row in rows if {row["style_weight"], row["orange_weight"]} <= {0.0, 1.0}],
    panels=[
        Panel("style_weight", y, by="orange_weight", xlabel="weight of the style LoRA", ylabel=label)
        for y, label in (("reward", ""), ("color", "orange reward"), ("name_accuracy", ""))
    ],
    columns=3,
    repeated=False,
)
