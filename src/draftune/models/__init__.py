"""Text-to-image models: one class per family of diffusers pipelines, and `load_model`."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError, out_of_memory
from draftune.models.base import DTYPES, DiffusionModel
from draftune.models.dit import DiT
from draftune.models.flux import Flux
from draftune.models.pixart import PixArt
from draftune.models.sana import Sana
from draftune.models.stable_diffusion import StableDiffusion
from draftune.models.stable_diffusion_3 import StableDiffusion3
from draftune.models.stable_diffusion_xl import StableDiffusionXL
from draftune.models.unconditional import Pixels
from draftune.models.z_image import ZImage
from draftune.utils.hub import fetch, is_hub_id, unreachable
from draftune.utils.loading import TOKENIZER_FILES, first_line, load_part, saved_dtype
from draftune.utils.paths import user_path
from draftune.utils.quiet import silence_libraries
from draftune.utils.single_file import no_pipeline_error

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["FAMILIES", "MODELS", "DiffusionModel", "StableDiffusion", "load_model"]

FAMILIES: dict[str, type[DiffusionModel]] = {
    "DDIMPipeline": Pixels,
    "DDPMPipeline": Pixels,
    "DiTPipeline": DiT,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "ZImagePipeline": ZImage,
}
"""The family of each supported pipeline class. An added entry makes its pipelines loadable."""
MODELS = {
    "emoji": "emoji at 64x64 from their names, shipped with this package",
    "CompVis/stable-diffusion-v1-4": "Stable Diffusion 1.4, the paper's model (from the hub)",
}


def load_model(model: str | Path | DiffusionPipeline, precision: str = "no") -> DiffusionModel:
    """Load a model.

    A pipeline object is used in place, not copied. Loading and training change its networks as follows:

    - evaluation mode, `requires_grad=False`, and channels-last memory layout;
    - gradient checkpointing of their blocks is enabled or disabled, see `DiffusionModel.set_checkpointing`;
    - `DiffusionModel.to` moves and casts them;
    - a LoRA adds its layers and the attribute `peft_config` to the denoiser.

    The pipeline's config, its scheduler, the classes of its networks and the values of their weights do not change.
    To keep a pipeline unchanged, pass a copy (`copy.deepcopy(pipeline)`) or its folder.

    Args:
        model: "emoji", the folder of a saved pipeline, a hub id, or a diffusers pipeline.
        precision: "no", "bf16" or "fp16". Only for weights that are read from files (always safetensors): the precision
            of the denoiser. All other networks have their saved precision with "bf16" and "fp16", and float32 with
            "no". Pass the same precision to `DiffusionModel.to`.

    Raises:
        DraftuneError: The model does not exist, its pipeline class is not supported, or its components do not fit each
            other. A pipeline that is refused is not changed.
    """
    if not isinstance(model, (str, Path)):
        return adapted(model, str(getattr(model.config, "_name_or_path", None) or "pipeline"))
    return read(pipeline_folder(str(model), fetch_pipeline), str(model), precision)


def pipeline_folder(model: str, download: Callable[[str], Path]) -> Path:
    """Return the folder of a pipeline, which is downloaded if `model` is a hub id.

    Args:
        model: "emoji", the folder of a saved pipeline, or a hub id.
        download: Fetches a hub id and returns its folder.

    Raises:
        DraftuneError: There is no such model, or it can't be downloaded.
    """
    source = EMBEDDED[model] if model == "emoji" else user_path(model)
    if (source / "model_index.json").is_file():
        return source
    if source.exists():
        raise no_pipeline_error(source)
    if not is_hub_id(model):
        raise DraftuneError(f"unknown model {model!r}: give 'emoji', the folder of a diffusers pipeline or a hub id")
    try:
        return download(model)
    except Exception as error:
        raise unreachable(model, "--model", error=error) from error


def fetch_pipeline(name: str) -> Path:
    """Download the configs and safetensors of a pipeline from the hub, or return its folder in the hub's cache."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    options = {"use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}
    fetch(hf_hub_download, name, "model_index.json")
    try:
        return fetch(DiffusionPipeline.download, name, **options)
    except OSError:
        # Some pipelines are published in half precision only, as the variant "fp16".
        return fetch(DiffusionPipeline.download, name, variant="fp16", **options)


def adapter(pipeline_class: str) -> type[DiffusionModel]:
    """Return the family of a pipeline class. Raises DraftuneError if it is not supported."""
    if pipeline_class not in FAMILIES:
        raise DraftuneError(f"{pipeline_class} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class]


def adapted(pipeline: DiffusionPipeline, name: str) -> DiffusionModel:
    """Return the model of a loaded pipeline. Raises DraftuneError if the pipeline does not fit its family."""
    family = adapter(type(pipeline).__name__)
    try:
        return family(pipeline, name)
    except DraftuneError:
        raise
    except Exception as error:
        # An edited or damaged config can cause any kind of exception.
        if out_of_memory(error):
            raise
        raise DraftuneError(f"{name!r} can't be used: {type(error).__name__}: {first_line(error)}") from error


def part_folder(source: Path, part: str) -> Path:
    """Return a component's folder. The first unconditional pipelines were published without a folder for the UNet."""
    folder = source / part
    return source if part == "unet" and not folder.exists() else folder


def dtype_for(part: str, folder: Path, precision: str) -> torch.dtype:
    """Return the precision in which a component is loaded. `DiffusionModel.to` casts those that need another one."""
    dtype = DTYPES[precision]
    if dtype is None:
        return torch.float32
    return dtype if part in ("unet", "transformer") else saved_dtype(folder)


def read(source: Path, name: str, precision: str) -> DiffusionModel:
    """Load the pipeline in a folder and return its model.

    Raises:
        DraftuneError: The pipeline can't be loaded, is not supported, or does not fit its family.
    """
    try:
        index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
        adapter(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DraftuneError(f"{name!r} is not a diffusers pipeline: its model_index.json can't be read") from error
    try:
        # Safety checkers and image encoders are not loaded: no feature here uses them.
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
            is_tokenizer = isinstance(entry, list) and part not in left_out and "Tokenizer" in str(entry[-1])
            if is_tokenizer and not any((part_folder(source, part) / file).is_file() for file in TOKENIZER_FILES):
                raise DraftuneError(
                    f"{name!r} has no {part}: its folder needs one of the files {', '.join(TOKENIZER_FILES)}"
                )
        with silence_libraries():
            # The pipeline's own class: `DiffusionPipeline.from_pretrained` would load some of what is left out.
            kind = getattr(import_module("diffusers"), index["_class_name"])
            pipeline = kind.from_pretrained(str(source), use_safetensors=True, **networks, **left_out)
    except DraftuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"cannot load the pipeline {name!r}: {first_line(error)}") from error
    return adapted(pipeline, name)
