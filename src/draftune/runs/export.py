"""A trained LoRA as other tools read it: a LoRA for diffusers, a LoRA for kohya's readers, or a whole pipeline."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.lora import FILE_NAME, GRID_SAID, LoRADeltas, lora_file, opened, saved_grid
from draftune.lora.names import in_network
from draftune.models import Model, load_model
from draftune.models.layout import load_layout
from draftune.runs.load import read_deltas
from draftune.runs.run_dir import run_settings
from draftune.sampling.schedule import GRID
from draftune.settings import Settings
from draftune.utils.logging import logger
from draftune.utils.paths import check_writable, user_path, written_whole
from draftune.utils.quiet import quiet
from draftune.utils.tensors import save_tensors

KOHYA_SUFFIX = ".safetensors"
UNCONDITIONAL = re.compile(r"attentions\.\d+\.to_")
"""Names of layers in UNets without a prompt: the others have transformer blocks in between."""


def export_lora(
    source: Path | str,
    output: Path | str,
    format: str = "diffusers",
    lora_scale: float = 1.0,
    best: bool = False,
    half: bool = False,
    model: str | None = None,
    skip_text_encoder: bool = False,
) -> Path:
    """Writes the LoRA of a run, a LoRA file or its folder as another tool reads it; returns `output`.

    "diffusers": a folder with the LoRA; "kohya": a .safetensors file, for ComfyUI and others; "merged": the folder of
    the base model's pipeline with the LoRA in its weights and the run's grid in its scheduler. `best` takes the
    run's best LoRA, not its last; `half` stores float16; `model` is the base model, where the LoRA does not say it or
    it lies elsewhere; `skip_text_encoder` leaves out layers of text encoders. Raises DraftuneError, also where the
    output is there already.
    """
    target = user_path(output)
    check(target, format, lora_scale)
    path = source_file(source, best)
    grid(path)  # a run that can't be read is said before anything is written
    lora = read_deltas(path, model, skip_text_encoder).scaled(lora_scale)
    WRITERS[format](lora, path, target, torch.float16 if half else torch.float32)
    return target


def check(target: Path, format: str, lora_scale: float) -> None:
    """What is wrong before anything is read. Raises DraftuneError."""
    if format not in WRITERS:
        raise unknown("format", format, WRITERS)
    if not math.isfinite(lora_scale):
        raise DraftuneError(f"--lora-scale must be a number, not {lora_scale}")
    if (target.suffix == KOHYA_SUFFIX) != (format == "kohya"):
        wanted = f"a {KOHYA_SUFFIX} file" if format == "kohya" else "a folder"
        raise DraftuneError(f"--output takes {wanted} with --format {format}, not {str(target)!r}")
    if target.exists() and not (format != "kohya" and target.is_dir() and not any(target.iterdir())):
        raise DraftuneError(f"the output {str(target)!r} is there already; give another (--output)")
    check_writable(target)


def source_file(source: Path | str, best: bool = False) -> Path:
    """The LoRA's file, of a run the last or the best. Raises DraftuneError if there is none."""
    path = user_path(source) / "best" / FILE_NAME
    if best and not path.is_file():
        raise DraftuneError(f"{str(source)!r} has no best LoRA: it is no run with evaluations (--eval-prompts)")
    return path if best else lora_file(source)


def grid(source: Path | str, best: bool = False) -> dict[str, Any]:
    """Where the sampler's steps lay in the training of a LoRA, as far as its run, or else its file, says so."""
    path = source_file(source, best)
    settings = run_settings(path)
    with opened(path) as file:
        if (file.metadata() or {}).get(GRID_SAID) == "{}":
            return {}  # that of a flow model, in which the run's settings have no say
    said = {name: getattr(settings, name) for name in GRID} if settings else saved_grid(path)
    return {name: value for name, value in said.items() if value is not None}


def write_diffusers(lora: LoRADeltas, path: Path, target: Path, dtype: torch.dtype) -> None:
    if t5 := [name for name in lora.layers if ".encoder.block." in name]:
        logger.warning(
            f"diffusers' load_lora_weights leaves out the LoRA's {len(t5)} layers of T5; --format merged holds them"
        )
    lora.write(target, dtype)


