"""Compare cheaper prefixes with the exact one: time, latent, gradient, and the reward after an equal time.

The tables `prefix` and `race` of `benchmarks/levers.py`.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.evaluation.metrics import evaluate
from draftune.lora import lora_parameters
from draftune.methods import Batch
from draftune.sampling.sampler import PrefixCache
from draftune.training.prefix_mode import PrefixMode, check_prefix_sampler
from draftune.training.trainer import Trainer
from embedded import settings_for

PREFIXES: list[dict[str, Any]] = [
    {},
    *({"prefix_stride": stride} for stride in (2, 4)),
    *({"prefix_cache": f"taylorseer(interval={i})"} for i in (2, 3, 4)),
    *({"prefix_cache": f"taylorseer(interval={i}, order=0)"} for i in (2, 4)),
    *({"prefix_cache": f"first_block_cache(threshold={threshold})"} for threshold in (0.05, 0.1, 0.2, 0.4)),
    {"prefix_precision": "bf16"},
    {"prefix_cache": "taylorseer(interval=2)", "prefix_precision": "bf16"},
]
FOUR = {"prefix_reuse_steps": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "R = 1": {"prefix_reuse_steps": 1},
    "R = 4": FOUR,
    "R by cosine 0.95, from 4": FOUR | {"prefix_reuse_cosine": 0.95},
    "R = 4, taylorseer(interval=2), bf16": FOUR
    | {"prefix_cache": "taylorseer(interval=2)", "prefix_precision": "bf16"},
}


def gradient(trainer: Trainer, prompts: Sequence[str], latents: PrefixCache) -> Tensor:
    """Compute the method's gradient for a batch as one vector, with the same random numbers in every call."""
    s, model = trainer.settings, trainer.model
    denoise, base = model.denoisers_for(prompts, trainer.schedule, s.guidance_scale)

    def reward(clean: Tensor) -> Tensor:
        return trainer.reward.components(model.decode(clean), prompts)[0]

    generator = torch.Generator().manual_seed(0)
    parameters = list(lora_parameters(model).values())
    total = torch.zeros(sum(p.numel() for p in parameters))
    for loss in trainer.method.losses([Batch(prompts, latents, trainer.schedule, denoise, base, reward, generator)]):
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    return total


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def prefix(args: argparse.Namespace) -> None:
    """Print CPU time, latent and gradient of cheaper prefixes against the exact one, after the last of `--starts`."""
    with TemporaryDirectory() as folder:
        settings = settings_for(args.model) | {"method": "draft_k(k=1)", "mixed_precision": "no"}
        settings |= {"height": args.height, "width": args.height}
        settings |= {"eval_rewards": "", "eval_prompts": "", "output": f"{folder}/run"}
        trainer = Trainer(args.model, args.reward, **settings)
    for step in range(max(args.starts, default=0)):
        trainer.train_step.run(step + 1)
    own, model, steps = trainer.settings, trainer.model, trainer.schedule.steps
    rows: dict[str, list[tuple[float, ...]]] = {}
    for i in range(args.batches):
        prompts = [trainer.prompts[(own.batch_size * i + j) % len(trainer.prompts)] for j in range(own.batch_size)]
        noise = model.noise(torch.Generator().manual_seed(i), len(prompts))
        denoise = model.denoiser_for(prompts, trainer.schedule, own.guidance_scale)
        for change in PREFIXES:
            s, latents = replace(own, **change), PrefixCache(noise, stride=change.get("prefix_stride", 1))
            try:
                check_prefix_sampler(s, model, trainer.schedule)
            except DraftuneError:
                continue
            start = time.process_time()
            with torch.no_grad(), PrefixMode(s, model)(denoise, trainer.schedule) as cheaper:
                x = latents.get(len(steps) - 1, cheaper, steps)
            spent, found = time.process_time() - start, gradient(trainer, prompts, latents)
            if not change:
                exact = x, spent, found
            moved, ratio = (
                float(a / b) for a, b in (((x - exact[0]).norm(), x.norm()), (found.norm(), exact[2].norm()))
            )
            name = ", ".join(f"{key}={value}" for key, value in change.items()) or "exact"
            rows.setdefault(name, []).append((spent / exact[1], moved, cosine(found, exact[2]), ratio))
    print(f"\nAfter {max(args.starts, default=0)} updates, {args.batches} batches; medians, and the lowest cosine\n")
    print(
        "| prefix | time | latent moved by | cosine of gradients | lowest | ratio of norms |\n|---|---|---|---|---|---|"
    )
    for name, measured in rows.items():
        spent, moved, along, norms = (statistics.median(column) for column in zip(*measured, strict=True))
        lowest = min(row[2] for row in measured)
        print(f"| `{name}` | {spent:.2f} | {moved:.1%} | {along:.3f} | {lowest:.3f} | {norms:.2f} |", flush=True)


def trained(args: argparse.Namespace, variant: str, seed: int) -> dict[str, float]:
    """Train for the given time and return the updates, the time and the scores."""
    with TemporaryDirectory() as folder:
        settings = settings_for(args.model) | {"method": "draft_k(k=1)", "output": f"{folder}/run", "seed": seed}
        settings |= VARIANTS[variant]
        trainer = Trainer(args.model, args.reward, **settings)
        spent, updates = 0.0, 0
        while spent < args.seconds:
            start, updates = time.process_time(), updates + 1
            row = trainer.train_step.run(updates)
            spent += time.process_time() - start
        c = trainer.context
        assert c.eval_prompts is not None
        found = evaluate(c.sample_images, c.reward, c.eval_rewards, c.eval_prompts[:16], 2, c.model.device).scores
        last = row.get("prefix_reuse_steps", trainer.settings.prefix_reuse_steps)
        return {"updates": updates, "seconds": spent, "R at the end": last, **found}


def race(args: argparse.Namespace) -> None:
    """Train each variant for an equal CPU time in updates, and print its scores on 16 prompts, 2 images each."""
    rows: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for seed in args.seeds:
        for variant, found in rows.items():
            found.append(trained(args, variant, seed))
            if len(found) == 1 and variant == next(iter(rows)):
                print("| | seed | " + " | ".join(found[0]) + " |\n|" + "---|" * (2 + len(found[0])))
            line = " | ".join(f"{value:.4g}" for value in found[-1].values())
            print(f"| {variant} | {seed} | {line} |", flush=True)
    for variant, found in rows.items():
        means = (statistics.mean(row[name] for row in found) for name in found[0])
        print(f"| {variant} | mean | " + " | ".join(f"{value:.4g}" for value in means) + " |")
