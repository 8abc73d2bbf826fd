"""A second reward trained after the first: how much of the first is retained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from draftune.evaluation.metrics import evaluate
from draftune.experimental.distill import distill_lora
from draftune.prompts import load_prompts
from draftune.rewards import load_reward
from draftune.runs.merge import merge_loras
from experiments.budget import Budget
from experiments.lora_merging import ORANGE
from experiments.report import Experiment, Panel, aggregate, value_at
from experiments.runner import DRAFT_1, REWARD, ExperimentRunner, Row, RunSpec, rename_columns, slug

RETAIN_WEIGHTS = (0.1, 1.0)
"""The reward's standard deviation in a batch is 0.03."""
RANK, TRAJECTORIES = 8, 20
"""Rank of the distilled LoRA, and batches of samples for its training."""
NORMALIZATION_IMAGES = 16
BASE, FIRST, PLAIN, HALF = "base model", "first reward only", "continued", "continued, half weight"
MERGED, JOINT = "two LoRAs merged", "both rewards in one run"
DISTILLED = f"retained at {RETAIN_WEIGHTS[0]:g}, distilled to rank {RANK}"


def retained(weight: float) -> str:
    return f"retained at {weight:g}"


def first_spec(seed: int, budget: Budget) -> RunSpec:
    # No other experiment makes runs of these seeds longer: the LoRA is from the last update.
    return RunSpec(DRAFT_1, budget.steps, seed + 1)


def runs(budget: Budget) -> list[RunSpec]:
    """Return the runs on the first reward; the others continue from them."""
    return [first_spec(seed, budget) for seed in range(budget.seeds)]


