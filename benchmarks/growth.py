"""Measure time and memory of an update against T, K, batch size, image size, LoRA rank and gradient checkpointing.

    python benchmarks/growth.py [--model emoji] [--reward emoji_aesthetic] [--rounds 5] [--cpu]
                                [--short | --rows TEXT ...]

The base settings are DRaFT-1 with 20 guided sampling steps, batches of 4, rank 8 and no shared prefix. Each row changes
one setting; --short takes some of the rows, --rows those whose names contain one of the texts. Updates of both are
timed alternately, so that other load on the machine affects both, and the median ratio of the pairs is printed with its
range; --cpu takes CPU time, for a busy machine. Memory is the peak of the tensors allocated in an update, gradients
included, networks excluded.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from draftune.training.trainer import Trainer
from draftune.utils.memory import peak_memory
from embedded import SETTINGS
from overhead import cpu_seconds, seconds

BASE = SETTINGS | {"method": "draft_k(k=1)", "prefix_reuse_steps": 1, "batch_size": 4, "lora_rank": 8}
CHANGES: list[dict[str, Any]] = [
    *({"num_inference_steps": steps} for steps in (5, 10, 50)),
    {"method": "draft_lv"},
    *({"prefix_reuse_steps": updates} for updates in (2, 4, 8)),
    *({"prefix_stride": steps} for steps in (2, 4)),
    *(
        {"batch_size": size, "gradient_accumulation_steps": 4, "prefix_batches": number}
        for size in (1, 4)
        for number in (1, 4)
    ),
    *(
        {"method": f"draft_k(k={k})", "gradient_checkpointing": mode}
        for mode, ks in (("none", (1, 10)), ("blocks", (2, 10)), ("denoiser", (1, 2, 5, 10, 20)), ("both", (1, 10, 20)))
        for k in ks
    ),
    *({"batch_size": size} for size in (1, 2, 8, 16)),
    *({"reward_batch_size": size} for size in (2, 4)),
    *({"height": side, "width": side} for side in (192, 256)),
    *({"lora_rank": rank} for rank in (1, 32, 128)),
    {"guidance_scale": 1.0},
    {"mixed_precision": "bf16"},
    {"prefix_compile": True},  # the last row, since its compilation is printed below it
]

SHORT = (
    *("num_inference_steps=10", "method=draft_lv", "prefix_reuse_steps=4", "batch_size=8", "lora_rank=128"),
    *(f"method=draft_k(k=10), gradient_checkpointing={mode}" for mode in ("none", "blocks", "both")),
    *("height=192, width=192", "guidance_scale=1.0", "mixed_precision=bf16"),
)
"""The rows of --short."""


def named(change: dict[str, Any]) -> str:
    """Return the name of a row."""
    return ", ".join(f"{key}={value}" for key, value in change.items())


def trainer(args: argparse.Namespace, change: dict[str, Any]) -> tuple[Trainer, Callable[[], object]]:
    """Return a trainer and a function that runs its next update."""
    with TemporaryDirectory() as folder:
        settings = BASE | change | {"output": f"{folder}/run", "eval_rewards": "", "eval_prompts": ""}
        made = Trainer(args.model, args.reward, **settings)
    steps = itertools.count(1)
    return made, lambda: made.train_step.run(next(steps))


def several(update: Callable[[], object], count: int) -> None:
    """Run `count` updates."""
    for _ in range(count):
        update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--reward", default="emoji_aesthetic")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="measure CPU time")
    parser.add_argument("--rows", nargs="*", help="texts; only rows whose name contains one of them")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    clock = cpu_seconds if args.cpu else seconds
    base, plain = trainer(args, {})
    device = base.model.device
    plain()
    least, usual = peak_memory(plain, device), statistics.median(clock(plain) for _ in range(args.rounds))
    print(f"base: {usual:.2f} seconds, {least / 2**20:.1f} MiB\n")
    print(f"| change | seconds | times base | from | to | MiB | times the base's |\n{'|---' * 7}|")
    for change in CHANGES:
        if args.short and named(change) not in SHORT:
            continue
        if args.rows and not any(text in named(change) for text in args.rows):
            continue
        made, update = trainer(args, change)
        first = seconds(update)
        peak = peak_memory(update, device)
        shared = made.settings.prefix_reuse_steps  # updates that share a prefix are timed together
        together = partial(several, update, shared)
        pairs = [(clock(together) / shared, clock(plain)) for _ in range(args.rounds)]
        ratios, median = [a / b for a, b in pairs], statistics.median(a for a, _ in pairs)
        spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f}"
        print(f"| `{named(change)}` | {median:.2f} | {spread} | {peak / 2**20:.1f} | {peak / least:.2f} |", flush=True)
        if made.settings.prefix_compile:
            print(f"\nThe first update took {first:.1f} seconds, with compilation.", flush=True)
        del made, update


if __name__ == "__main__":
    main()
