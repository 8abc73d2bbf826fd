"""Compare how long draftune and TRL's AlignPropTrainer train until they reach a reward, over seeds.

    python benchmarks/race.py --output race.csv [--seeds 0 1 2 3 4] [--targets 4.5 5.5]
    python benchmarks/race.py --report race.csv [more.csv ...] [--targets 4.5 5.5]

Needs the environment of `benchmarks/alignprop.py`. All trainers of a seed run in one process: the one with the least
training time makes the next update, so that other load on the machine affects all alike. They share model, reward,
prompts, batch, sampling steps and guidance, in float32. `RACERS` holds the settings that differ.

After 3 seconds of training, and each time that its training time has grown by half, a trainer's LoRA is evaluated,
outside the measured time, by the same function, prompts and seeds: DDIM without noise on draftune's schedule. A trainer
stops when an evaluation reaches the highest of `--targets`, or after `--minutes`. The time to a target is interpolated
linearly between two evaluations. TRL draws from global random generators, so its runs do not repeat exactly.

The report gives each trainer's time and its ratio to the time of TRL with its own defaults: geometric mean over seeds
with a 95 % interval by Student's t of the logarithms, and the judge's recognized names in the evaluation that reached
the target.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import csv
import itertools
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from draftune.evaluation.metrics import evaluate
from draftune.models import DiffusionModel, load_model
from draftune.training.trainer import Trainer
from draftune.utils.quiet import silence_libraries
from overhead import seconds

FIRST, GROWTH = 3.0, 1.5
"""Seconds of training before the first evaluation, and the factor to each next one."""
NAMES = "emoji_name_accuracy"
TRL, TRL_RATE = "TRL", "TRL, learning rate 3e-3"
CHEAP = {"prefix_cache": "taylorseer(interval=2)", "prefix_precision": "bf16"}
RACERS: dict[str, dict[str, Any]] = {
    TRL: {},
    TRL_RATE: {"train_learning_rate": 3e-3},
    "draft_k(k=1), learning rate 1e-3": {"learning_rate": 1e-3},
    "draft_k(k=1), learning rate 3e-3": {},
    "and --prefix-reuse-steps 4": {"prefix_reuse_steps": 4},
    "and a cheaper prefix": {"prefix_reuse_steps": 4, **CHEAP},
}
"""Settings of each trainer: of TRL's config for the first two, else of draftune."""
COMMON: dict[str, Any] = {
    "method": "draft_k(k=1)",
    "learning_rate": 3e-3,
    "lr_scheduler": "constant",
    "gradient_checkpointing": "blocks",
    "eval_rewards": NAMES,
}


@dataclass
class Racer:
    """A trainer and its evaluations."""

    name: str
    update: Callable[[], object]
    model: DiffusionModel
    ours: Trainer
    seconds: float = 0.0
    updates: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def evaluate(self, seed: int, count: int) -> None:
        """Evaluate `count` images, one for each prompt, append the row and print it."""
        ours = self.ours
        prompts = (ours.context.eval_prompts or ours.prompts)[:count]

        def draw(prompts: Any, seeds: Any) -> torch.Tensor:
            return self.model.sample_tensors(prompts, seeds, ours.schedule, ours.settings.guidance_scale)

        scores = evaluate(draw, ours.reward, ours.context.eval_rewards, prompts, 1, self.model.device).scores
        row = {"seed": seed, "trainer": self.name, "updates": self.updates, "seconds": round(self.seconds, 2)}
        self.rows.append(row | {"reward": scores[ours.reward.label], "names": scores[f"eval/{NAMES}"]})
        print(", ".join(f"{name} {value}" for name, value in self.rows[-1].items()), flush=True)


def next_update(trainer: Trainer, count: Iterator[int]) -> None:
    """Run the next update of draftune's trainer."""
    trainer.train_step.run(next(count))