def split_names(names: Sequence[str], count: int) -> dict[str, list[str]]:
    """Return `count` names of faces and `count` other names, evenly spaced."""
    faces = [name for name in names if "face" in name.split()]
    groups = {"faces": faces, "things": [name for name in names if name not in faces]}
    return {key: group[:: max(1, len(group) // count)][:count] for key, group in groups.items()}


def folder_name(variant: str, seed: int) -> str:
    return slug(f"second-reward {variant} seed={seed}")


class Variants:
    """The variants of one seed: how each gets a LoRA, from runs that are made when they are first needed."""

    def __init__(self, runner: ExperimentRunner, seed: int) -> None:
        self.runner, self.seed, self.budget = runner, seed, runner.budget
        self.names = split_names(load_prompts("emoji"), self.budget.train_prompts)
        self.first = runner.folder / first_spec(seed, self.budget).name

    def spec(self, variant: str, **settings: Any) -> RunSpec:
        """Return a run of the second reward on names of things, without evaluations."""
        settings = {"reward": ORANGE, "prompts": self.names["things"], **settings}
        label = folder_name(variant, self.seed)
        return RunSpec(DRAFT_1, self.budget.steps, self.seed + 1, settings, label, evaluated=False)

    def plain_spec(self) -> RunSpec:
        return self.spec(PLAIN, init_lora=str(self.first))

    def retained_spec(self, weight: float) -> RunSpec:
        faces = self.runner.prompt_file("second-reward-faces", self.names["faces"])
        return self.spec(retained(weight), init_lora=str(self.first), keep=faces, retain_weight=weight)

    def joint_spec(self) -> RunSpec:
        prompts, reward = [*self.runner.prompts, *self.names["things"]], f"{REWARD} + {ORANGE}"
        settings = {
            "reward": reward,
            "prompts": prompts,
            "reward_normalization_samples": min(NORMALIZATION_IMAGES, len(prompts)),
        }
        label = folder_name(JOINT, self.seed)
        return RunSpec(DRAFT_1, 2 * self.budget.steps, self.seed + 1, settings, label, evaluated=False)

    def merge(self, variant: str, *sources: tuple[Path, float]) -> Path:
        folder = self.runner.folder / folder_name(variant, self.seed)
        merge_loras(sources, folder)
        return folder

    def half(self) -> Path:
        return self.merge(HALF, (self.first, 0.5), (self.runner.lora(self.plain_spec()), 0.5))

    def merged(self) -> Path:
        return self.merge(MERGED, (self.first, 1.0), (self.runner.lora(self.spec("second reward only")), 1.0))

    def distilled(self) -> Path:
        source, folder = self.runner.lora(self.retained_spec(RETAIN_WEIGHTS[0])), folder_name(DISTILLED, self.seed)
        prompts: list[str | list[str]] = [self.names["things"], self.names["faces"]]
        paths, target = min(TRAJECTORIES, self.budget.steps), self.runner.folder / folder
        distill_lora(str(source), prompts, target, RANK, num_trajectories=paths, seed=self.seed)
        return target

    def loras(self) -> dict[str, Callable[[], Path | None]]:
        lora = self.runner.lora
        return {
            BASE: lambda: None,
            FIRST: lambda: self.first,
            PLAIN: lambda: lora(self.plain_spec()),
            HALF: self.half,
            **{
                retained(w): lambda w=w: lora(self.retained_spec(w))  # type: ignore[misc]
                for w in RETAIN_WEIGHTS[: self.budget.retain_weights]
            },
            DISTILLED: self.distilled,
            MERGED: self.merged,
            JOINT: lambda: lora(self.joint_spec()),
        }


def evaluate_variant(runner: ExperimentRunner, lora: Callable[[], Path | None]) -> Row:
    """Return both rewards and the name accuracy on faces and on things that no run trained on."""
    folder = lora()
    model = runner.model({"default": folder} if folder else {})
    row: Row = {}
    reward = runner.reward + load_reward(ORANGE)
    for group, names in split_names(load_prompts("emoji-common"), runner.budget.eval_prompts).items():
        scores = evaluate(runner.sampler(model), reward, runner.judges, names, 1).scores
        short = rename_columns(scores)
        row |= {f"{group}_reward": short["reward"], f"{group}_orange": scores["color"]}
        row |= {f"{group}_name_accuracy": short["name_accuracy"]}
    return row


def measure(runner: ExperimentRunner) -> list[Row]:
    rows = []
    for seed in range(runner.budget.seeds):
        runner.lora(first_spec(seed, runner.budget))
        for variant, lora in Variants(runner, seed).loras().items():
            name = f"{folder_name(variant, seed)}-scores"
            scores = runner.cached(name, partial(evaluate_variant, runner, lora))
            rows.append({"variant": variant, "seed": seed, **scores})
    return add_shares(rows)


def add_shares(rows: list[Row]) -> list[Row]:
    """Add the retained share of the first reward's gain on faces, and the share of the second's gain on things.

    The first share is relative to the first run's gain, the second to the gain of `continued`.
    """
    at = {(row["variant"], row["seed"]): row for row in rows}

    def share(row: Row, key: str, start: str, end: str) -> float:
        low, high = at[start, row["seed"]][key], at[end, row["seed"]][key]
        return float((row[key] - low) / (high - low)) if high != low else 0.0

    for row in rows:
        row["first_retained"] = share(row, "faces_reward", BASE, FIRST)
        row["second_gained"] = share(row, "things_orange", FIRST, PLAIN)
    return rows


def table(rows: list[Row]) -> list[Row]:
    """Return means over seeds. `above_scaling`: `first_retained` beyond a smaller weight of `continued`'s update.

    The weight is the one at which the second reward gains as much.
    """
    columns = [key for key in rows[0] if key not in ("variant", "seed")]
    lines = aggregate(rows, "variant", columns, ci="first_retained")
    curve = [next(line for line in lines if line["variant"] == name) for name in (FIRST, HALF, PLAIN)]
    for line in lines:
        scaled = value_at(curve, "second_gained", line["second_gained"], "first_retained")
        line["above_scaling"] = line["first_retained"] - scaled
    return lines


EXPERIMENT = Experiment(
    title="Second reward",
    question="Can a model learn a second reward without losing the first?",
    runs=runs,
    measure=measure,
    table=table,
    panels=[
        Panel(
            x,
            "faces_reward",
            by="variant",
            kind="scatter",
            xlabel=f"second reward, {group}",
            ylabel="first reward, faces",
        )
        for x, group in (("things_orange", "things"), ("faces_orange", "faces"))
    ],
)
