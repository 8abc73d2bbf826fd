"""The networks of a model without their weights: which layers a LoRA may adapt."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError
from draftune.models import adapter, part_folder
from draftune.utils.hub import fetch, is_hub_id, unreachable
from draftune.utils.loading import first_line
from draftune.utils.paths import user_path
from draftune.utils.quiet import quiet
from draftune.utils.single_file import no_pipeline_error


def load_layout(model: str) -> dict[str, nn.Module]:
    """Build the networks that a LoRA may adapt from their configs alone, as `Model.lora_networks` has them.

    Args:
        model: a model's name as `load_model` takes it. Of a model on the hub only the configs are downloaded.

    Returns:
        The denoiser and the text encoders by their names in a LoRA's keys, with parameters on the device "meta".

    Raises:
        DraftuneError: there is no such model, or a config can't be read.
    """
    from accelerate import init_empty_weights

    source = config_folder(model)
    try:
        index: dict[str, Any] = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
        denoiser = adapter(index["_class_name"]).lora_prefix
        encoders = sorted(part for part in index if part.startswith("text_encoder") and index[part][1] is not None)
        networks = {}
        for part in (denoiser, *encoders):
            kind, folder = getattr(import_module(index[part][0]), index[part][1]), part_folder(str(source), part)
            with quiet(), init_empty_weights():
                if index[part][0] == "diffusers":
                    networks[part] = kind.from_config(kind.load_config(folder))
                else:
                    networks[part] = kind(kind.config_class.from_pretrained(folder))
        return networks
    except (OSError, ImportError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise DraftuneError(f"cannot read the configs of the pipeline {model!r}: {first_line(error)}") from error


def config_folder(model: str) -> Path:
    """Return the folder of a pipeline in which at least its configs lie."""
    from huggingface_hub import snapshot_download

    source = EMBEDDED[model] if model == "emoji" else user_path(model)
    if (source / "model_index.json").is_file():
        return source
    if source.exists():
        raise no_pipeline_error(source)
    if not is_hub_id(model):
        raise DraftuneError(f"unknown model {model!r}: give 'emoji', the folder of a diffusers pipeline or a hub id")
    try:
        return fetch(snapshot_download, model, allow_patterns=["model_index.json", "*.json"])
    except Exception as error:
        raise unreachable(model, "--model", error=error) from error
