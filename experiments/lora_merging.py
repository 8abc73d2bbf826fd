"""Two LoRAs of different rewards, added with a grid of weights."""

from __future__ import annotations

from functools import partial
from itertools import product

from draftune.lora import set_lora_scales
from draftune.rewards import load_reward
from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim
from experiments.runner import DRAFT_LV, ExperimentRunner, Row, RunSpec
from experiments.statistics import Effect, mean_effect

ORANGE = "color(target=orange)"
WEIGHTS = (0.0, 0.5, 1.0)


def specs(seed: int, budget: Budget) -> tuple[RunSpec, RunSpec]:
    settings = {"reward": ORANGE}
    return RunSpec(DRAFT_LV, budget.short, seed), RunSpec(DRAFT_LV, budget.short, seed, settings)


def jobs(budget: Budget) -> list[Job]:
    images = len(WEIGHTS) ** 2 * budget.grid_images * budget.eval_prompts
    return [
        Job(f"merging seed={seed}", partial(evaluate_grid, seed), specs(seed, budget), images)
        for seed in range(budget.few_seeds)
    ]


def evaluate_grid(seed: int, runner: ExperimentRunner) -> list[Row]:
    """Evaluate the sum of both LoRAs for each pair of weights."""
    style, orange = (runner.lora(spec) for spec in specs(seed, runner.budget))
    model, color, rows = runner.model({"style": style, "orange": orange}), load_reward(ORANGE), []
    for a, b in product(WEIGHTS, repeat=2):
        set_lora_scales(model, {"style": a, "orange": b})
        scores = runner.evaluate(model, runner.reward + color, seed, runner.budget.grid_images)
        parts = {name: scores.pop(f"reward/{r.label}") for name, r in (("reward", runner.reward), ("color", color))}
        rows.append({"seed": seed, "style_weight": a, "orange_weight": b, **scores, **parts})
    return rows


def share(rows: list[Row], column: str, own: str, other: str) -> Effect:
    """Return the share of a LoRA's gain that is left when the other is added with weight 1."""
    base, alone, both = (by_seed(rows, column, **{own: a, other: b}) for a, b in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)))
    return mean_effect([(c - a) / (b - a) for a, b, c in zip(base, alone, both, strict=True)])


def shares(rows: list[Row]) -> dict[str, Effect]:
    return {
        "style": share(rows, "reward", "style_weight", "orange_weight"),
        "color": share(rows, "color", "orange_weight", "style_weight"),
    }


def claims(rows: list[Row]) -> list[Claim]:
    return [
        claim(f"the sum of two LoRAs keeps a part of the gain, {name}", effect, 0.1, form="{:.0%}")
        for name, effect in shares(rows).items()
    ]


def answer(rows: list[Row]) -> list[str]:
    style, color = shares(rows).values()
    names = mean_effect(by_seed(rows, "name_accuracy", style_weight=1.0, orange_weight=1.0))
    return [
        f"Added with weight 1 each, they keep {style.value:.0%} of the gain in style and {color.value:.0%} of that in "
        f"color. The judge recognizes {names.value:.0%} of the names.",
    ]


EXPERIMENT = Experiment(
    title="LoRA merging",
    question="Does the sum of two LoRAs keep the gains of both?",
    setting="DRaFT-LV on `emoji_aesthetic` and on `color(target=orange)`, 40 updates each; 64 images for each pair of "
    "weights.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[
        Panel("style_weight", y, "orange_weight", xlabel="weight of the style LoRA", ylabel=label)
        for y, label in (("reward", ""), ("color", "orange reward"), ("name_accuracy", ""))
    ],
    columns=3,
)
