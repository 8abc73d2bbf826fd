"""Remedies against over-optimization: judge and diversity against reward, and a default chosen by a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from draftune.lora import set_lora_scales
from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, claim, curve_job, curves_by_seed
from experiments.runner import DRAFT_1, REWARD, ExperimentRunner, Row, RunSpec
from experiments.statistics import Effect, mean_effect, paired_effect

SCALES = (0.25, 0.5, 0.75, 1.0)
EARLY, SCALE = "early stopping", "LoRA scale"
KEPT = 0.97
"""Share of the base model's recognized names that the default must keep."""
MARGIN = 0.03


@dataclass(frozen=True)
class Remedy:
    """A way of training; its curve over updates is its frontier."""

    name: str
    method: str = DRAFT_1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, seed: int, budget: Budget) -> RunSpec:
        method = self.method.format(k=max(2, budget.num_inference_steps // 4))
        return RunSpec(method, budget.long, seed, self.settings, metric=REWARD)


REMEDIES = (
    Remedy(EARLY),
    Remedy("KL, beta 0.3", f"kl({DRAFT_1}, beta=0.3)"),
    Remedy("KL, beta 3", f"kl({DRAFT_1}, beta=3)"),
    Remedy("Adjoint Matching", "adjoint_matching(scale=100, k={k})"),
    Remedy("DRTune on steps 0.0-0.5", "drtune(k={k}, m=1)", {"lora_steps": "0.0-0.5"}),
    Remedy("DRTune on steps 0.5-1.0", "drtune(k={k}, m=1)", {"lora_steps": "0.5-1.0"}),
    Remedy("sharpness-aware reward", settings={"reward": f"sharpness_aware({REWARD}, rho=0.5)"}),
    Remedy("sum with CLIP", settings={"reward": f"{REWARD} + 10*emoji_clip"}),
)


def jobs(budget: Budget) -> list[Job]:
    made = []
    for seed in range(budget.seeds):
        made += [curve_job("frontier", remedy.spec(seed, budget), remedy=remedy.name) for remedy in REMEDIES]
        images = len(SCALES) * budget.images_per_prompt * budget.eval_prompts
        made.append(
            Job(f"frontier {SCALE} seed={seed}", partial(scales, REMEDIES[0].spec(seed, budget)), images=images)
        )
    return made


def scales(spec: RunSpec, runner: ExperimentRunner) -> list[Row]:
    """Evaluate the last LoRA of a run at several scales."""
    model, rows = runner.model({"lora": runner.lora(spec)}), [{"scale": 0.0, **runner.scores(spec, None)}]
    for scale in SCALES:
        set_lora_scales(model, {"lora": scale})
        rows.append({"scale": scale, **runner.evaluate(model, runner.reward, spec.seed)})
    # The points of a curve have the key `update`, here in percent of the full scale.
    return [{"remedy": SCALE, "seed": spec.seed, "update": round(100 * row["scale"]), **row} for row in rows]


def at_reward(curve: list[Row], reward: float, column: str) -> float:
    """Return a judge's score where a curve first has a reward, interpolated over its rises to new highest rewards."""
    rising = [row for i, row in enumerate(curve) if all(row["reward"] > earlier["reward"] for earlier in curve[:i])]
    return float(np.interp(reward, [row["reward"] for row in rising], [row[column] for row in rising]))


def at_equal_reward(rows: list[Row], remedy: str, column: str) -> Effect:
    """Return a judge's score under a remedy minus that under early stopping, at the highest reward that both have.

    It is at most `level`.
    """
    pairs = []
    for own, early in zip(curves_by_seed(rows, remedy=remedy), curves_by_seed(rows, remedy=EARLY), strict=True):
        reward = min(level(rows), *(max(row["reward"] for row in curve) for curve in (own, early)))
        pairs.append((at_reward(own, reward, column), at_reward(early, reward, column)))
    return paired_effect([own for own, _ in pairs], [early for _, early in pairs])


def level(rows: list[Row]) -> float:
    """Return the reward of the comparison: two thirds of the way that early stopping's mean curve makes."""
    curves = curves_by_seed(rows, remedy=EARLY)
    start, end = (np.mean([curve[i]["reward"] for curve in curves]) for i in (0, -1))
    return float(start + 2 / 3 * (end - start))


def settings_of(rows: list[Row]) -> list[Row]:
    """Return the mean scores of each remedy's points over seeds, with `names` relative to the base model's."""
    keys = dict.fromkeys((row["remedy"], row["update"]) for row in rows)
    base = np.mean([row["name_accuracy"] for row in rows if row["remedy"] == EARLY and not row["update"]])
    means = []
    for remedy, update in keys:
        own = [row for row in rows if (row["remedy"], row["update"]) == (remedy, update)]
        mean = {
            column: float(np.mean([row[column] for row in own]))
            for column in ("reward", "name_accuracy", "diversity", "p_3d")
        }
        means.append({"remedy": remedy, "update": update, "kept": mean["name_accuracy"] / float(base), **mean})
    return means


def default(rows: list[Row]) -> Row:
    """Return the point with the highest mean reward among those that keep enough names."""
    return max((row for row in settings_of(rows) if row["kept"] >= KEPT), key=lambda row: row["reward"])


def compared() -> list[str]:
    return [SCALE, *(remedy.name for remedy in REMEDIES[1:])]


def claims(rows: list[Row]) -> list[Claim]:
    curves = curves_by_seed(rows, remedy=SCALE)
    rises = [min(b["reward"] - a["reward"] for a, b in pairwise(curve)) for curve in curves]
    found = [claim("the reward rises in each step of the LoRA scale (smallest rise)", mean_effect(rises), 0.0)]
    for remedy in compared():
        effect = at_equal_reward(rows, remedy, "name_accuracy")
        text = f"{remedy} keeps more names than early stopping at equal reward"
        found.append(claim(text, effect, MARGIN, form="{:+.1%}"))
    return found


def answer(rows: list[Row]) -> list[str]:
    best, points = default(rows), settings_of(rows)
    base, value = points[0], f"{best['update']} updates"
    if best["remedy"] == SCALE:
        value = f"{best['update'] / 100:g}"
    spreads = [f"{remedy} {at_equal_reward(rows, remedy, 'diversity').full()}" for remedy in compared()]
    slow = [r for r in compared() if max(p["reward"] for p in points if p["remedy"] == r) < level(rows)]
    return [
        f"Default by the rule, the highest reward among the points that keep {KEPT:.0%} of the base model's recognized "
        f"names: {best['remedy']} at {value}, with reward {best['reward']:.3g}, names {best['name_accuracy']:.1%} and "
        f"diversity {best['diversity']:.3g}. The base model has {base['reward']:.3g}, {base['name_accuracy']:.1%} and "
        f"{base['diversity']:.3g}. As the best of {len(points)} points, its figures are slightly too good.",
        f"Diversity minus that of early stopping at equal reward: {'; '.join(spreads)}.",
        f"The equal reward is {level(rows):.3g}, two thirds of early stopping's gain, or the highest that a remedy "
        f"reaches (lower for: {', '.join(slow) or 'none'}).",
    ]


EXPERIMENT = Experiment(
    title="Over-optimization",
    question="Which remedy keeps names and diversity at equal reward?",
    setting="All runs train on `emoji_aesthetic` by DRaFT-1 or as named. Curves are over updates, that of the LoRA "
    "scale over the scales of early stopping's last LoRA.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[Panel("reward", y, "remedy", key="update") for y in ("name_accuracy", "p_3d", "diversity")],
    columns=3,
)
