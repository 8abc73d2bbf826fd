"""Read diffusers pipelines from folders and from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError, first_line, out_of_memory
from draftune.models.quantization import load_denoiser
from draftune.models.single_file import DENOISERS, Checkpoint, check_others, load_networks
from draftune.utils.devices import DTYPES
from draftune.utils.hub import fetch, is_hub_id, unreachable
from draftune.utils.loading import TOKENIZER_FILES, has_variant, load_part, saved_dtype
from draftune.utils.model_options import NO_OPTIONS, ModelOptions, option_text
from draftune.utils.paths import user_path
from draftune.utils.quiet import silence_libraries
from draftune.utils.single_file import no_pipeline_error
from draftune.utils.weightless import fake_mode, from_config, without_computation

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CONFIG_FILES = ["*.json", "*.txt", "*.model"]
"""Patterns of the files of configs, schedulers and tokenizers."""


def local_pipeline(model: str, option: str = "--model") -> Path | None:
    """Return the folder of a pipeline on this machine; None for a hub id.

    Args:
        model: "emoji", the folder of a saved pipeline, or a hub id.
        option: The option that names the pipeline, for messages.

    Raises:
        DraftuneError: There is no such model.
    """
    source = EMBEDDED[model] if model == "emoji" else user_path(model)
    if (source / "model_index.json").is_file():
        return source
    if source.exists():
        raise no_pipeline_error(source)
    if is_hub_id(model):
        return None
    near = "did you mean 'emoji'? " if get_close_matches(model, ["emoji"]) else ""
    raise DraftuneError(
        f"unknown model {model!r} ({option}): {near}give 'emoji', the folder of a diffusers pipeline, a hub id or a "
        "checkpoint file"
    )


def pipeline_folder(
    model: str,
    download: Callable[[str, ModelOptions], Path],
    options: ModelOptions = NO_OPTIONS,
    option: str = "--model",
) -> Path:
    """Return the folder of a pipeline, which is downloaded if `model` is a hub id.

    Args:
        model: "emoji", the folder of a saved pipeline, or a hub id.
        download: Fetches a hub id and returns its folder.
        options: The revision and the variant.
        option: The option that names the pipeline, for messages.

    Raises:
        DraftuneError: There is no such model, or it can't be downloaded.
    """
    if (folder := local_pipeline(model, option)) is not None:
        return folder
    try:
        return download(model, options)
    except Exception as error:
        raise unreachable(model, option, error=error, selected=option_text(options)) from error


def fetch_pipeline(name: str, options: ModelOptions = NO_OPTIONS, without: Collection[str] = ()) -> Path:
    """Download the configs and safetensors of a pipeline from the hub, or return its folder in the hub's cache.

    Args:
        name: The hub id.
        options: The revision and the variant.
        without: Networks whose files are not downloaded.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    if fake_mode() is not None:
        return fetch_configs(name, options)
    left_out: dict[str, Any] = {"use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}
    left_out |= dict.fromkeys(without) | ({"revision": options.revision} if options.revision else {})
    fetch(hf_hub_download, name, "model_index.json", revision=options.revision)
    try:
        return fetch(DiffusionPipeline.download, name, variant=options.variant, **left_out)
    except OSError:
        if options.variant:
            raise
        # Some pipelines are published in half precision only, as the variant "fp16".
        return fetch(DiffusionPipeline.download, name, variant="fp16", **left_out)


def fetch_configs(name: str, options: ModelOptions = NO_OPTIONS) -> Path:
    """Download the configs and tokenizers of a pipeline from the hub, or return its folder in the hub's cache."""
    from huggingface_hub import snapshot_download

    return fetch(snapshot_download, name, allow_patterns=CONFIG_FILES, revision=options.revision)


def check_variant(source: Path, name: str, index: Mapping[str, Any], variant: str | None) -> None:
    """Raise DraftuneError if no network of a pipeline has the variant."""
    if variant and not any(has_variant(part_folder(source, part), variant) for part in index):
        raise DraftuneError(f"{name!r} has no weights of variant={variant!r} (--variant)")


def part_folder(source: Path, part: str) -> Path:
    """Return a component's folder. The first unconditional pipelines were published without a folder for the UNet."""
    folder = source / part
    return source if part == "unet" and not folder.exists() else folder


def dtype_for(part: str, folder: Path, precision: str, variant: str | None = None) -> torch.dtype:
    """Return the precision in which a component is loaded. `DiffusionModel.to` casts those that need another one."""
    dtype = DTYPES[precision]
    if dtype is None:
        return torch.float32
    return dtype if part in DENOISERS else saved_dtype(folder, variant)


def read_index(source: Path, name: str) -> dict[str, Any]:
    """Return the model_index.json of a pipeline's folder. Raises DraftuneError if it can't be read."""
    try:
        index: dict[str, Any] = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
        str.lower(index["_class_name"])  # a TypeError unless it is text
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DraftuneError(f"{name!r} is not a diffusers pipeline: its model_index.json can't be read") from error
    return index


@dataclass(frozen=True)
class LoadOptions:
    """How a pipeline is read from files; see `draftune.models.load_model`.

    Attributes:
        precision: "no", "bf16" or "fp16".
        quantization: "none" or a name in `draftune.models.quantization.BACKENDS`.
        device: Where the denoiser is quantized.
        text_encoders: Whether the text encoders have weights; otherwise they are those of `empty_network`.
        variant: Variant of the weights; networks that lack it are loaded from their plain weights.
    """

    precision: str = "no"
    quantization: str = "none"
    device: torch.device | str = "cpu"
    text_encoders: bool = True
    variant: str | None = None


def load_network(part: str, entry: list[str], folder: Path, options: LoadOptions) -> Any:
    """Load a component of a pipeline, given its library and class.

    Inside `without_weights` it is built from its config, and text encoders return zeros.
    """
    cls, variant = getattr(import_module(entry[0]), entry[1]), options.variant
    dtype = dtype_for(part, folder, options.precision, variant)
    if part in DENOISERS:
        return load_denoiser(cls, folder, dtype, options.quantization, torch.device(options.device), variant)
    if is_text_encoder(part, entry) and not options.text_encoders:
        return empty_network(entry, folder)
    network = load_part(cls, folder, dtype, variant)
    return network if fake_mode() is None or entry[0] == "diffusers" else without_computation(network)


def empty_network(entry: list[str], folder: Path) -> nn.Module:
    """Build a component of a pipeline from its config, with parameters on the device "meta"."""
    from accelerate import init_empty_weights

    with silence_libraries(), init_empty_weights():
        return from_config(getattr(import_module(entry[0]), entry[1]), folder)


def is_text_encoder(part: str, entry: Any) -> bool:
    """Return whether an entry of model_index.json is a text encoder that the pipeline has."""
    return part.startswith("text_encoder") and isinstance(entry, list) and entry[0] == "transformers"


def encoder_loaders(source: Path, name: str, options: LoadOptions) -> dict[str, Callable[[], nn.Module]]:
    """Return the functions that load the text encoders of the pipeline in a folder, by component."""
    options = replace(options, text_encoders=True)
    return {
        part: partial(load_network, part, entry, source / part, options)
        for part, entry in read_index(source, name).items()
        if is_text_encoder(part, entry)
    }


def read_pipeline(
    source: Path, name: str, options: LoadOptions, checkpoint: Checkpoint | None = None
) -> DiffusionPipeline:
    """Load the pipeline in a folder.

    Args:
        source: The folder.
        name: The model's name, for messages.
        options: How it is loaded.
        checkpoint: A file with networks that replace those in the folder.

    Raises:
        DraftuneError: The pipeline can't be loaded.
    """
    index = read_index(source, name)
    if fake_mode() is None:
        check_variant(source, name, index, options.variant)
    try:
        # Safety checkers and image encoders are not loaded: no feature here uses them.
        left_out = {"safety_checker": None, "requires_safety_checker": False}
        left_out |= {part: None for part in ("image_encoder", "feature_extractor") if part in index}
        left_out |= {part: None for part, entry in index.items() if entry == [None, None]}  # saved without it
        fake = fake_mode() is not None
        of_file = load_networks(checkpoint, source, index, DTYPES[options.precision]) if checkpoint and not fake else {}
        networks = of_file | {
            part: load_network(part, entry, folder, options)
            for part, entry in index.items()
            if part not in (left_out | of_file)
            and isinstance(entry, list)
            and entry[0] in ("diffusers", "transformers")
            if any((folder := part_folder(source, part)).glob("config.json" if fake else "*.safetensors"))
        }
        if checkpoint and not fake:
            check_others(checkpoint, index, networks)
        for part, entry in index.items():
            is_tokenizer = isinstance(entry, list) and part not in left_out and "Tokenizer" in str(entry[-1])
            if is_tokenizer and not any((part_folder(source, part) / file).is_file() for file in TOKENIZER_FILES):
                raise DraftuneError(
                    f"{name!r} has no {part}: its folder needs one of the files {', '.join(TOKENIZER_FILES)}"
                )
        with silence_libraries():
            # The pipeline's own class: `DiffusionPipeline.from_pretrained` would load some of what is left out.
            kind = getattr(import_module("diffusers"), index["_class_name"])
            pipeline: DiffusionPipeline = kind.from_pretrained(
                str(source), use_safetensors=True, **networks, **left_out
            )
    except DraftuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"cannot load the pipeline {name!r}: {first_line(error)}") from error
    return pipeline