def write_kohya(lora: LoRADeltas, path: Path, target: Path, dtype: torch.dtype) -> None:
    """The LoRA by kohya's names, which have no dots: lora_unet_mid_block_attentions_0_proj_in.lora_down.weight.

    diffusers' own conversion takes every alpha to be the rank, whatever it was; here it is so.
    """
    if "unet" not in lora.parts:
        raise DraftuneError("kohya's names are known for UNets only: give a transformer's LoRA --format diffusers")
    if any(UNCONDITIONAL.search(name) for name in lora.layers):
        raise DraftuneError(
            "no reader of kohya's names draws with unconditional models: give --format diffusers or merged"
        )
    named, rank = lora.tensors(dtype)
    # Text encoders are numbered where the pipeline has two, even if one alone is adapted.
    numbered = len(lora.parts) > 1 and "text_encoder_2" in load_layout(str(lora.base_model))
    encoders = {"text_encoder": "te1" if numbered else "te", "text_encoder_2": "te2"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        layer, _, half = name.rpartition(".lora_")
        part, _, inner = layer.partition(".")
        key = f"lora_{encoders.get(part, part)}_{inner.replace('.', '_')}"
        tensors[f"{key}.{'lora_down' if half == 'A.weight' else 'lora_up'}.weight"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    said = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": target.stem,
    }
    if any(max(layer.shape[2:], default=1) > 1 for layer in lora.layers.values()):
        said["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": str(float(rank))})
    if lora.base_model:
        said |= {"base_model": lora.base_model, "ss_sd_model_name": lora.base_model}
    if lora.grid:
        said[GRID_SAID] = lora.grid
    if settings := run_settings(path):
        said |= training_said(settings)
    with written_whole(target) as temporary:
        save_tensors(temporary, tensors, said)


def training_said(settings: Settings) -> dict[str, str]:
    """A run's settings by kohya's names where they mean the same, the others in its comment."""
    s = settings
    return {
        "ss_max_train_steps": str(s.steps),
        "ss_learning_rate": str(s.learning_rate),
        "ss_lr_warmup_steps": str(s.lr_warmup_steps),
        "ss_optimizer": "torch.optim.adamw.AdamW" if s.optimizer == "adamw" else s.optimizer,
        "ss_max_grad_norm": str(s.max_grad_norm),
        "ss_gradient_accumulation_steps": str(s.gradient_accumulation_steps),
        "ss_seed": str(s.seed),
        "ss_training_comment": f"draftune: {s.method} on {s.reward}, prompts {s.prompts}, batches of {s.batch_size}",
    }


def write_merged(lora: LoRADeltas, path: Path, target: Path, dtype: torch.dtype) -> None:
    model = load_model(str(lora.base_model))
    model.set_grid(**grid(path))
    merge(model, lora)
    save_pipeline(model, target, dtype)


@torch.no_grad()
def merge(model: Model, lora: LoRADeltas) -> None:
    """Add the LoRA to the weights of the model's networks, for good. It was read for this model."""
    for part, network in model.lora_networks.items():
        for name, delta in lora.of_part(part).items():
            weight = network.get_submodule(in_network(part, name, network)).weight
            weight += delta.change.to(weight)


def save_pipeline(model: Model, target: Path, dtype: torch.dtype) -> None:
    """Writes the model's pipeline, whole or not at all, with the sampler that draws here on the model's grid."""
    with quiet():
        model.pipeline.scheduler = model.sampler()
        model.complete_config()
        model.pipeline.to(dtype=dtype)
        for part in (model.pipeline, *model.pipeline.components.values()):
            if hasattr(part, "register_to_config"):
                part.register_to_config(_name_or_path="")  # where the base lay is nobody's business
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            model.pipeline.save_pretrained(Path(folder) / "model", safe_serialization=True)
            readable = (Path(folder) / "model" / "model_index.json").stat().st_mode
            for weights in Path(folder).rglob("*.safetensors"):
                weights.chmod(readable)  # the library lets nobody but the owner read them
            os.replace(Path(folder) / "model", target)


WRITERS: dict[str, Callable[[LoRADeltas, Path, Path, torch.dtype], None]] = {
    "diffusers": write_diffusers,
    "kohya": write_kohya,
    "merged": write_merged,
}
