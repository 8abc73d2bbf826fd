"""What a small decoder for the gradient is worth on the embedded model: distilled here, then trained through.

    python benchmarks/small_decoder.py --output small [--minutes 4] [--steps 45] [--seeds 0 1]

A decoder of the class that diffusers publishes small ones in learns to draw what the model's own draws, from latents
that the model samples and mixtures of them; a folder that holds one is taken as it is. Told are its likeness on latents
of other prompts, and how much of the training reward's gradient it keeps there. Then the same run is made with and
without it. What each ends with is measured on pictures of the model's own decoder, and the likeness once more on its
latents: a run through the small decoder might lead to where that one alone shows a reward.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import draftune
from draftune.models import Model, load_model
from draftune.models.tiny_decoder import decode_small, load_small_decoder
from draftune.prompts import load_prompts
from draftune.rewards import load_reward
from draftune.sampling.sampler import rollout
from draftune.training.train import prepare

REWARD = "emoji_aesthetic"
WIDTH, BLOCKS = 32, (3, 1, 0)
SAMPLED, HELD_OUT = 192, 32
"""Latents to learn from, and to measure on."""
BATCH, MIXED = 8, 384
"""Latents at once, and such batches of mixtures."""


@torch.no_grad()
def sample_latents(model: Model, prompts: Sequence[str], count: int, seed: int, steps: int = 10) -> Tensor:
    """Clean latents [count, C, H, W], as a run with its guidance draws them."""
    schedule, generator, found = model.schedule(steps), torch.Generator().manual_seed(seed), []
    chosen = itertools.islice(itertools.cycle(prompts), count)
    while batch := list(itertools.islice(chosen, BATCH)):
        denoise = model.denoise(batch, schedule, 3.0)
        found.append(rollout(denoise, schedule.steps, model.noise(generator, len(batch))))
    return torch.cat(found)


@torch.no_grad()
def mixed(model: Model, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch between two of the latents, half of them with noise, as training leads astray; and their pictures."""
    first, second = (latents[torch.randint(len(latents), (BATCH,), generator=generator)] for _ in range(2))
    angle = (torch.rand(BATCH, 1, 1, 1, generator=generator) - 0.5).clamp(min=0) * torch.pi / 2
    level = 0.4 * (torch.rand(BATCH, 1, 1, 1, generator=generator) - 0.5).clamp(min=0)
    noise = torch.randn(first.shape, generator=generator)
    mixture = angle.cos() * first + angle.sin() * second + level * noise
    return mixture, model.decode_raw(mixture)


