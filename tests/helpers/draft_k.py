"""The gradient of DRaFT-K through a model family, against plain autograd through diffusers' own networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from draftune.lora import add_lora, lora_parameters
from draftune.methods import Batch, DraftK
from draftune.models import load_model
from draftune.sampling.sampler import PrefixCache


def reward(images: Tensor) -> Tensor:
    return torch.sin(3 * images).mean((1, 2, 3))


def check_draft_k(
    pipeline: Any,
    checkpointing: str,
    prompts: Sequence[str],
    official: Callable[[Tensor], Tensor],
    size: int | None = None,
    steps: int = 3,
    k: int = 2,
    **lora: Any,
) -> None:
    """Compare the gradient of every LoRA tensor, of a guidance scale of 3, in float64, to 1e-9.

    Args:
        pipeline: diffusers' pipeline in float64. Its denoiser gets a random LoRA.
        checkpointing: What is recomputed.
        prompts: One for each image.
        official: From noise to images before they are clamped, by the pipeline's networks, with a graph of k steps.
        size: Height and width of the images in pixels.
        steps: Number of sampling steps.
        k: Number of steps with gradient.
        lora: More arguments of `add_lora`.
    """
    model = load_model(pipeline)
    model.set_checkpointing(checkpointing)
    model.set_size(size, size)
    add_lora(model, 2, **lora)
    parameters = lora_parameters(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert all(parameter.dtype == torch.float64 for parameter in parameters.values())
    noise = torch.randn(len(prompts), *model.latent_shape, generator=generator, dtype=torch.float64)
    schedule = model.schedule(steps)
    denoise = model.denoiser_for(prompts, schedule, 3.0)
    batch = Batch(prompts, PrefixCache(noise), schedule, denoise, denoise, lambda x: reward(model.decode(x)), generator)
    for loss in DraftK(k).losses([batch]):
        (-loss).backward()
    ours = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    assert ours.keys() == parameters.keys()

    for parameter in parameters.values():
        parameter.grad = None
    images = official(noise)
    reward(images + (images.clamp(0, 1) - images).detach()).mean().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert (ours[name] - parameter.grad).norm() < 1e-9 * parameter.grad.norm(), name
