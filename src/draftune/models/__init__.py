"""Text-to-image models: one adapter per family of diffusers pipelines."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError, out_of_memory
from draftune.models.base import DTYPES, Model
from draftune.models.dit import DiT
from draftune.models.flux import Flux
from draftune.models.pixart import PixArt
from draftune.models.stable_diffusion import StableDiffusion
from draftune.models.stable_diffusion_3 import StableDiffusion3
from draftune.models.stable_diffusion_xl import StableDiffusionXL
from draftune.models.unconditional import Pixels
from draftune.utils.hub import fetch, is_hub_id, unreachable
from draftune.utils.loading import TOKENIZER_FILES, first_line, load_part, saved_dtype
from draftune.utils.paths import user_path
from draftune.utils.quiet import quiet
from draftune.utils.single_file import no_pipeline_error

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["FAMILIES", "MODELS", "Model", "StableDiffusion", "load_model"]

FAMILIES: dict[str, type[Model]] = {
    "DDIMPipeline": Pixels,
    "DDPMPipeline": Pixels,
    "DiTPipeline": DiT,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
MODELS = {
    "emoji": "emoji at 64x64 from their names, shipped with this package",
    "CompVis/stable-diffusion-v1-4": "Stable Diffusion 1.4, the paper's model (from the hub)",
}


def load_model(model: str | Path | DiffusionPipeline, precision: str = "no") -> Model:
    """A model by its name ("emoji"), the folder of a saved pipeline, a hub id, or a ready diffusers pipeline.

    Weights are read from safetensors alone, as float32; with the `precision` that `Model.to` is asked for next, "bf16"
    or "fp16", the denoiser's in that one and all others as they were saved.

    A ready pipeline is used and not copied, so that its networks change: they are put into evaluation mode, frozen
    (`requires_grad`), laid out in memory with channels last, and made to compute their blocks again in a backward pass
    (the denoiser's according to `Model.set_checkpointing`); a denoiser whose class has no methods for adapters gets a
    class of the same name that has them. `Model.to` moves and casts them, and a LoRA is added to the denoiser. The
    pipeline's config, its scheduler and the values of its weights stay as they are.

    Raises DraftuneError for a model that is not there, whose pipeline class is not supported, or whose parts do not fit
    each other; a pipeline that is refused is not changed.
    """
    if not isinstance(model, (str, Path)):
        return adapted(model, str(getattr(model.config, "_name_or_path", None) or "pipeline"))
    name = str(model)
    source = EMBEDDED[name] if name == "emoji" else user_path(name)
    if (source / "model_index.json").is_file():
        return read(str(source), name, precision)
    if source.exists():
        raise no_pipeline_error(source)
    if not is_hub_id(name):
        raise DraftuneError(f"unknown model {name!r}: give 'emoji', the folder of a diffusers pipeline or a hub id")
    return read(fetch_pipeline(name), name, precision)


def fetch_pipeline(name: str) -> str:
    """The folder of a pipeline from the hub, downloaded if it is not here yet."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    options = {"use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}
    try:
        fetch(hf_hub_download, name, "model_index.json")
        try:
            return str(fetch(DiffusionPipeline.download, name, **options))
        except OSError:
            # Some are published in half precision alone, of which the plain weights are not there.
            return str(fetch(DiffusionPipeline.download, name, variant="fp16", **options))
    except Exception as error:
        raise unreachable(name, "--model", error=error) from error


def adapter(pipeline_class: str) -> type[Model]:
    if pipeline_class not in FAMILIES:
        raise DraftuneError(f"{pipeline_class} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class]


def adapted(pipeline: DiffusionPipeline, name: str) -> Model:
    """Return the model of a pipeline's family. Raises DraftuneError for a pipeline that it can't draw with."""
    family = adapter(type(pipeline).__name__)
    try:
        return family(pipeline, name)
    except DraftuneError:
        raise
    except Exception as error:
        # Of a config that was edited or damaged, nearly every kind of exception can come.
        if out_of_memory(error):
            raise
        raise DraftuneError(f"{name!r} can't be used: {type(error).__name__}: {first_line(error)}") from error


def part_folder(source: str, part: str) -> Path:
    """Where a part of a pipeline lies; the first unconditional ones were published with their UNet beside the index."""
    folder = Path(source) / part
    return Path(source) if part == "unet" and not folder.exists() else folder


def dtype_for(part: str, folder: Path, precision: str) -> torch.dtype:
    """What a part is loaded in; `Model.to`, which knows what may not be half as wide, does the rest."""
    asked = DTYPES[precision]
    if asked is None:
        return torch.float32
    return asked if part in ("unet", "transformer") else saved_dtype(folder)


def read(source: str, name: str, precision: str) -> Model:
    try:
        index = json.loads((Path(source) / "model_index.json").read_text(encoding="utf-8"))
        adapter(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DraftuneError(f"{name!r} is not a diffusers pipeline: its model_index.json can't be read") from error
    try:
        # What looks at pictures would be loaded for nothing: rewards look at them as they are, and none is a prompt.
        left_out = {"safety_checker": None, "requires_safety_checker": False}
        left_out |= {part: None for part in ("image_encoder", "feature_extractor") if part in index}
        left_out |= {part: None for part, entry in index.items() if entry == [None, None]}  # saved without it
        networks = {
            part: load_part(getattr(import_module(entry[0]), entry[1]), folder, dtype_for(part, folder, precision))
            for part, entry in index.items()
            if part not in left_out and isinstance(entry, list) and entry[0] in ("diffusers", "transformers")
            if any((folder := part_folder(source, part)).glob("*.safetensors"))
        }
        for part, entry in index.items():
            held = isinstance(entry, list) and part not in left_out and "Tokenizer" in str(entry[-1])
            if held and not any((part_folder(source, part) / file).is_file() for file in TOKENIZER_FILES):
                raise DraftuneError(f"{name!r} has no {part}: one of {', '.join(TOKENIZER_FILES)} is wanted in it")
        with quiet():
            # Asked through their common parent, diffusers would load some of what is left out.
            kind = getattr(import_module("diffusers"), index["_class_name"])
            pipeline = kind.from_pretrained(source, use_safetensors=True, **networks, **left_out)
    except DraftuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"cannot load the pipeline {name!r}: {first_line(error)}") from error
    return adapted(pipeline, name)
