"""Rewards without a gradient: zeroth-order estimates, DDPO, and smoothed thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from experiments.budget import Budget
from experiments.optimizers import MIN_NAME_ACCURACY
from experiments.report import Experiment, Panel, aggregate
from experiments.runner import DRAFT_1, DRAFT_LV, JUDGES, REWARD, ExperimentRunner, Row, RunSpec, evaluation_rows

FILE_SIZE = "jpeg_file_size"
LEVEL = 6.0
THRESHOLD = f"threshold({REWARD}, at={LEVEL:g})"
DDPO = "ddpo(min_count=4, timestep_fraction=0.25)"
RATES = (1e-3, 3e-3, 1e-2)
"""DDPO's learning rates. At 0.03 no image kept its name, measured with the loss summed over elements and steps."""
IMAGES = f"zeroth_order({FILE_SIZE}, coordinates=4, perturbation_std=0.02, basis=high_pass, size=2)"
LATENTS = f"zeroth_order({FILE_SIZE}, coordinates=8, perturbation_std=0.1, size=2, space=latent)"


@dataclass(frozen=True)
class Variant:
    """A way to train on a reward without a gradient."""

    name: str
    method: str
    reward: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, seed: int, budget: Budget) -> RunSpec:
        judges = f"{JUDGES} + {THRESHOLD} + {REWARD}" if self in THRESHOLDS else f"{JUDGES} + {FILE_SIZE}"
        settings = {"reward": self.reward, "eval_rewards": judges, **self.settings}
        return RunSpec(self.method, budget.steps, seed, settings)


def annealed(temperature: float, decay: float) -> str:
    """Return the threshold reward with a smoothed gradient."""
    return f"threshold({REWARD}, at={LEVEL:g}, temperature={temperature}, decay={decay})"


SIZES = (
    Variant("estimated in images, DRaFT-1", DRAFT_1, IMAGES),
    Variant("estimated in latents, DRaFT-1", DRAFT_1, LATENTS),
    Variant("estimated in images, DRaFT-LV", DRAFT_LV, IMAGES),
    Variant("estimated in latents, DRaFT-LV", DRAFT_LV, LATENTS),
    Variant("differentiable JPEG, DRaFT-1", DRAFT_1, "jpeg_compressibility"),
    Variant("differentiable JPEG, DRaFT-LV", DRAFT_LV, "jpeg_compressibility"),
)
THRESHOLDS = (
    # Temperatures of 0.15 and 0.6 standard deviations of `emoji_aesthetic` over the base model's images, which is 2.
    Variant("threshold, constant width 0.15", DRAFT_1, annealed(0.3, 0.0)),
    Variant("threshold, width falls from 0.6", DRAFT_1, annealed(1.2, 0.5)),
    Variant("no threshold", DRAFT_1, REWARD),
)


def ddpo(rate: float, seed: int, budget: Budget) -> RunSpec:
    settings: dict[str, Any] = {"reward": FILE_SIZE, "eval_rewards": f"{JUDGES} + {FILE_SIZE}", "learning_rate": rate}
    half = max(1, budget.ddpo_updates // 2)
    settings |= {"batch_size": 8, "gradient_accumulation_steps": budget.ddpo_batches, "validation_steps": half}
    return RunSpec(DDPO, budget.ddpo_updates, seed, settings)


def search(budget: Budget) -> dict[float, RunSpec]:
    """Return the first half of DDPO's run with seed 0, for each learning rate."""
    specs = {rate: ddpo(rate, 0, budget) for rate in RATES[-budget.rates :]}
    return {rate: replace(spec, steps=spec.settings["validation_steps"]) for rate, spec in specs.items()}


def runs(budget: Budget) -> list[RunSpec]:
    """Return all runs except DDPO's full ones, whose learning rate depends on the search."""
    variants = [v.spec(seed, budget) for seed in range(budget.seeds) for v in (*SIZES, *THRESHOLDS)]
    return [*variants, *search(budget).values()]


def measure(runner: ExperimentRunner) -> list[Row]:
    budget, size = runner.budget, f"eval/{FILE_SIZE}"
    searched = {rate: runner.run(spec).final for rate, spec in search(budget).items()}
    valid = [rate for rate, row in searched.items() if row["eval/emoji_name_accuracy"] >= MIN_NAME_ACCURACY]
    rate = max(valid or searched, key=lambda rate: searched[rate][size])
    specs = {v.name: [v.spec(seed, budget) for seed in range(budget.seeds)] for v in (*SIZES, *THRESHOLDS)}
    specs[f"DDPO, learning rate {rate:g}"] = [ddpo(rate, seed, budget) for seed in range(budget.seeds)]
    columns = {f"eval/threshold({REWARD})": "above", f"eval/{REWARD}": "reward"}
    rows = []
    for name, spec in ((name, spec) for name, own in specs.items() for spec in own):
        result = runner.run(spec)
        for row, scores in zip(evaluation_rows(spec, result), result.evaluations, strict=True):
            row = {"variant": name, **{key: value for key, value in row.items() if key not in ("method", "reward")}}
            row |= {"kb": -scores[size]} if size in scores else {}
            rows.append(row | {short: scores[key] for key, short in columns.items() if key in scores})
    return rows


SCORES = ("kb", "above", "reward", "p_3d", "name_accuracy", "diversity")
EXPERIMENT = Experiment(
    title="Black-box rewards",
    question="What can be trained with rewards that give scores but no gradient?",
    runs=runs,
    measure=measure,
    table=partial(aggregate, by="variant", columns=("update", "reward_queries", *SCORES), ci="kb above"),
    panels=[
        Panel("reward_queries", "kb", by="variant", log=True, ylabel="kB of the JPEG file"),
        Panel("reward_queries", "above", by="variant", log=True, ylabel=f"share of images above {LEVEL:g}"),
    ],
)
