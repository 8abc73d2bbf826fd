"""The networks of a model without their weights, to find the layers that a LoRA file adapts."""

from __future__ import annotations

from torch import nn

from draftune.errors import DraftuneError, first_line
from draftune.models import adapter
from draftune.models.loading import empty_network, fetch_configs, part_folder, pipeline_folder, read_index
from draftune.models.single_file import open_checkpoint
from draftune.utils.model_options import NO_OPTIONS, ModelOptions


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
    checkpoint = open_checkpoint(model, options)
    name, option = (checkpoint.base, "--base-pipeline") if checkpoint else (model, "--model")
    source = pipeline_folder(name, fetch_configs, options, option)
    try:
        index = read_index(source, model)
        denoiser = adapter(index["_class_name"]).lora_prefix
        parts = [part for part, entry in index.items() if isinstance(entry, list) and isinstance(entry[-1], str)]
        encoders = sorted(part for part in parts if part.startswith("text_encoder"))
        networks = {}
        for part in (denoiser, *encoders):
            networks[part] = empty_network(index[part], part_folder(source, part))
        return networks
    except (OSError, ImportError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise DraftuneError(f"cannot read the configs of the pipeline {model!r}: {first_line(error)}") from error
