"""Trainers of a small Stable Diffusion on any device, for tests/test_gpu.py, which also starts this with torchrun."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, distributed

import draftune
from draftune.models import load_model
from draftune.training.trainer import Trainer
from draftune.utils.processes import shutdown

PROMPTS = ["a cat", "a dog", "a bird"]
SETTINGS: dict[str, Any] = {
    "method": "draft_k(k=2)",
    "steps": 1,
    "batch_size": 2,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "learning_rate": 0.01,
    "max_grad_norm": 0.0,
    "lora_rank": 2,
    "mixed_precision": "no",
    "prefix_reuse_steps": 20,  # an update of `gradient` that overflows in fp16 is repeated on the same batch
    "eval_prompts": "",
}


class Cut(draftune.Callback):
    """Interrupt the run after an update's checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, step: int) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def waves(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward whose gradient differs from pixel to pixel."""
    return torch.sin(6 * images).mean((1, 2, 3))


def noisy(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that samples random numbers on the device of the images."""
    return waves(images, prompts) * (1 + 0.1 * torch.rand(len(images), device=images.device))


def trainer(
    folder: Path,
    output: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    reward: Any = waves,
    callbacks: Sequence[draftune.Callback] = (),
    **values: Any,
) -> Trainer:
    """Return a trainer of the pipeline in a folder, whose noise is the same in every precision."""
    source: Any = folder
    if dtype != torch.float32:
        source = load_model(DiffusionPipeline.from_pretrained(folder).to(dtype))
    settings = SETTINGS | values | {"device": device.type, "output": str(output / "run")}
    made = Trainer(source, reward, PROMPTS, callbacks=callbacks, **settings)
    model = made.model

    def noise(generators: torch.Generator | Sequence[torch.Generator], count: int) -> Tensor:
        own = [generators] if isinstance(generators, torch.Generator) else generators
        each = [torch.randn(count // len(own), *model.latent_shape, generator=generator) for generator in own]
        return torch.cat(each).to(model.device, model.dtype)

    model.noise = noise  # type: ignore[method-assign]
    return made


def gradient(made: Trainer) -> Tensor:
    """Return the gradient of an update for a LoRA with given weights, as one vector in float64 on the CPU."""
    generator, parameters = torch.Generator().manual_seed(0), made.train_step.parameters
    weights = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in sorted(parameters.items())}
    for step in range(1, made.settings.prefix_reuse_steps):
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        if math.isfinite(made.train_step.run(step)["grad_norm"]):
            break
    gradients = [parameters[name].grad for name in weights]
    return torch.cat([g.detach().double().cpu().flatten() for g in gradients if g is not None])


def main(model: Path, folder: Path, device: torch.device) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    made = trainer(model, folder, device)
    save_file({"gradient": gradient(made)}, folder / "gradient.safetensors")
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    reduced = torch.arange(1.0, 4.0, device=device)
    gathered = [torch.empty_like(reduced)]
    distributed.all_gather(gathered, reduced)
    distributed.all_reduce(reduced)
    facts = {"backend": distributed.get_backend(), "reduced": reduced.tolist(), "gathered": gathered[0].tolist()}
    (folder / "facts.json").write_text(json.dumps(facts))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), torch.device(sys.argv[3]))
