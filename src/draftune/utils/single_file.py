"""Checkpoints in one file, as most community models are published: told apart from LoRAs, and not read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from draftune.errors import DraftuneError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
KINDS = {
    "model.diffusion_model.joint_blocks.": "StableDiffusion3Pipeline",
    "conditioner.embedders.": "StableDiffusionXLPipeline",
    "model.diffusion_model.double_blocks.": "FluxPipeline",
    "double_blocks.": "FluxPipeline",
    "model.diffusion_model.": "StableDiffusionPipeline",
    "joint_blocks.": "StableDiffusion3Pipeline",
}
"""The beginnings of a whole model's keys, and the pipeline of diffusers that reads it; the first one counts."""
ADAPTERS = ("lora", "lokr", "loha", "hada_", "dora_scale")
"""What stands in keys of adapters, some of which begin as those of a whole model do."""


def pipeline_of(keys: Collection[str]) -> str | None:
    """Return the class of diffusers' pipeline that reads a checkpoint with these keys; None for anything else."""
    if any(word in key.lower() for key in keys for word in ADAPTERS):
        return None
    return next((kind for start, kind in KINDS.items() if any(key.startswith(start) for key in keys)), None)


def single_file_error(path: Path) -> DraftuneError | None:
    """Return the error for a file that holds a whole model, with the way out; None for a file that holds none.

    Pickle files are not opened, since that could run code. A .ckpt is assumed to be a model.
    """
    kind = "StableDiffusionPipeline" if path.suffix == ".ckpt" else None
    if path.suffix not in PICKLES:
        try:
            with safe_open(path, "pt") as file:
                kind = pipeline_of(list(file.keys()))
        except (OSError, SafetensorError):
            return None
    if kind is None:
        return None
    return DraftuneError(
        f"{str(path)!r} is a single-file checkpoint; the folder of a diffusers pipeline is needed. Convert it: "
        f"{kind}.from_single_file({str(path)!r}).save_pretrained(FOLDER). Then give FOLDER"
    )


def no_pipeline_error(path: Path) -> DraftuneError:
    """Return the error for a file or a folder that is no pipeline, where one is to be loaded."""
    if path.is_file():
        other = DraftuneError(f"{str(path)!r} is a file, not the folder of a diffusers pipeline")
        return single_file_error(path) or other
    return DraftuneError(f"{str(path)!r} is not the folder of a diffusers pipeline: it has no model_index.json")
