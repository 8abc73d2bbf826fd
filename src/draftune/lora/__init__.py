"""LoRA: adding it to a model, reading and writing files, and low-rank algebra."""

from draftune.lora.adapter import (
    ADAPTER,
    FROZEN_ADAPTER,
    adapted_by,
    add_lora,
    attach_lora,
    check_sampler,
    freeze_lora,
    load_lora,
    lora_parameters,
    remove_lora,
    save_lora,
    set_lora_scale,
    set_lora_scales,
)
from draftune.lora.deltas import LoRADelta, LoRADeltas, deltas_of_peft
from draftune.lora.files import (
    CONFIG,
    FILE_NAME,
    base_model,
    lora_file,
    open_safetensors,
    read_file,
)
from draftune.lora.metadata import SAMPLER_METADATA, saved_grid, saved_sampler, saved_steps
from draftune.lora.reader import read_lora
from draftune.lora.targets import ATTENTION

__all__ = [
    "ADAPTER",
    "ATTENTION",
    "CONFIG",
    "FILE_NAME",
    "SAMPLER_METADATA",
    "FROZEN_ADAPTER",
    "LoRADelta",
    "LoRADeltas",
    "adapted_by",
    "add_lora",
    "attach_lora",
    "base_model",
    "check_sampler",
    "deltas_of_peft",
    "freeze_lora",
    "load_lora",
    "lora_file",
    "lora_parameters",
    "open_safetensors",
    "read_file",
    "read_lora",
    "remove_lora",
    "save_lora",
    "saved_grid",
    "saved_sampler",
    "saved_steps",
    "set_lora_scale",
    "set_lora_scales",
]
