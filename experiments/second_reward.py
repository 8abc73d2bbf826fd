"""A second reward trained after the first: how much of the first is retained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from draftune.evaluation.metrics import evaluate
from draftune.experimental.distill import distill_lora
from draftune.lora import FILE_NAME
from draftune.prompts import load_prompts
from draftune.rewards import load_reward
from draftune.runs.merge import merge_loras
from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim
from experiments.lora_merging import ORANGE
from experiments.runner import DRAFT_1, ExperimentRunner, Row, RunSpec, short_scores, slug, spaced
from experiments.statistics import mean_effect, paired_effect

WEIGHTS = (0.1, 1.0)
"""Weights of the retention. The second reward's standard deviation in a batch is 0.03."""
RANK, TRAJECTORIES = 8, 20
"""Rank of the distilled LoRA, and batches of samples for its training."""
BASE, FIRST, PLAIN, HALF = "base model", "first reward only", "continued", "continued, half weight"
RETAINED = tuple(f"retained at {weight:g}" for weight in WEIGHTS)
DISTILLED = f"{RETAINED[0]}, distilled"
VARIANTS = (BASE, FIRST, PLAIN, HALF, *RETAINED, DISTILLED)


def split_names(names: Sequence[str], count: int) -> dict[str, list[str]]:
    """Return `count` names of faces and `count` other names, evenly spaced."""
    faces = [name for name in names if "face" in name.split()]
    groups = {"faces": faces, "things": [name for name in names if name not in faces]}
    return {key: spaced(group, count) for key, group in groups.items()}


def label(variant: str, seed: int) -> str:
    return f"second-reward {variant} seed={seed}"


def lora(variant: str, seed: int, runner: ExperimentRunner) -> Path | None:
    """Return a variant's LoRA, from runs that are made when they are first needed; None for the base model."""
    budget, names = runner.budget, split_names(load_prompts("emoji"), runner.budget.train_prompts)

    def second(**settings: Any) -> Path:
        settings = {"reward": ORANGE, "prompts": names["things"], "init_lora": str(first), **settings}
        return runner.lora(RunSpec(DRAFT_1, budget.short[-1:], seed, settings, label(variant, seed)))

    def source(name: str) -> Path:
        path = lora(name, seed, runner)
        assert path is not None
        return path

    if variant == BASE:
        return None
    first = runner.lora(RunSpec(DRAFT_1, budget.short, seed))
    if variant == FIRST:
        return first
    if variant == PLAIN:
        return second()
    if variant in RETAINED:
        faces = runner.prompt_file("second-reward-faces", names["faces"])
        return second(retain_prompts=faces, retain_weight=WEIGHTS[RETAINED.index(variant)])
    folder = runner.folder / slug(label(variant, seed))
    with runner.lock(folder.name):
        if not (folder / FILE_NAME).is_file() and not (folder / "lora" / FILE_NAME).is_file():
            if variant == HALF:
                merge_loras([(first, 0.5), (source(PLAIN), 0.5)], folder)
            else:
                prompts: list[str | list[str]] = [names["things"], names["faces"]]
                paths = min(TRAJECTORIES, budget.short[-1])
                distill_lora(str(source(RETAINED[0])), prompts, folder, RANK, num_trajectories=paths, seed=seed)
    return folder


def jobs(budget: Budget) -> list[Job]:
    spec = RunSpec(DRAFT_1, budget.short)
    images = 2 * budget.eval_prompts * budget.grid_images
    cost = lambda runner: 2 * spec.steps * runner.cost(DRAFT_1)["seconds"]  # noqa: E731
    return [
        Job(f"second reward {variant} seed={seed}", partial(evaluate_variant, variant, seed), (), images, cost)
        for seed, variant in product(range(budget.few_seeds), VARIANTS)
    ]


def evaluate_variant(variant: str, seed: int, runner: ExperimentRunner) -> list[Row]:
    """Return both rewards and the name accuracy on faces and on things that no run trained on."""
    folder, count = lora(variant, seed, runner), runner.budget.grid_images
    model, reward = runner.model({"default": folder} if folder else {}), runner.reward + load_reward(ORANGE)
    row: Row = {"variant": variant, "seed": seed}
    for group, names in split_names(load_prompts("emoji-common"), runner.budget.eval_prompts).items():
        scores = evaluate(runner.sampler(model), reward, runner.judges, names, count, model.device)
        row |= {f"{group}_reward": scores.scores[runner.reward.label], f"{group}_orange": scores.scores["color"]}
        row |= {f"{group}_name_accuracy": short_scores(scores, reward)["name_accuracy"]}
    return [row]


def share(rows: list[Row], variant: str, column: str, start: str, end: str) -> list[float]:
    """Return a variant's share of the way from one variant to another, of each seed."""
    low, high, own = (by_seed(rows, column, variant=name) for name in (start, end, variant))
    return [(c - a) / (b - a) for a, b, c in zip(low, high, own, strict=True)]


def retained(rows: list[Row], variant: str) -> list[float]:
    """Return the retained share of the first reward's gain on faces."""
    return share(rows, variant, "faces_reward", BASE, FIRST)


def gained(rows: list[Row], variant: str) -> list[float]:
    """Return the share of the second reward's gain on things, relative to plain continued training."""
    return share(rows, variant, "things_orange", FIRST, PLAIN)


def averages(rows: list[Row], variant: str) -> list[float]:
    return [(a + b) / 2 for a, b in zip(retained(rows, variant), gained(rows, variant), strict=True)]


def claims(rows: list[Row]) -> list[Claim]:
    kept, plain = retained(rows, RETAINED[0]), retained(rows, PLAIN)
    means = {name: averages(rows, name) for name in (RETAINED[0], PLAIN, DISTILLED)}
    form = "{:+.0%}"
    return [
        claim("FOSTER: retention forgets less than continued training", paired_effect(kept, plain), 0.1, form=form),
        claim("its mean of both shares is higher", paired_effect(means[RETAINED[0]], means[PLAIN]), 0.1, form=form),
        claim("distillation loses some of it", paired_effect(means[DISTILLED], means[RETAINED[0]]), 0.1, -1, form),
    ]


def answer(rows: list[Row]) -> list[str]:
    parts = [
        f"{name} {mean_effect(retained(rows, name)).value:.0%} and {mean_effect(gained(rows, name)).value:.0%}"
        for name in VARIANTS[2:]
    ]
    return [
        "First reward retained on faces (share of the first run's gain) and second gained on things (of the gain of "
        f"`continued`): {'; '.join(parts)}."
    ]


EXPERIMENT = Experiment(
    title="Second reward",
    question="Can a model learn a second reward without losing the first?",
    setting="First `emoji_aesthetic` on 45 names, then `color(target=orange)` on 45 names of things, DRaFT-1; images "
    "of faces should stay as they were. All evaluated names are new.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[
        Panel(f"{group}_orange", "faces_reward", "variant", "variant", "points", xlabel=f"second reward, {group}")
        for group in ("things", "faces")
    ],
)
