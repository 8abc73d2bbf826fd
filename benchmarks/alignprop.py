"""Compare an update of draftune with one of TRL's AlignPropTrainer: time, memory and gradient.

    pip install . torch==2.13.0 transformers==4.57.1 diffusers==0.35.2 peft==0.17.1 accelerate==1.10.1 trl==0.23.1
    python benchmarks/alignprop.py [--model emoji] [--reward emoji_aesthetic] [--k 1 10] [--rounds 7]

Use a separate environment with releases of the time of that TRL version. Both trainers run alternately in one process,
so that other load on the machine affects both. They share the model folder, reward object, prompts, batch, sampling
steps and guidance, in float32. TRL's code is unchanged and runs by its own `step`; epoch 0 prevents a checkpoint after
every step.

Updates: the gradient flows through the last k steps (`draft_k` here, fixed truncation in TRL) into LoRAs of rank 4, as
in TRL, on the same layers. TRL's DDIM uses the spacing of the model's scheduler and ends at the first training level.
draftune is set to the same (set_alpha_to_one=False), with eta = 0. First the script prints how far images and LoRA
gradients differ for the same noise and LoRA. The gradients differ for pixels outside [0, 1]: TRL's clamp has gradient 0
there, draftune's straight-through clamp has gradient 1. Then it prints the peak memory of the tensors of one update,
the median times of --rounds pairs of updates, and the median ratio.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import itertools
import logging
import random
import statistics
import warnings
from collections.abc import Callable
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

from draftune.assets import EMBEDDED
from draftune.lora import lora_parameters
from draftune.methods import Batch
from draftune.models import DiffusionModel, load_model
from draftune.sampling.sampler import PrefixCache
from draftune.training.trainer import Trainer
from draftune.utils.memory import peak_memory
from draftune.utils.quiet import silence_libraries
from overhead import seconds


def draftune(args: argparse.Namespace, model: DiffusionModel, **settings: Any) -> Trainer:
    """Return draftune's trainer, with the model's recommended defaults for all other settings."""
    settings |= {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    with TemporaryDirectory() as folder:
        settings |= {"batch_size": args.batch_size, "output": f"{folder}/run"}
        return Trainer(model, args.reward, prompts=args.prompts, **settings)


def alignprop(ours: Trainer, **config: Any) -> tuple[AlignPropTrainer, DiffusionModel]:
    """Return TRL's trainer on draftune's model, prompts and reward, and its network as a draftune model to sample from.

    Call this after `draftune`: TRL's pipeline cannot be loaded before Accelerate is set up.
    """
    s = ours.settings
    pipeline = DefaultDDPOStableDiffusionPipeline(str(EMBEDDED.get(s.model, s.model)))
    # Before TRL's trainer adds its LoRA, since loading freezes the networks.
    model = load_model(pipeline.sd_pipeline)
    config |= {"sample_num_steps": s.num_inference_steps, "sample_guidance_scale": s.guidance_scale}
    config |= {"train_batch_size": s.batch_size, "mixed_precision": "no"}
    trainer = AlignPropTrainer(
        AlignPropConfig(**config),
        lambda images, prompts, _: (ours.reward.components(images, prompts)[0], {}),
        lambda: (random.choice(ours.prompts), {}),
        pipeline,
    )
    pipeline.set_progress_bar_config(disable=True)
    return trainer, model


def gradient(model: DiffusionModel) -> Tensor:
    """Return the LoRA's gradient as one vector and clear it."""
    parameters = lora_parameters(model).values()
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    model.denoiser.zero_grad()
    return flat


def apart(ours: Trainer, theirs: AlignPropTrainer, model: DiffusionModel) -> str:
    """Compare images and gradients of both trainers before training, for the same noise and LoRA."""
    s, prompts = ours.settings, ours.prompts[: ours.settings.batch_size]
    with torch.no_grad():
        for name, parameter in lora_parameters(ours.model).items():
            lora_parameters(model)[name].copy_(parameter)
    generator = torch.Generator().manual_seed(0)
    noise = ours.model.noise(generator, len(prompts))
    images: list[Tensor] = []

    def reward(clean: Tensor) -> Tensor:
        images.append(ours.model.decode(clean))
        return ours.reward.components(images[-1], prompts)[0]

    denoise = ours.model.denoiser_for(prompts, ours.schedule, s.guidance_scale)
    for loss in ours.method.losses(
        [Batch(prompts, PrefixCache(noise), ours.schedule, denoise, denoise, reward, generator)]
    ):
        loss.backward()
    with patch.object(theirs.sd_pipeline.sd_pipeline, "prepare_latents", return_value=noise):
        samples = theirs._generate_samples(len(prompts), prompts=prompts)
    theirs.calculate_loss(theirs.compute_rewards(samples)).backward()
    distance = float((images[0] - samples["images"]).abs().max())
    here, there = gradient(ours.model), gradient(model)
    cosine = float(here @ there / (here.norm() * there.norm()))
    return f"images differ by {distance:.1e}; gradients {here.norm():.3g}, TRL {there.norm():.3g}, cosine {cosine:.4f}"


def time_updates(args: argparse.Namespace, k: int) -> dict[str, Any]:
    """Print and return memory and time of updates with gradient through the last k steps."""
    model = load_model(args.model)
    same = {"timestep_spacing": model.sampler().config.timestep_spacing, "set_alpha_to_one": False}
    # Like TRL's trainer: recompute whole calls, and sample a new prefix for each update.
    same |= {"gradient_checkpointing": "blocks" if k == 1 else "denoiser", "prefix_reuse_steps": 1}
    ours = draftune(args, model, method=f"draft_k(k={k})", lora_rank=4, eval_rewards="", **same)
    fixed = {"truncated_backprop_rand": False, "truncated_backprop_timestep": ours.settings.num_inference_steps - k}
    theirs, model = alignprop(ours, sample_eta=0.0, **fixed)
    start = apart(ours, theirs, model)
    print(f"k={k}  start: {start}", flush=True)
    count = itertools.count(1)
    pair: list[Callable[[], object]] = [lambda: ours.train_step.run(next(count)), lambda: theirs.step(0, 0)]
    for update in pair:
        update()
    peaks = [peak_memory(update, ours.model.device) for update in pair]
    here, there = (peak / 2**20 for peak in peaks)
    print(f"k={k}  memory: draftune {here:.1f} MiB, TRL {there:.1f} MiB, ratio {there / here:.2f}", flush=True)
    pairs = [[seconds(update) for update in pair] for _ in range(args.rounds)]
    here, there = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"k={k}  update: draftune {here:.3f} s, TRL {there:.3f} s, ratio {ratio:.3f}", flush=True)
    values = {"seconds": here, "TRL_seconds": there, "TRL_by_draftune": ratio, "start": start}
    return {**values, "peak_bytes": peaks[0], "TRL_peak_bytes": peaks[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="'emoji' or the folder of a StableDiffusionPipeline")
    parser.add_argument("--reward", help="a reward of draftune; default, also of the next three: the recommendation")
    parser.add_argument("--prompts")
    parser.add_argument("--steps", type=int, help="sampling steps T")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 10], help="last steps with gradient")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of updates")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"TRL {version('trl')}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with silence_libraries():
        for k in args.k:
            time_updates(args, k)


if __name__ == "__main__":
    main()