def distil(model: Model, latents: Tensor, minutes: float, folder: Path) -> None:
    """Trains a small decoder on pictures and saves it, with an encoder that has learned nothing."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    stages = len(model.pipeline.vae.config.block_out_channels)
    small = AutoencoderTiny(
        latent_channels=model.latent_shape[0],
        decoder_block_out_channels=(WIDTH,) * stages,
        num_decoder_blocks=BLOCKS,
        encoder_block_out_channels=(8,) * stages,
        num_encoder_blocks=(0,) * stages,
    )
    small.decoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(small.decoder.parameters(), lr=2e-3, weight_decay=0.0)
    seen = [mixed(model, latents, generator) for _ in range(MIXED)]
    start, step = time.perf_counter(), 0
    while (passed := (time.perf_counter() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - passed)
        some, wanted = seen[step % len(seen)]
        error = decode_small(small, some) - wanted
        # What differs between neighbouring pixels is what a gradient lives on.
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + edges
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(
                f"{step} steps, {60 * minutes * passed:.0f} s: mean error {float(error.detach().abs().mean()):.4f}",
                flush=True,
            )
    small.save_pretrained(folder)


def told(name: str, model: Model, small: Any) -> None:
    """How like the own decoder's its pictures are, and the reward's gradients through them, on latents of the model."""
    reward, prompts = load_reward(REWARD), load_prompts("emoji-common")[:HELD_OUT]
    latents = sample_latents(model, prompts, HELD_OUT, 1, 20)
    pictures, scores, gradients = [], [], []
    for decoder in (None, small):
        model.small_decoder = decoder
        drawn = [(x := latent[None].clone().requires_grad_(), model.decode(x)) for latent in latents]
        scored = [reward(picture, [prompt]).sum() for (_, picture), prompt in zip(drawn, prompts, strict=True)]
        slopes = [torch.autograd.grad(score, x)[0] for score, (x, _) in zip(scored, drawn, strict=True)]
        pictures.append(torch.cat([picture.detach() for _, picture in drawn]))
        scores.append(statistics.mean(float(score.detach()) for score in scored))
        gradients.append(torch.cat(slopes).flatten(1))
    model.small_decoder = None
    difference = pictures[0] - pictures[1]
    error, alike = float(difference.square().mean()), cosine_similarity(*gradients)
    print(
        f"{name}, {HELD_OUT} latents: mean error {float(difference.abs().mean()):.4f} of [0, 1], "
        f"PSNR {-10 * math.log10(error):.1f} dB, {1 - error / float(pictures[0].var()):.4f} of the variance explained; "
        f"cosine of the gradients by the latents {float(alike.mean()):.3f} ± {float(alike.std()):.3f}; "
        f"{REWARD} {scores[0]:.3f} by its own, {scores[1]:.3f} by the small one",
        flush=True,
    )


def trained(settings: dict[str, Any], small: Any) -> dict[str, float]:
    """What a run ends with."""
    model = load_model("emoji")
    with TemporaryDirectory() as folder:
        run = draftune.train(model, REWARD, **settings, output=f"{folder}/run")
        assert run.comparison is not None
        last = run.metrics[-1]
        scores = {name: tuned for name, (_, tuned) in run.comparison.scores.items()}
        told("tuned model", model, small)
        return {"seconds": last["seconds"] / last["step"], "in training": last["reward"], **scores}


def timed(settings: dict[str, Any], decoders: Sequence[str | None], rounds: int = 7) -> list[float]:
    """Seconds of an update with each decoder, in turn, so that what else the machine does falls on all."""
    updates: list[Callable[[], object]] = []
    for decoder in decoders:
        with TemporaryDirectory() as folder:
            made = prepare("emoji", REWARD, **settings, gradient_decoder=decoder, output=f"{folder}/run")
        made.updates.folder = None
        steps = itertools.count(1)
        updates.append(lambda made=made, steps=steps: made.updates.update(next(steps)))  # type: ignore[misc]
    taken: list[list[float]] = [[] for _ in updates]
    for _ in range(rounds + 1):
        for update, seconds in zip(updates, taken, strict=True):
            start = time.perf_counter()
            update()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the small decoder's folder")
    parser.add_argument("--minutes", type=float, default=4, help="of distillation")
    parser.add_argument("--method", default="draft_lv")
    parser.add_argument("--steps", type=int, default=45, help="updates of each run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    args = parser.parse_args()
    model = load_model("emoji")
    if not args.output.exists():
        distil(model, sample_latents(model, load_prompts("emoji"), SAMPLED, 0), args.minutes, args.output)
    small = load_small_decoder(args.output, model)
    told("base model", model, small)
    settings = {"method": args.method, "steps": args.steps, "save_every": 0, "sample_every": 0}
    decoders = [None, str(args.output)]
    times = timed(settings, decoders)
    print(
        f"seconds an update, in turn: {times[0]:.2f} own, {times[1]:.2f} small, {times[1] / times[0]:.2f} times",
        flush=True,
    )
    for seed in args.seeds:
        for decoder in decoders:
            found = trained({**settings, "seed": seed, "gradient_decoder": decoder}, small)
            print(json.dumps({"seed": seed, "decoder": "small" if decoder else "own", **found}), flush=True)


if __name__ == "__main__":
    main()
