"""Scored images that DDPO needs for the reward that DRaFT-LV has after its first 120, on two rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim, curve_job, curves_by_seed
from experiments.runner import DRAFT_1, DRAFT_LV, REWARD, ExperimentRunner, Row, RunSpec
from experiments.statistics import Effect, factor_effect, paired_effect, queries_to_reach

DDPO = "ddpo(inner_epochs=4, timestep_fraction=0.25, min_count=16, buffer_size=16, adv_clip_max=10)"
"""Clip ranges, statistics of prompts and four optimizer steps for each set of images as in the authors' code.

kvablack/ddpo-pytorch, config/base.py and dgx.py. There a set has 256 images, and a step has a quarter of the images
instead of a quarter of the sampling steps.
"""
RATES = (3e-4, 1e-3, 3e-3)
SEARCH_SEED = 100
"""Seed of the search. The comparison has others, so that the choice does not favor a run."""
MIN_NAMES = 0.9
"""Share of the base model's recognized names that a learning rate must keep."""
PAPER = 200
MARGIN = 1.5
SHOWN = {"variant": ("DDPO", "DRaFT-1", "DRaFT-LV")}


@dataclass(frozen=True)
class Task:
    """A reward: as DRaFT trains on it, as DDPO does, and as both are evaluated."""

    name: str
    draft: str
    ddpo: str


TASKS = (
    Task("style", REWARD, REWARD),
    Task("JPEG", "jpeg_compressibility", "jpeg_file_size"),
)


def draft_spec(task: Task, method: str, seed: int, budget: Budget) -> RunSpec:
    settings = {} if task.draft == REWARD else {"reward": task.draft}
    return RunSpec(method, budget.short, seed, settings, metric=task.ddpo)


def ddpo_spec(task: Task, rate: float, seed: int, updates: tuple[int, ...], budget: Budget) -> RunSpec:
    settings = {"learning_rate": rate, "weight_decay": 1e-4, "reward": task.ddpo, "batch_size": 8}
    settings |= {"gradient_accumulation_steps": budget.ddpo_batches}
    return RunSpec(DDPO, updates, seed, settings, f"ddpo {task.name} rate={rate:g} seed={seed}")


