"""A small decoder for the gradient: diffusers' AutoencoderTiny in the place of the model's own, in training alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.sampling.sampler import rollout
from draftune.utils.hub import fetch, is_hub_id, unreachable
from draftune.utils.loading import load_part
from draftune.utils.paths import user_path

if TYPE_CHECKING:
    from draftune.models.base import Model
    from draftune.sampling.schedule import Schedule

OPTION = "--gradient-decoder"
CLASS = "AutoencoderTiny"
FILES = ["config.json", "diffusion_pytorch_model*.safetensors"]
ALIKE = 0.5
"""The least share of the variance of the model's own pictures that its small decoder must explain."""


def find_small_decoder(name: str) -> Path:
    """The folder of an AutoencoderTiny, by its path or by its hub id; nothing is loaded yet.

    Raises DraftuneError where there is none, or it holds another class or no safetensors.
    """
    folder = user_path(name)
    if not folder.exists():
        if not is_hub_id(name):
            raise DraftuneError(f"no folder {name!r}: {OPTION} takes the folder of an {CLASS}, or a hub id")
        folder = fetched(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DraftuneError(
            f"{name!r} is not the folder of an {CLASS}: its config.json can't be read ({OPTION})"
        ) from error
    if found != CLASS:
        raise DraftuneError(f"{name!r} holds a {found}, not an {CLASS} ({OPTION})")
    if not any(folder.glob("*.safetensors")):
        raise DraftuneError(f"{name!r} holds no .safetensors file; other formats are not read ({OPTION})")
    return folder


def fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = fetch(snapshot_download, name, allow_patterns=FILES)
    except Exception as error:
        raise unreachable(name, OPTION, error=error) from error
    if not (folder / FILES[0]).is_file():
        raise unreachable(name, OPTION)  # what was fetched before is not all of it
    return folder


def load_small_decoder(folder: Path, model: Model) -> Any:
    """The AutoencoderTiny in a folder, frozen. Raises DraftuneError where it does not fit the model's latents."""
    from diffusers import AutoencoderTiny

    if model.in_pixels:
        raise DraftuneError(f"{model.name!r} works in pixels, which nothing decodes: leave out {OPTION}")
    small = load_part(AutoencoderTiny, folder).eval().requires_grad_(False)
    own, config = model.pipeline.vae.config, small.config
    levels = len(config.decoder_block_out_channels) - 1
    for what, its, wanted in (
        ("channels of a latent", config.latent_channels, model.latent_shape[0]),
        (
            "pixels along a latent's side",
            config.upsampling_scaling_factor**levels,
            2 ** (len(own.block_out_channels) - 1),
        ),
        ("colours of a picture", config.out_channels, 3),
    ):
        if its != wanted:
            raise DraftuneError(
                f"the decoder in {str(folder)!r} has {its} {what}, and {model.name!r} has {wanted}: give one that was "
                f"made for this model ({OPTION})"
            )
    return small


def decode_small(small: Any, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], nominally in [0, 1], of clean latents as the pipeline holds them."""
    latents = latents.to(small.dtype) / small.config.scaling_factor + small.config.shift_factor
    pictures: Tensor = small.decode(latents).sample / 2 + 0.5
    return pictures


def check_likeness(
    model: Model, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
) -> float:
    """The share of the variance of the model's own pictures that its small decoder's explain, at most 1.

    Raises DraftuneError where it is so low that the decoder was made for other latents of the same shape.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with torch.no_grad():
        denoise = model.denoise(prompts, schedule, guidance_scale, negative_prompt)
        latents = rollout(denoise, schedule.steps, model.noise(generators, len(prompts)))
        own = model.decode(latents)
    other = model.decode(latents.requires_grad_()).detach()
    explained = 1 - float((own - other).square().mean() / own.var())
    if explained < ALIKE:
        raise DraftuneError(
            f"the small decoder explains {max(0.0, explained):.0%} of the variance of the pictures that {model.name!r} "
            f"draws: give one that was made for this model ({OPTION})"
        )
    return explained
