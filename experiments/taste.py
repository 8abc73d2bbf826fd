"""A simulated rater's comparisons as the reward: how many it takes to reach what the rater itself reaches as reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.evaluation.rating import stored
from draftune.rewards import Reward, load_reward, parse_reward
from draftune.rewards.comparisons import LEFT, RIGHT, Comparison, comparison, image_path, write_comparisons
from draftune.rewards.taste import Taste
from draftune.utils.images import open_image
from experiments.budget import Budget
from experiments.report import Experiment, Panel, aggregate
from experiments.runner import DRAFT_1, ExperimentRunner, Row, RunSpec, rename_columns

RATER = "emoji_style_probability(style='3d')"
LOG_ODDS = f"'{__file__}:rater_log_odds'"
POOL = "taste-pool"
BASE, JUDGE, TASTE = "base model", "rater's log-odds", "taste"


@cache
def rater() -> Reward:
    return load_reward(RATER)


def rater_log_odds(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the rater's log-odds, whose gradient does not vanish where its probability is near 0 or 1."""
    return rater()(images, prompts).clamp(1e-6, 1 - 1e-6).logit()


def spec(reward: str, label: str, seed: int, budget: Budget) -> RunSpec:
    """Return a run that is evaluated before and after training."""
    settings = {"reward": reward, "validation_steps": 0, "checkpointing_steps": 0, "prefix_reuse_steps": 4}
    return RunSpec(DRAFT_1, budget.steps, seed, settings, label=f"{label} seed {seed}")


def runs(budget: Budget) -> list[RunSpec]:
    """Return the runs on the rater itself; those on comparisons depend on the base model's images."""
    return [rater_spec(seed, budget) for seed in range(budget.seeds)]


def rater_spec(seed: int, budget: Budget) -> RunSpec:
    return spec(LOG_ODDS, f"taste {JUDGE}", seed, budget)


def pool(runner: ExperimentRunner) -> list[list[float]]:
    """Sample images of each training name with the base model, store them, and return the rater's scores of them."""

    def sample() -> list[list[float]]:
        model, scores = runner.model(), []
        for name in runner.prompts:
            seeds = list(range(runner.budget.rating_pool))
            images = runner.sampler(model)([name] * len(seeds), seeds)
            names = image_files(runner, name)
            files = [stored(image, image_path(path, file)) for image, file in zip(images, names, strict=True)]
            read = torch.cat([open_image(file) for file in files])
            scores.append(rater().components(read, [name] * len(files))[0].tolist())
        return scores

    path = comparison_file(runner, 0, 0)
    return [list(scores) for scores in runner.cached("taste-pool-scores", sample)]


def comparison_file(runner: ExperimentRunner, count: int, seed: int) -> Path:
    return runner.folder / f"taste-{count}-{seed}.csv"


def image_files(runner: ExperimentRunner, name: str) -> list[str]:
    number = runner.prompts.index(name)
    return [f"{POOL}/{number:02d}-{i:02d}.png" for i in range(runner.budget.rating_pool)]


def compare(runner: ExperimentRunner, count: int, seed: int) -> Path:
    """Write the rater's comparisons of random pairs of images: its preferred image has the higher probability."""
    scores, path = pool(runner), comparison_file(runner, count, seed)
    pairs = [(i, pair) for i in range(len(scores)) for pair in combinations(range(len(scores[i])), 2)]
    Random(seed).shuffle(pairs)  # the first comparisons of more are those of fewer
    written: list[Comparison] = []
    for i, (left, right) in pairs[:count]:
        name = runner.prompts[i]
        files = image_files(runner, name)
        choice = LEFT if scores[i][left] > scores[i][right] else RIGHT
        row = comparison(
            name, choice, "emoji", None, (left, right), {"num_inference_steps": runner.budget.num_inference_steps}
        )
        written.append(replace(row, left_image=files[left], right_image=files[right]))
    write_comparisons(path, written)
    return path


def reward(runner: ExperimentRunner, count: int, seed: int) -> str:
    return f"taste(ratings='{compare(runner, count, seed)}', model=emoji_clip)"


def run_comparisons(runner: ExperimentRunner, count: int, seed: int) -> Row:
    """Train on the rater's comparisons and evaluate the model; if the reward is refused, evaluate the base model."""
    expression = reward(runner, count, seed)
    taste = parse_reward(expression)
    assert isinstance(taste, Taste)
    row: Row = {"accepted": 1}
    try:
        taste.load_weights()
    except DraftuneError:
        row["accepted"] = 0
    assert taste.accuracy is not None
    row["held_out_accuracy"] = taste.accuracy.correct / taste.accuracy.count
    if row["accepted"]:
        result = runner.run(spec(expression, f"taste {count} comparisons", seed, runner.budget))
        return row | rename_columns(result.final)
    return row | rename_columns(runner.run(rater_spec(seed, runner.budget)).evaluations[0])


def measure(runner: ExperimentRunner) -> list[Row]:
    rows: list[Row] = []
    for seed in range(runner.budget.seeds):
        judge = runner.run(rater_spec(seed, runner.budget))
        own: list[Row] = [{"variant": BASE, **rename_columns(judge.evaluations[0])}]
        own.append({"variant": JUDGE, **rename_columns(judge.final)})
        for count in runner.budget.comparisons:
            measured = runner.cached(f"taste {count} {seed}", partial(run_comparisons, runner, count, seed))
            own.append({"variant": TASTE, "comparisons": count, **measured})
        start, end = own[0]["p_3d"], own[1]["p_3d"]
        for row in own:
            share = (row["p_3d"] - start) / (end - start) if end != start else 0.0
            rows.append({"variant": "", "comparisons": None, "seed": seed, **row, "share": share})
    return rows


def table(rows: list[Row]) -> list[Row]:
    columns = ["accepted", "held_out_accuracy", "p_3d", "share", "name_accuracy", "diversity"]
    return aggregate(rows, "variant comparisons", columns, ci="p_3d share")


EXPERIMENT = Experiment(
    title="Your taste",
    question="How many comparisons by a rater replace the rater as the reward?",
    runs=runs,
    measure=measure,
    table=table,
    panels=[
        Panel(
            "comparisons", "share", by="variant", where={"variant": TASTE}, ci=True, ylabel="share of the rater's gain"
        ),
        Panel("comparisons", "held_out_accuracy", by="variant", where={"variant": TASTE}, ci=True),
    ],
)