def racers(args: argparse.Namespace, seed: int) -> list[Racer]:
    """Set up the trainers of a seed."""
    from alignprop import alignprop, draftune  # needs TRL, which the report does not

    made: list[Racer] = []
    first: Trainer | None = None
    for name, settings in RACERS.items():
        if name in (TRL, TRL_RATE):
            continue
        ours = draftune(args, load_model(args.model), seed=seed, **COMMON | settings)
        first = first or ours
        made.append(Racer(name, partial(next_update, ours, itertools.count(1)), ours.model, ours))
    assert first is not None
    for name in (TRL, TRL_RATE):
        minmax = (0, first.settings.num_inference_steps)
        theirs, model = alignprop(first, seed=seed, truncated_rand_backprop_minmax=minmax, **RACERS[name])
        made.append(Racer(name, partial(theirs.step, 0, 0), model, first))
    return made


def race(args: argparse.Namespace, seed: int) -> None:
    """Train until every trainer has reached the target or its time, and append the evaluations to the CSV file."""
    running = racers(args, seed)
    random.seed(seed)
    torch.manual_seed(seed)
    for racer in running:
        racer.evaluate(seed, args.num_images)
    done: list[Racer] = []
    while running:
        racer = min(running, key=lambda racer: racer.seconds)
        racer.seconds += seconds(racer.update)
        racer.updates += 1
        late = racer.seconds >= 60 * args.minutes
        if late or racer.seconds >= max(FIRST, GROWTH * racer.rows[-1]["seconds"]):
            racer.evaluate(seed, args.num_images)
            if late or racer.rows[-1]["reward"] >= max(args.targets):
                running.remove(racer)
                done.append(racer)
    rows = [row for racer in done for row in racer.rows]
    new = not args.output.is_file()
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def time_to_target(rows: list[dict[str, str]], target: float) -> tuple[float, float] | None:
    """Return the interpolated seconds until a reward, and the names after it; None if it was not reached."""
    points = [(float(row["seconds"]), float(row["reward"]), float(row["names"])) for row in rows]
    for (start, low, _), (end, high, names) in itertools.pairwise(points):
        if low < target <= high:
            return start + (target - low) / (high - low) * (end - start), names
    return None


def report(paths: list[Path], target: float) -> None:
    """Print a Markdown table of the times to a reward and their ratios."""
    rows = [row for path in paths for row in csv.DictReader(path.read_text().splitlines())]
    seeds = sorted({row["seed"] for row in rows}, key=int)
    reached: dict[str, list[tuple[float, float] | None]] = {}
    for name in RACERS:
        own = [[row for row in rows if (row["trainer"], row["seed"]) == (name, seed)] for seed in seeds]
        reached[name] = [time_to_target(part, target) for part in own]
    print(f"\nReward {target:g}, seeds {', '.join(seeds)}:\n")
    print("| trainer | seconds | relative to TRL | 95 % interval | names | reached by |\n|---|---|---|---|---|---|")
    for name, times_of in reached.items():
        share, cells = f"{sum(value is not None for value in times_of)} of {len(times_of)}", [""] * 4
        if None not in times_of and None not in reached[TRL]:
            times, names = np.array(times_of, float).T
            logs = np.log(times / np.array(reached[TRL], float)[:, 0])
            spread = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
            middle, low, high = np.exp([logs.mean(), logs.mean() - spread, logs.mean() + spread])
            cells = [f"{stats.gmean(times):.1f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{names.mean():.3f}"]
        print(f"| {' | '.join([name, *cells, share])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="CSV file that the evaluations are appended to")
    parser.add_argument("--report", type=Path, nargs="+", help="print the table of these CSV files, train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--targets", type=float, nargs="+", default=[4.5, 5.5], help="rewards to reach")
    parser.add_argument("--minutes", type=float, default=15, help="maximum training time of a trainer")
    parser.add_argument("--model", default="emoji", help="'emoji' or the folder of a StableDiffusionPipeline")
    parser.add_argument("--reward", default="emoji_aesthetic")
    parser.add_argument("--prompts")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps T")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-images", type=int, default=32, help="images of an evaluation, one for each prompt")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.report:
        for target in args.targets:
            report(args.report, target)
        return
    if args.output is None:
        parser.error("--output is required, unless --report is given")
    with silence_libraries():
        for seed in args.seeds:
            race(args, seed)


if __name__ == "__main__":
    main()
