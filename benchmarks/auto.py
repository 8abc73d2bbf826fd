"""Compare a measured choice of truncation, copies and batch size with fixed ones at equal CPU time.

    python benchmarks/auto.py [--model emoji] [--rewards emoji_aesthetic emoji_clip] [--seeds 0 1 2] [--seconds 60]
    python benchmarks/auto.py --quick

Each variant trains for the same CPU seconds of its updates, with the model's learning rate. `auto` measures the
candidates (`draftune.training.allocation`) before its first update. It is evaluated twice: when its measurement and its
updates together took this time, and ("auto, chosen before") when its updates alone did. "twice the rate" is the first
variant with twice its learning rate: a small batch gains by more updates, as if the learning rate were larger.

Last, the effect on the reward: the mean difference of each variant to the first one of the same seed, with its 95 %
interval (Student's t).
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from torch import get_num_threads, tensor

from draftune.evaluation.metrics import evaluate, interval
from draftune.methods import load_method
from draftune.settings import Settings
from draftune.training.allocation import best, measure, table
from draftune.training.trainer import Trainer

AUTO = "auto"
BEFORE = "auto, chosen before"
TWICE = "twice the rate"
VARIANTS: dict[str, dict[str, Any]] = {
    "draft_k(k=1), 4 images": {"method": "draft_k(k=1)"},
    TWICE: {"method": "draft_k(k=1)"},
    "draft_k(k=5), 4 images": {"method": "draft_k(k=5)"},
    "draft_lv(n=2), 4 images": {"method": "draft_lv(n=2)"},
    AUTO: {"method": "draft_k(k=1)"},
}
LONG = {"steps": 10_000, "report_to": "none"}
"""All prompts are encoded before the updates, however many fit into the time."""


def trained(args: argparse.Namespace, reward: str, variant: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train a variant for the given time, and yield its name and scores; `auto` also without its measurement."""
    with TemporaryDirectory() as folder:
        values = VARIANTS[variant] | {"prefix_reuse_steps": args.reuse, "seed": seed, "output": f"{folder}/run"} | LONG
        if args.quick:
            values["num_inference_steps"] = 6
        if variant == TWICE:
            values["learning_rate"] = 2 * Settings(model=args.model).learning_rate
        trainer = Trainer(args.model, reward, **values)
        c, updates, measured = trainer.context, trainer.train_step, 0.0
        if variant == AUTO:
            start = time.process_time()
            candidates = measure(updates, args.samples)
            measured = time.process_time() - start
            chosen, size = best(candidates)
            print(f"\n{reward}, seed {seed}: `{chosen.method}`, {size} images, after {measured:.1f} s\n")
            print(table(candidates), flush=True)
            if chosen.rate(size) > 0:  # else the samples show no signal: the variant stays as it is
                settings = replace(c.settings, method=chosen.method, batch_size=size)
                updates.context = replace(c, method=load_method(chosen.method), settings=settings)
        spent, count = measured, 0
        for name, until in ((variant, args.seconds), (BEFORE, args.seconds + measured)):
            while spent < until:
                start = time.process_time()
                updates.run(count + 1)
                count, spent = count + 1, spent + time.process_time() - start
            prompts = (trainer.context.eval_prompts or trainer.prompts)[: args.prompts]
            judge = trainer.context.eval_rewards
            found = evaluate(trainer.context.sample_images, trainer.reward, judge, prompts, 2, c.model.device).scores
            yield name, {"updates": count, "seconds": spent, **found}
            if variant != AUTO:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--rewards", nargs="*", default=["emoji_aesthetic", "emoji_clip"])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of a run's updates")
    parser.add_argument("--samples", type=int, default=8, help="images whose gradients are compared")
    parser.add_argument("--reuse", type=int, default=4, help="--prefix-reuse-steps of all variants")
    parser.add_argument("--prompts", type=int, default=16, help="evaluation prompts, 2 images each")
    parser.add_argument("--quick", action="store_true", help="6 sampling steps, one seed, 5 s, 4 samples, 2 prompts")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.seconds, args.samples, args.prompts = args.seeds[:1], 5, 4, 2
    print(f"{get_num_threads()} threads")
    for reward in args.rewards:
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in args.seeds:
            for variant in args.variants:
                for name, row in trained(args, reward, variant, seed):
                    rows.setdefault(name, []).append(row)
                    cells = " | ".join(f"{key} {value:.4g}" for key, value in row.items())
                    print(f"| {reward} | {name} | {seed} | {cells} |", flush=True)
        print(f"\n| {reward} | reward | against `{args.variants[0]}` | from | to |\n|---|---|---|---|---|")
        first = [row[reward] for row in rows[args.variants[0]]]
        for name, found in rows.items():
            scores = tensor([row[reward] for row in found])
            change = scores - tensor(first)
            low, high = interval(change)
            print(f"| {name} | {scores.mean():.2f} | {change.mean():+.2f} | {low:+.2f} | {high:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
