"""Compare a reward of latents with the reward of images that it was distilled from, on the embedded model.

    python benchmarks/latent_reward.py [--method draft_lv] [--rounds 7] [--steps 45] [--seeds 0] [--rewards R …]

Table 1 shows the median seconds and the peak memory of an update with each reward, measured in turn. The peak counts
the tensors that an update creates. Table 2 trains with each reward for --steps updates, and shows the mean scores of
the fine-tuned model's images on the common emoji names by both rewards and by the evaluation rewards. With --steps 0
nothing is trained.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import itertools
import statistics
import time
from tempfile import TemporaryDirectory

import draftune
from draftune.training.trainer import Trainer
from draftune.utils.memory import PeakMemory
from embedded import SETTINGS

IMAGES, LATENTS = "emoji_aesthetic", "emoji_latent_aesthetic"


def measure(method: str, batch_size: int, rounds: int) -> None:
    """Print the time and the peak memory of an update with each reward."""
    steps = itertools.count(1)
    trainers: dict[str, Trainer] = {}
    times: dict[str, list[float]] = {}
    for reward in (IMAGES, LATENTS):
        with TemporaryDirectory() as folder:
            settings = SETTINGS | {"method": method, "batch_size": batch_size}
            settings |= {"log_images_steps": 0, "checkpointing_steps": 0}
            trainers[reward] = made = Trainer("emoji", reward, **settings, output=f"{folder}/run")
        made.train_step.folder = None
        made.train_step.run(next(steps))  # the first update allocates buffers, and checks the autoencoder
        times[reward] = []
    for _ in range(rounds):
        for reward, made in trainers.items():
            start = time.perf_counter()
            made.train_step.run(next(steps))
            times[reward].append(time.perf_counter() - start)
    for reward, made in trainers.items():
        with PeakMemory() as memory:
            made.train_step.run(next(steps))
        seconds = statistics.median(times[reward])
        print(f"| {reward} | {method} | {batch_size} | {seconds:.2f} | {memory.peak / 2**20:.0f} |", flush=True)


def trained(reward: str, method: str, steps: int, seed: int) -> None:
    """Train with a reward, and print the scores of the base and the fine-tuned model by both."""
    settings = SETTINGS | {"method": method, "steps": steps, "seed": seed}
    settings |= {"checkpointing_steps": 0, "log_images_steps": 0}
    judges = f"emoji_name_accuracy + emoji_style_probability + {LATENTS if reward == IMAGES else IMAGES}"
    with TemporaryDirectory() as folder:
        run = draftune.train("emoji", reward, **settings, eval_rewards=judges, output=f"{folder}/run")
    assert run.comparison is not None
    scores = {name.removeprefix("eval/"): pair for name, pair in run.comparison.scores.items()}
    cells = [f"{scores[name][0]:.2f} → {scores[name][1]:.2f}" for name in (IMAGES, LATENTS)]
    cells += [f"{scores[name][1]:.2f}" for name in ("emoji_name_accuracy", "emoji_style_probability", "diversity")]
    print(f"| {reward} | {seed} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="draft_lv")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rewards", nargs="*", default=[IMAGES, LATENTS], help="rewards of table 2 (default: both)")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    args = parser.parse_args()
    print("| reward | method | batch | seconds | peak memory, MiB |\n|---|---|---|---|---|", flush=True)
    measure(args.method, args.batch_size, args.rounds)
    if not args.steps:
        return
    print(f"\n| trained on | seed | {IMAGES} | {LATENTS} | name accuracy | 3D | diversity |\n{'|---' * 7}|")
    for seed, reward in itertools.product(args.seeds, args.rewards):
        trained(reward, args.method, args.steps, seed)


if __name__ == "__main__":
    main()
