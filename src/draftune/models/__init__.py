"""Text-to-image models: one adapter per family of diffusers pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError
from draftune.models.base import Model
from draftune.models.stable_diffusion import StableDiffusion
from draftune.quiet import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["FAMILIES", "MODELS", "Model", "StableDiffusion", "load_model"]

FAMILIES: dict[str, type[Model]] = {"StableDiffusionPipeline": StableDiffusion}
MODELS = {
    "emoji": "emoji at 64x64 from their names, shipped with this package",
    "CompVis/stable-diffusion-v1-4": "Stable Diffusion 1.4, the paper's model (from the hub)",
}


def load_model(model: str | Path | DiffusionPipeline) -> Model:
    """A model by its name ("emoji"), the folder of a saved pipeline, a hub id, or a ready diffusers pipeline.

    Weights are read from safetensors alone. Raises DraftuneError for a model that is not there or whose pipeline
    class is not supported.
    """
    if not isinstance(model, (str, Path)):
        return adapter(type(model).__name__)(model, getattr(model.config, "_name_or_path", None) or "pipeline")
    name = str(model)
    source = EMBEDDED[name] if name == "emoji" else Path(name).expanduser()
    if (source / "model_index.json").is_file():
        return read(str(source), name)
    if source.exists():
        raise DraftuneError(f"{name!r} is not the folder of a diffusers pipeline: it has no model_index.json")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DraftuneError(f"unknown model {name!r}: give 'emoji', the folder of a diffusers pipeline or a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        with quiet():
            hf_hub_download(name, "model_index.json")
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        # Without a network the first of these is raised too, as its subclass.
        if isinstance(error, LocalEntryNotFoundError):
            raise offline(name) from error
        raise DraftuneError(f"there is no diffusers pipeline {name!r} on the hub, or none that you may read") from error
    except Exception as error:
        raise offline(name) from error
    return read(name, name)


def offline(name: str) -> DraftuneError:
    return DraftuneError(
        f"the model {name!r} is not on this machine and could not be fetched from the hub: download it where there is "
        f"a network (hf download {name}) and give its folder"
    )


def adapter(pipeline_class: str) -> type[Model]:
    if pipeline_class not in FAMILIES:
        raise DraftuneError(f"{pipeline_class} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class]


def read(source: str, name: str) -> Model:
    from diffusers import DiffusionPipeline

    try:
        with quiet():
            index = DiffusionPipeline.load_config(source)
            family = adapter(index["_class_name"])
            # The safety checker would be loaded for nothing: rewards look at the pictures as they are.
            pipeline = DiffusionPipeline.from_pretrained(
                source,
                torch_dtype=torch.float32,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise DraftuneError(f"cannot load the pipeline {name!r}: {first_line(error)}") from error
    return family(pipeline, name)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
