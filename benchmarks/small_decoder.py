"""Measure the effect of a tiny decoder for the reward gradient on the embedded model (`tiny_decoder`).

    python benchmarks/small_decoder.py --output small [--minutes 4] [--steps 45] [--seeds 0 1]

An AutoencoderTiny is distilled from the model's decoder, on latents that the model samples and mixtures of them. If
--output already holds a decoder, it is used instead. The script prints how similar the images and the reward gradients
of both decoders are, on latents of other prompts. Then it trains with and without the tiny decoder. The results are
evaluated with the full decoder, and the similarity is measured again on the fine-tuned model's latents, since training
through the tiny decoder could exploit its errors.
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
from draftune.models import DiffusionModel, load_model
from draftune.models.common import decode_vae
from draftune.models.tiny_decoder import load_small_decoder
from draftune.prompts import load_prompts
from draftune.rewards import load_reward
from draftune.sampling.sampler import rollout
from draftune.training.trainer import Trainer
from embedded import SETTINGS

REWARD = "emoji_aesthetic"
WIDTH, BLOCKS = 32, (3, 1, 0)
SAMPLED, EVAL_PREFIX = 192, 32
"""Number of latents for training and for measurement."""
BATCH, MIXED = 8, 384
"""Batch size, and number of batches of mixtures."""


@torch.no_grad()
def sample_latents(model: DiffusionModel, prompts: Sequence[str], count: int, seed: int, steps: int = 10) -> Tensor:
    """Sample clean latents [count, C, H, W] with the guidance scale of a run."""
    schedule, generator, latents = model.schedule(steps), torch.Generator().manual_seed(seed), []
    chosen = itertools.islice(itertools.cycle(prompts), count)
    while batch := list(itertools.islice(chosen, BATCH)):
        denoise = model.denoiser_for(batch, schedule, 3.0)
        latents.append(rollout(denoise, schedule.steps, model.noise(generator, len(batch))))
    return torch.cat(latents)


@torch.no_grad()
def mixed(model: DiffusionModel, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Interpolate random pairs of latents, add noise to half of them, and decode: (latents, images).

    The mixtures cover latents that training may reach outside of the model's distribution.
    """
    first, second = (latents[torch.randint(len(latents), (BATCH,), generator=generator)] for _ in range(2))
    angle = (torch.rand(BATCH, 1, 1, 1, generator=generator) - 0.5).clamp(min=0) * torch.pi / 2
    level = 0.4 * (torch.rand(BATCH, 1, 1, 1, generator=generator) - 0.5).clamp(min=0)
    noise = torch.randn(first.shape, generator=generator)
    mixture = angle.cos() * first + angle.sin() * second + level * noise
    return mixture, model._decode(mixture)


