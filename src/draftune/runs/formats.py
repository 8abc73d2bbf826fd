"""Which formats of other tools fit a LoRA, from its names and the configs on this machine."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from draftune.lora.comfyui import is_loaded
from draftune.utils.model_configs import model_folder, read_config

UNCONDITIONAL = re.compile(r"attentions\.\d+\.to_")
"""Names of attention layers in unconditional UNets; conditional ones have transformer blocks in between."""


def fitting_formats(lora: Path, model: str, revision: str | None = None) -> tuple[str, ...]:
    """Return the formats of one LoRA that `draftune.runs.export.export_lora` can write; all where this is unknown.

    Args:
        lora: The LoRA file.
        model: Its base model.
        revision: The revision of the base model.
    """
    return formats_at(lora, lora.stat().st_mtime_ns, model, revision)


@lru_cache(maxsize=100)
def formats_at(lora: Path, changed: int, model: str, revision: str | None) -> tuple[str, ...]:
    """Return the formats that fit the file that was changed at this time."""
    try:
        with safe_open(lora, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        return ("diffusers", "comfyui", "kohya")
    if any(name.startswith("unet.") for name in names):
        return ("diffusers",) if any(map(UNCONDITIONAL.search, names)) else ("diffusers", "comfyui", "kohya")
    folder = model_folder(model, revision)
    entry = read_config(folder / "model_index.json").get("transformer") if folder else None
    if not entry or is_loaded(entry[-1]):
        return ("diffusers", "comfyui")
    return ("diffusers",)