def ddpo_updates(budget: Budget) -> list[int]:
    """Return the updates of DDPO with an evaluation: ever sparser ones, up to the limit of scored images."""
    last, updates = max(1, budget.ddpo_images // (8 * budget.ddpo_batches)), [budget.every]
    while updates[-1] < last:
        updates.append(updates[-1] + max(budget.every, updates[-1] // 5))
    return [update for update in updates if update < last] + [last]


def search_jobs(task: Task, budget: Budget) -> list[Job]:
    specs = [ddpo_spec(task, rate, SEARCH_SEED, (budget.search_updates,), budget) for rate in RATES]
    return [
        curve_job("ddpo-search", spec, task=task.name, variant="search", learning_rate=rate)
        for rate, spec in zip(RATES, specs, strict=True)
    ]


def best_rate(rows: list[Row]) -> float:
    """Return the learning rate with the highest final reward, among those that keep the names, if any does."""
    base, final = (next(row for row in rows if not row["update"]), [row for row in rows if row["update"]])
    kept = [row for row in final if row["name_accuracy"] >= MIN_NAMES * base["name_accuracy"]]
    return float(max(kept or final, key=lambda row: row["reward"])["learning_rate"])


def chase(task: Task, seed: int, target: Job, search: list[Job], runner: ExperimentRunner) -> list[Row]:
    """Train DDPO until an evaluation is above the target's first one, or to the limit of scored images."""
    rate = best_rate([row for job in search for row in job.rows(runner)])
    goal, updates = target.rows(runner)[1]["reward"], ddpo_updates(runner.budget)
    curve: list[Row] = []
    for count in range(1, len(updates) + 1):
        curve = runner.curve(ddpo_spec(task, rate, seed, tuple(updates[:count]), runner.budget))
        if curve[-1]["reward"] >= goal:
            break
    return [{"task": task.name, "variant": "DDPO", "learning_rate": rate, **row} for row in curve]


def jobs(budget: Budget) -> list[Job]:
    made: list[Job] = []
    for task in TASKS:
        search = search_jobs(task, budget)
        made += search
        for seed in range(budget.seeds):
            names = {"DRaFT-LV": DRAFT_LV, "DRaFT-1": DRAFT_1}
            specs = {name: draft_spec(task, method, seed, budget) for name, method in names.items()}
            own = [curve_job("efficiency", spec, task=task.name, variant=name) for name, spec in specs.items()]
            longest = [ddpo_spec(task, RATES[1], seed, tuple(ddpo_updates(budget)), budget)]
            name = f"efficiency {task.name} DDPO seed={seed}"
            made += [*own, Job(name, partial(chase, task, seed, own[0], search), longest)]
    # DDPO needs the results of the other jobs.
    return sorted(made, key=lambda job: "DDPO" in job.name)


def factor(rows: list[Row], task: str) -> Effect:
    """Return the factor between the scored images of DDPO and of DRaFT-LV for the reward of its first evaluation."""
    drafts, curves = (curves_by_seed(rows, task=task, variant=name) for name in ("DRaFT-LV", "DDPO"))
    reached = [
        queries_to_reach([r["reward_queries"] for r in curve], [r["reward"] for r in curve], draft[1]["reward"])
        for draft, curve in zip(drafts, curves, strict=True)
    ]
    needed = [float(draft[1]["reward_queries"]) for draft in drafts]
    # A reward that the base model has already says nothing.
    first = [queries or math.nan for queries, _ in reached]
    return factor_effect(first, needed, [late for _, late in reached])


def claims(rows: list[Row]) -> list[Claim]:
    found = []
    for task in TASKS:
        text = f"DDPO needs more scored images than DRaFT-LV for its reward after 120, {task.name} (paper: >{PAPER}×)"
        found.append(claim(text, factor(rows, task.name), MARGIN, form="{:.3g}×"))
    return found


def answer(rows: list[Row]) -> list[str]:
    sentences = []
    for task in TASKS:
        effect, last = factor(rows, task.name), max(r["update"] for r in rows if r["variant"] == "DRaFT-LV")
        lines = curves_by_seed(rows, task=task.name, variant="DRaFT-LV")
        gain = paired_effect([line[1]["reward"] for line in lines], [line[0]["reward"] for line in lines])
        finals = by_seed(rows, "reward", task=task.name, variant="DRaFT-LV", update=last)
        more = paired_effect(finals, by_seed(rows, "reward", task=task.name, variant="DRaFT-1", update=last))
        rate = next(r["learning_rate"] for r in rows if r["variant"] == "DDPO" and r["task"] == task.name)
        place = "above the interval" if effect.high < PAPER else "below it" if effect.low > PAPER else "not excluded"
        sentences.append(
            f"{task.name}: DRaFT-LV gains {gain.full()} with {lines[0][1]['reward_queries']} "
            f"scored images. DDPO needs {effect.text('{:.3g}')} times as many ({effect.interval('{:.3g}')}); the "
            f"paper's {PAPER} is {place}. "
            f"{effect.censored} of {effect.seeds} DDPO runs ended at their limit without it. Its learning rate is "
            f"{rate:g}. After {last} updates DRaFT-LV differs from DRaFT-1 by {more.full()}."
        )
    return [
        *sentences,
        "DDPO is evaluated by the deterministic sampler, as the others, and trains on the ancestral one. Its learning "
        f"rate is the best of {', '.join(f'{rate:g}' for rate in RATES)} on another seed, of those that keep "
        f"{MIN_NAMES:.0%} of the names. A run without the target gives a lower bound; the factor is then the smallest.",
    ]


EXPERIMENT = Experiment(
    title="Sample efficiency",
    question="How many scored images does DDPO need for the reward of DRaFT-LV?",
    setting="DDPO has its authors' loss: clipping at 1e-4, advantages by the last 16 rewards of a prompt, a ratio for "
    "each step, four optimizer steps for each 64 images (theirs: 256), weight decay 1e-4. For JPEG it trains on the "
    "bytes of the file, and DRaFT on the differentiable JPEG; both are evaluated by the bytes.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[
        Panel("reward_queries", "reward", "variant", log=True, ylabel=label, where={"task": task.name, **SHOWN})
        for task, label in zip(TASKS, ("reward, style", "-kB of the JPEG file"), strict=True)
    ],
)