def distill_decoder(model: DiffusionModel, latents: Tensor, minutes: float, folder: Path) -> None:
    """Train a tiny decoder for `minutes` and save it, with an untrained encoder."""
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
    batches = [mixed(model, latents, generator) for _ in range(MIXED)]
    start, step = time.perf_counter(), 0
    while (progress := (time.perf_counter() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - progress)
        inputs, targets = batches[step % len(batches)]
        error = decode_vae(small, inputs, mean=small.config.shift_factor) - targets
        # Differences between neighboring pixels matter for the reward gradient.
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + edges
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(
                f"{step} steps, {60 * minutes * progress:.0f} s: mean error {float(error.detach().abs().mean()):.4f}",
                flush=True,
            )
    small.save_pretrained(folder)


def print_similarity(name: str, model: DiffusionModel, small: Any) -> None:
    """Print the similarity of both decoders' images and reward gradients on latents of the model."""
    reward, prompts = load_reward(REWARD), load_prompts("emoji-common")[:EVAL_PREFIX]
    latents = sample_latents(model, prompts, EVAL_PREFIX, 1, 20)
    images, scores, gradients = [], [], []
    for decoder in (None, small):
        model.tiny_decoder = decoder
        decoded = [(x := latent[None].clone().requires_grad_(), model.decode(x)) for latent in latents]
        scored = [reward(image, [prompt]).sum() for (_, image), prompt in zip(decoded, prompts, strict=True)]
        slopes = [torch.autograd.grad(score, x)[0] for score, (x, _) in zip(scored, decoded, strict=True)]
        images.append(torch.cat([image.detach() for _, image in decoded]))
        scores.append(statistics.mean(float(score.detach()) for score in scored))
        gradients.append(torch.cat(slopes).flatten(1))
    model.tiny_decoder = None
    difference = images[0] - images[1]
    error, cosines = float(difference.square().mean()), cosine_similarity(gradients[0], gradients[1])
    print(
        f"{name}, {EVAL_PREFIX} latents: mean error {float(difference.abs().mean()):.4f} of [0, 1], "
        f"PSNR {-10 * math.log10(error):.1f} dB, {1 - error / float(images[0].var()):.4f} of the variance explained; "
        f"cosine of the latent gradients {float(cosines.mean()):.3f} ± {float(cosines.std()):.3f}; "
        f"{REWARD} {scores[0]:.3f} with the full decoder, {scores[1]:.3f} with the tiny one",
        flush=True,
    )


def trained(settings: dict[str, Any], small: Any) -> dict[str, float]:
    """Train and return the seconds of an update and the final scores."""
    model = load_model("emoji")
    with TemporaryDirectory() as folder:
        run = draftune.train(model, REWARD, **settings, output=f"{folder}/run")
        assert run.comparison is not None
        last = run.metrics[-1]
        scores = {name: tuned for name, (_, tuned) in run.comparison.scores.items()}
        print_similarity("fine-tuned model", model, small)
        return {"seconds": last["train_seconds"] / last["step"], "in training": last["reward"], **scores}


def timed(settings: dict[str, Any], decoders: Sequence[str | None], rounds: int = 7) -> list[float]:
    """Return the median seconds of an update with each decoder, timed alternately."""
    updates: list[Callable[[], object]] = []
    for decoder in decoders:
        with TemporaryDirectory() as folder:
            made = Trainer("emoji", REWARD, **settings, tiny_decoder=decoder, output=f"{folder}/run")
        made.train_step.folder = None
        steps = itertools.count(1)
        updates.append(lambda made=made, steps=steps: made.train_step.run(next(steps)))  # type: ignore[misc]
    times: list[list[float]] = [[] for _ in updates]
    for _ in range(rounds + 1):
        for update, seconds in zip(updates, times, strict=True):
            start = time.perf_counter()
            update()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the tiny decoder")
    parser.add_argument("--minutes", type=float, default=4, help="minutes of distillation (default: 4)")
    parser.add_argument("--method", default="draft_lv")
    parser.add_argument("--steps", type=int, default=45, help="updates of each run (default: 45)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    args = parser.parse_args()
    model = load_model("emoji")
    if not args.output.exists():
        distill_decoder(model, sample_latents(model, load_prompts("emoji"), SAMPLED, 0), args.minutes, args.output)
    small = load_small_decoder(args.output, model)
    print_similarity("base model", model, small)
    settings = SETTINGS | {"method": args.method, "steps": args.steps}
    settings |= {"checkpointing_steps": 0, "log_images_steps": 0}
    decoders = [None, str(args.output)]
    times = timed(settings, decoders)
    print(
        f"seconds an update: {times[0]:.2f} full, {times[1]:.2f} tiny, ratio {times[1] / times[0]:.2f}",
        flush=True,
    )
    for seed in args.seeds:
        for decoder in decoders:
            scores = trained({**settings, "seed": seed, "tiny_decoder": decoder}, small)
            print(json.dumps({"seed": seed, "decoder": "tiny" if decoder else "full", **scores}), flush=True)


if __name__ == "__main__":
    main()
