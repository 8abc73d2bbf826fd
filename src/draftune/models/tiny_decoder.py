"""The tiny decoder: an AutoencoderTiny of diffusers that decodes latents with gradient during training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftune.errors import DraftuneError
from draftune.sampling.sampler import rollout
from draftune.utils.hub import fetch, is_hub_id, unreachable
from draftune.utils.loading import load_part
from draftune.utils.paths import user_path
from draftune.utils.weightless import fake_mode

if TYPE_CHECKING:
    from draftune.models.base import DiffusionModel
    from draftune.sampling.schedule import Schedule

OPTION = "--tiny-decoder"
CLASS = "AutoencoderTiny"
FILES = ["config.json", "diffusion_pytorch_model*.safetensors"]
ALIKE = 0.5
"""The minimal explained variance (R^2) of the full decoder's images by the tiny decoder's images."""


def find_small_decoder(name: str) -> Path:
    """Return the folder of an AutoencoderTiny, downloaded if necessary, without loading it.

    Args:
        name: Its path or its hub id.

    Raises:
        DraftuneError: There is no such folder, or it has another class or no safetensors.
    """
    folder = user_path(name)
    if not folder.exists():
        if not is_hub_id(name):
            raise DraftuneError(f"no folder {name!r}: {OPTION} takes the folder of an {CLASS}, or a hub id")
        folder = fetched(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        class_name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DraftuneError(
            f"{name!r} is not the folder of an {CLASS}: its config.json can't be read ({OPTION})"
        ) from error
    if class_name != CLASS:
        raise DraftuneError(f"{name!r} holds a {class_name}, not an {CLASS} ({OPTION})")
    if fake_mode() is None and not any(folder.glob("*.safetensors")):
        raise DraftuneError(f"{name!r} holds no .safetensors file; other formats are not read ({OPTION})")
    return folder


def fetched(name: str) -> Path:
    """Return the folder of a hub id, downloaded or from the cache. Raises DraftuneError if it is not complete."""
    from huggingface_hub import snapshot_download

    try:
        folder = fetch(snapshot_download, name, allow_patterns=FILES if fake_mode() is None else FILES[:1])
    except Exception as error:
        raise unreachable(name, OPTION, error=error) from error
    if not (folder / FILES[0]).is_file():
        raise unreachable(name, OPTION)  # without a network, the cache may hold only some of the files
    return folder


def load_small_decoder(folder: Path, model: DiffusionModel) -> Any:
    """Load the AutoencoderTiny in a folder, frozen. Raises DraftuneError if it does not fit the model's latents."""
    from diffusers import AutoencoderTiny

    if model.pixel_space:
        raise DraftuneError(f"{model.name!r} works in pixel space and has no decoder: leave out {OPTION}")
    small = load_part(AutoencoderTiny, folder).eval().requires_grad_(False)
    config = small.config
    levels = len(config.decoder_block_out_channels) - 1
    scale = config.upsampling_scaling_factor**levels
    for what, value, expected in (
        ("latent channels", config.latent_channels, model.latent_shape[0]),
        ("pixels per latent side", scale, model.pixels_per_latent),
        ("image channels", config.out_channels, 3),
    ):
        if value != expected:
            raise DraftuneError(
                f"the decoder in {str(folder)!r} has {value} {what}, and {model.name!r} has {expected}: give a decoder "
                f"that was trained for this model ({OPTION})"
            )
    return small


def check_likeness(
    model: DiffusionModel, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
) -> float:
    """Compare the images of the tiny decoder with those of the model's own decoder, on sampled latents.

    Returns:
        The explained variance R^2 = 1 - MSE / variance, at most 1.

    Raises:
        DraftuneError: R^2 is below 0.5, as for a decoder of other latents with the same shape.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with torch.no_grad():
        denoise = model.denoiser_for(prompts, schedule, guidance_scale, negative_prompt)
        latents, schedule = model.start(generators, len(prompts), schedule)
        latents = rollout(denoise, schedule.steps, latents)
        own = model.decode(latents)
    other = model.decode(latents.requires_grad_()).detach()
    explained = 1 - float((own - other).square().mean() / own.var())
    if explained < ALIKE:
        raise DraftuneError(
            f"the tiny decoder explains {max(0.0, explained):.0%} of the variance of the images of {model.name!r}, and "
            f"at least {ALIKE:.0%} is needed: give a decoder that was trained for this model ({OPTION})"
        )
    return explained
