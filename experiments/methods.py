"""Methods with reward gradients compared, and their images when they train too long."""

from __future__ import annotations

from itertools import product

import numpy as np

from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim, curve_job
from experiments.runner import DRAFT_1, DRAFT_LV, Row, RunSpec
from experiments.statistics import paired_effect, ratio_effect

MARGIN = 0.1


def methods(budget: Budget) -> dict[str, str]:
    """Return the methods. ReFL's m is the paper's 20 of 50 steps, scaled."""
    steps = budget.num_inference_steps
    quarter = max(2, steps // 4)
    return {
        "DRaFT-1": DRAFT_1,
        "DRaFT-LV": DRAFT_LV,
        "DRaFT": "draft",
        "ReFL": f"refl(m={max(2, round(0.4 * steps))})",
        "AlignProp": f"alignprop(cut=uniform, m={steps // 2})",
        "DRTune": f"drtune(k={quarter}, m={quarter})",
        "LeapAlign": "leapalign",
    }


def jobs(budget: Budget) -> list[Job]:
    specs = [
        (name, RunSpec(method, budget.long, seed))
        for seed, (name, method) in product(range(budget.few_seeds), methods(budget).items())
    ]
    return [curve_job("methods", spec, method=name) for name, spec in specs]


def claims(rows: list[Row]) -> list[Claim]:
    found, updates = [], sorted({row["update"] for row in rows})
    middle, last = updates[len(updates) // 2], updates[-1]
    one, base = (by_seed(rows, "reward", method="DRaFT-1", update=update) for update in (middle, 0))
    unit = float(np.mean(one) - np.mean(base))
    for name in dict.fromkeys(row["method"] for row in rows if row["method"] != "DRaFT-1"):
        effect = paired_effect(by_seed(rows, "reward", method=name, update=middle), one, unit)
        text = f"{name} gains more than DRaFT-1 in {middle} updates"
        found.append(claim(text, effect, MARGIN, form="{:+.0%} of its gain"))
    names = list(dict.fromkeys(row["method"] for row in rows))
    spreads = [np.mean([by_seed(rows, "diversity", method=n, update=u) for n in names], 0) for u in (last, 0)]
    text = f"trained too long ({last} updates), all methods lose diversity (mean over methods)"
    return [*found, claim(text, ratio_effect(list(spreads[0]), list(spreads[1])), 1.05, -1, "{:.3g}×")]


def answer(rows: list[Row]) -> list[str]:
    last, sentences = max(row["update"] for row in rows), []
    for name in dict.fromkeys(row["method"] for row in rows):
        reward, names, spread = (
            np.mean(by_seed(rows, column, method=name, update=last))
            for column in ("reward", "name_accuracy", "diversity")
        )
        sentences.append(f"{name}: reward {reward:.3g}, names {names:.0%}, diversity {spread:.3g}")

    base = np.mean(by_seed(rows, "diversity", update=0))
    return [
        f"After {last} updates: {'; '.join(sentences)}. The base model's diversity is {base:.3g}.",
    ]


EXPERIMENT = Experiment(
    title="Methods",
    question="Which method with reward gradients gains most in equal updates, and what do too many of them do?",
    setting="All methods have one learning rate. An update of DRaFT-LV scores three times as many images, and one of "
    "DRaFT takes several times as long: this compares updates, not costs.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[Panel("update", y) for y in ("reward", "name_accuracy", "diversity")],
    columns=3,
)
