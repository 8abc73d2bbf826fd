"""Last-step and deeper gradients for a reward of the image's layout: left-right symmetry."""

from __future__ import annotations

from itertools import product

from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim, curve_job
from experiments.runner import DRAFT_1, Row, RunSpec
from experiments.statistics import mean_effect, paired_effect


def jobs(budget: Budget) -> list[Job]:
    steps = budget.num_inference_steps
    quarter = max(2, steps // 4)
    methods = {
        "DRaFT-1": DRAFT_1,
        f"DRaFT-{steps // 2}": f"draft_k(k={steps // 2})",
        "DRTune": f"drtune(k={quarter}, m={quarter})",
    }
    settings = {"reward": "symmetry", "learning_rate": 2e-3}
    return [
        curve_job("symmetry", RunSpec(method, budget.short, seed, settings), method=name)
        for seed, (name, method) in product(range(budget.few_seeds), methods.items())
    ]


def names_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def claims(rows: list[Row]) -> list[Claim]:
    last, found = max(row["update"] for row in rows), []
    one, base = (by_seed(rows, "reward", method="DRaFT-1", update=update) for update in (last, 0))
    found.append(claim("gradients of the last step alone teach symmetry", paired_effect(one, base), 0.02))

    effect = paired_effect(by_seed(rows, "reward", method="DRTune", update=last), one)
    return [*found, claim("gradients of earlier steps (DRTune) teach symmetry better than DRaFT-1", effect, 0.02)]


def answer(rows: list[Row]) -> list[str]:
    last = max(row["update"] for row in rows)
    parts = []
    for name in names_of(rows):
        symmetry, names, spread = (
            mean_effect(by_seed(rows, column, method=name, update=last)).value
            for column in ("reward", "name_accuracy", "diversity")
        )
        parts.append(f"{name} {symmetry:.3g} (names {names:.0%}, diversity {spread:.3g})")
    base = mean_effect(by_seed(rows, "reward", method="DRaFT-1", update=0)).value
    return [f"From a symmetry of {base:.3g}, {last} updates reach: {'; '.join(parts)}."]


EXPERIMENT = Experiment(
    title="Symmetry",
    question="Can gradients through the last step only teach the model symmetry?",
    setting="The reward is the symmetry of the image with its mirror image; learning rate 2e-3. DRTune's paper reports "
    "that only early steps teach it.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[Panel("update", "reward", ylabel="symmetry"), Panel("reward", "name_accuracy", key="update")],
)
