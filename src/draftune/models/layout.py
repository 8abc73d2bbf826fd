"""The networks of a model without their weights, to find the layers that a LoRA file adapts."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from draftune.errors import DraftuneError
from draftune.models import adapter
from draftune.models.loading import fetch_configs, part_folder, pipeline_folder, read_index
from draftune.models.single_file import open_checkpoint
from draftune.utils.loading import first_line
from draftune.utils.model_options import NO_OPTIONS, ModelOptions
from draftune.utils.quiet import silence_libraries


def load_layout(model: str, options: ModelOptions = NO_OPTIONS) -> dict[str, nn.Module]:
    """Build the networks that a LoRA can adapt from their configs, without weights.

    Args:
        model: A model's name as in `load_model`. For a model on the hub only the configs are downloaded.
        options: Where its configs come from.

    Returns:
        The denoiser and the text encoders as in `DiffusionModel.lora_networks`, with parameters on the device "meta".

    Raises:
        DraftuneError: There is no such model, or a config can't be read.
    """
    from accelerate import init_empty_weights

    checkpoint = open_checkpoint(model, options)
    name, option = (checkpoint.base, "--base-pipeline") if checkpoint else (model, "--model")
    source = pipeline_folder(name, fetch_configs, options, option)
    try:
        index = read_index(source, model)
        denoiser = adapter(index["_class_name"]).lora_prefix
        encoders = sorted(part for part in index if part.startswith("text_encoder") and index[part][1] is not None)
        networks = {}
        for part in (denoiser, *encoders):
            kind, folder = getattr(import_module(index[part][0]), index[part][1]), part_folder(source, part)
            with silence_libraries(), init_empty_weights():
                if index[part][0] == "diffusers":
                    networks[part] = kind.from_config(kind.load_config(folder))
                else:
                    networks[part] = kind(kind.config_class.from_pretrained(folder))
        return networks
    except (OSError, ImportError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise DraftuneError(f"cannot read the configs of the pipeline {model!r}: {first_line(error)}") from error
