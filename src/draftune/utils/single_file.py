"""Detect single-file checkpoints, the format of most community models, which are not supported."""

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
"""Prefixes of a checkpoint's keys and the diffusers pipeline that loads it. The first match counts."""
ADAPTERS = ("lora", "lokr", "loha", "hada_", "dora_scale")
"""Parts of the keys of adapters, whose prefixes can equal those of a checkpoint."""


def pipeline_of(keys: Collection[str]) -> str | None:
    """Return the class of the diffusers pipeline that loads a checkpoint with these keys; None for other files."""
    if any(word in key.lower() for key in keys for word in ADAPTERS):
        return None
    return next((kind for start, kind in KINDS.items() if any(key.startswith(start) for key in keys)), None)


def single_file_error(path: Path) -> DraftuneError | None:
    """Return the error for a single-file checkpoint, with the conversion command; None for other files.

    Pickle files are not opened, since that could run code. A .ckpt file is assumed to be a checkpoint.
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
    """Return the error for a path that was given as a model but is not the folder of a pipeline."""
    if path.is_file():
        other = DraftuneError(f"{str(path)!r} is a file, not the folder of a diffusers pipeline")
        return single_file_error(path) or other
    return DraftuneError(f"{str(path)!r} is not the folder of a diffusers pipeline: it has no model_index.json")
