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
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim, curve_job
from experiments.runner import DRAFT_1, REWARD, ExperimentRunner, Row, RunSpec
from experiments.statistics import mean_effect, paired_effect

RATER = "emoji_style_probability(style='3d')"
LOG_ODDS = f"'{__file__}:rater_log_odds'"
POOL = "taste-pool"
JUDGE, TASTE = "rater's log-odds", "taste"


@cache
def rater() -> Reward:
    return load_reward(RATER)


def rater_log_odds(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the rater's log-odds, whose gradient does not vanish where its probability is near 0 or 1."""
    return rater().to(images.device)(images, prompts).clamp(1e-6, 1 - 1e-6).logit()


def spec(reward: str, label: str, seed: int, budget: Budget) -> RunSpec:
    settings = {"reward": reward, "prefix_reuse_steps": 4}
    return RunSpec(DRAFT_1, budget.short[-1:], seed, settings, f"taste {label} seed={seed}", metric=REWARD)


def jobs(budget: Budget) -> list[Job]:
    made = []
    for seed in range(budget.few_seeds):
        made.append(curve_job("taste", spec(LOG_ODDS, JUDGE, seed, budget), variant=JUDGE))
        for count in budget.comparisons:
            placeholder = spec(REWARD, f"{count} comparisons", seed, budget)
            made.append(Job(f"taste {count} seed={seed}", partial(run_comparisons, count, seed), [placeholder]))
    return made


def pool(runner: ExperimentRunner) -> list[list[float]]:
    """Sample images of each training name with the base model, store them, and return the rater's scores of them."""

    def sample() -> list[list[float]]:
        sampler, path, scores = runner.sampler(runner.model()), comparison_file(runner, 0, 0), list[list[float]]()
        for name in runner.prompts:
            seeds = list(range(runner.budget.rating_pool))
            images = sampler([name] * len(seeds), seeds)
            names = image_files(runner, name)
            files = [stored(image, image_path(path, file)) for image, file in zip(images, names, strict=True)]
            read = torch.cat([open_image(file) for file in files])
            scores.append(rater().components(read, [name] * len(files))[0].tolist())
        return scores

    return [list(scores) for scores in runner.cached("taste-pool-scores", lambda: {"scores": sample()})["scores"]]


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
    written = list[Comparison]()
    sampling: dict[str, object] = {"num_inference_steps": runner.budget.num_inference_steps}
    for i, (left, right) in pairs[:count]:
        name, files = runner.prompts[i], image_files(runner, runner.prompts[i])
        choice = LEFT if scores[i][left] > scores[i][right] else RIGHT
        row = comparison(name, choice, "emoji", None, (left, right), sampling)
        written.append(replace(row, left_image=files[left], right_image=files[right]))
    write_comparisons(path, written)
    return path


def run_comparisons(count: int, seed: int, runner: ExperimentRunner) -> list[Row]:
    """Train on the rater's comparisons and evaluate the model; if the reward is refused, evaluate the base model."""
    expression = f"taste(ratings='{compare(runner, count, seed)}', model=emoji_clip)"
    taste, own = parse_reward(expression), spec(expression, f"{count} comparisons", seed, runner.budget)
    assert isinstance(taste, Taste)
    row: Row = {"variant": TASTE, "comparisons": count, "accepted": 1}
    try:
        taste.load_weights()
    except DraftuneError:
        row["accepted"] = 0
    assert taste.accuracy is not None
    row["held_out_accuracy"] = taste.accuracy.correct / taste.accuracy.count
    if row["accepted"]:
        return [row | runner.curve(own)[-1]]
    # A refused reward trains nothing.
    return [row | {"seed": seed, "update": own.steps, "reward_queries": 0, **runner.scores(own, None)}]


def shares(rows: list[Row], count: int) -> list[float]:
    """Return the gain in the rater's probability, divided by that of a run on the rater, of each seed."""
    last = max(row["update"] for row in rows)
    base, judge = (by_seed(rows, "p_3d", variant=JUDGE, update=update) for update in (0, last))
    own = by_seed(rows, "p_3d", variant=TASTE, comparisons=count)
    return [(c - a) / (b - a) for a, b, c in zip(base, judge, own, strict=True)]


def counts(rows: list[Row]) -> list[int]:
    return sorted({row["comparisons"] for row in rows if row["variant"] == TASTE})


def claims(rows: list[Row]) -> list[Claim]:
    most, ones = counts(rows)[-1], [1.0] * len(shares(rows, counts(rows)[-1]))
    effect = paired_effect(shares(rows, most), [0.0] * len(ones))
    text = f"{most} comparisons raise the rater's probability (share of its own gain)"
    found = [claim(text, effect, 0.1, form="{:.0%}")]
    less = paired_effect(shares(rows, most), ones)
    return [*found, claim("they fall short of the rater as the reward", less, 0.1, -1, "{:+.0%}")]


def answer(rows: list[Row]) -> list[str]:
    parts = []
    for count in counts(rows):
        share, own = mean_effect(shares(rows, count)), {"variant": TASTE, "comparisons": count}
        accuracy, accepted = (mean_effect(by_seed(rows, c, **own)).value for c in ("held_out_accuracy", "accepted"))
        parts.append(
            f"{count}: {share.value:.0%} ({share.interval('{:.0%}')}), held-out accuracy {accuracy:.0%}, accepted in "
            f"{accepted:.0%} of the seeds"
        )
    return [
        f"Share of the rater's own gain by comparisons: {'; '.join(parts)}. A refused reward counts as no gain.",
        "The rater evaluates too: its probability does not say how good the images are. A person is less consistent.",
    ]


EXPERIMENT = Experiment(
    title="Your taste",
    question="How many comparisons by a rater replace the rater as the reward?",
    setting="The rater is simulated: of two images of a name it prefers the one with the higher probability of the 3D "
    "style. `taste` is fitted to its comparisons of random pairs of the base model's images, with `emoji_clip`. Four "
    "updates share a prefix.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[
        Panel("comparisons", "p_3d", "variant", where={"variant": TASTE}),
        Panel("comparisons", "held_out_accuracy", "variant", where={"variant": TASTE}),
    ],
)
