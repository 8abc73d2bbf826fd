"""Export a LoRA for diffusers, for ComfyUI, for readers of kohya's format, or merged into a pipeline."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.lora import FILE_NAME, SAMPLER_METADATA, LoRADeltas, check_sampler, lora_file, saved_steps
from draftune.lora.comfyui import comfyui_names, has_loader
from draftune.lora.metadata import steps_metadata
from draftune.lora.names import in_network
from draftune.models import DiffusionModel, load_model
from draftune.models.layout import load_layout
from draftune.models.quantization import is_quantized
from draftune.runs import load
from draftune.runs.formats import UNCONDITIONAL
from draftune.runs.load import read_deltas
from draftune.runs.run_dir import run_settings
from draftune.settings import Settings
from draftune.utils.logging import logger
from draftune.utils.model_options import NO_OPTIONS, ModelOptions
from draftune.utils.paths import atomic_write, check_writable, user_path
from draftune.utils.quiet import silence_libraries
from draftune.utils.tensors import save_tensors

SUFFIX = ".safetensors"
FILE_FORMATS = ("comfyui", "kohya")
"""The formats that are one file, not a folder."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def export_lora(
    source: Path | str,
    output: Path | str,
    format: str = "diffusers",
    lora_scale: float = 1.0,
    best: bool = False,
    dtype: str = "fp32",
    model: str | None = None,
    skip_text_encoder: bool = False,
    options: ModelOptions = NO_OPTIONS,
) -> Path:
    """Export a LoRA for another tool.

    Args:
        source: A run's folder, a LoRA file or its folder.
        output: The file or folder to write, which must not exist.
        format: "diffusers": a folder with the LoRA. "comfyui": a .safetensors file with ComfyUI's names. "kohya": a
            .safetensors file with kohya's names, for UNets. "merged": the folder of the base model's pipeline with the
            LoRA merged into its weights and the run's sampler.
        lora_scale: Factor of the LoRA's weights.
        best: Whether to take the run's best LoRA by its evaluations instead of the last one.
        dtype: "fp32" or "fp16".
        model: The base model; the one named in the LoRA's metadata or run by default.
        skip_text_encoder: Whether to ignore the LoRA's layers of text encoders.
        options: Where the base model's files come from, besides its name.

    Returns:
        The path of `output`.

    Raises:
        DraftuneError: the LoRA cannot be read or does not fit, or `output` exists.
    """
    target = user_path(output)
    check(target, format, lora_scale, dtype)
    path = source_file(source, best)
    check_steps(path, format)
    sampler_options(path)  # fails before anything is written if the run cannot be read
    lora = read_deltas(path, model, skip_text_encoder, options).scaled(lora_scale)
    WRITERS[format](lora, path, target, DTYPES[dtype])
    return target


def check(target: Path, format: str, lora_scale: float, dtype: str) -> None:
    """Check the arguments before anything is read. Raises DraftuneError."""
    if format not in WRITERS:
        raise unknown("format", format, WRITERS)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not math.isfinite(lora_scale):
        raise DraftuneError(f"--lora-scale must be finite, not {lora_scale}")
    is_file = format in FILE_FORMATS
    if (target.suffix == SUFFIX) != is_file:
        kind = f"a {SUFFIX} file" if is_file else "a folder"
        raise DraftuneError(f"--output must be {kind} with --format {format}, not {str(target)!r}")
    if target.exists() and not (not is_file and target.is_dir() and not any(target.iterdir())):
        raise DraftuneError(f"the output {str(target)!r} already exists; give another (--output)")
    check_writable(target)


def source_file(source: Path | str, best: bool = False) -> Path:
    """Return the LoRA file of a source; of a run the last or the best. Raises DraftuneError if there is none."""
    path = user_path(source) / "best" / FILE_NAME
    if best and not path.is_file():
        raise DraftuneError(f"{str(source)!r} has no best LoRA: only runs with evaluations (--eval-prompts) have one")
    return path if best else lora_file(source)


def sampler_options(lora: Path) -> dict[str, Any]:
    """Return the sampler options that a LoRA was trained with (see `draftune.runs.load.sampler_options`)."""
    return load.sampler_options(lora, run_settings(lora))


def check_steps(lora: Path, format: str) -> None:
    """Raise DraftuneError for a LoRA of some sampling steps and a format whose LoRA acts on all of them."""
    steps = saved_steps(lora)
    if format == "merged" and not steps.is_all:
        raise DraftuneError(
            f"the LoRA is active on the steps {steps} only (lora_steps), but merged weights act on all steps: use "
            "--format diffusers, and activate the LoRA by step"
        )


def write_diffusers(lora: LoRADeltas, path: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the LoRA in diffusers' format."""
    if t5 := [name for name in lora.layers if ".encoder.block." in name]:
        logger.warning(
            f"diffusers' load_lora_weights ignores the LoRA's {len(t5)} layers of T5; --format merged includes them"
        )
    lora.write(target, dtype)


def write_comfyui(lora: LoRADeltas, path: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the LoRA with ComfyUI's names; see `draftune.lora.comfyui`. For UNets these are kohya's names.

    No alpha is written: ComfyUI then takes 1 for alpha / rank.
    """
    networks = load_layout(str(lora.base_model), lora.base_options)
    denoiser = next(iter(networks.values()))
    if not has_loader(denoiser):
        raise DraftuneError(
            f"--format comfyui does not support {type(denoiser).__name__}: ComfyUI has no loader for this network. Use "
            "--format diffusers or merged"
        )
    if "unet" in networks:
        write_kohya(lora, path, target, dtype)
        return
    rank = max(layer.rank for layer in lora.layers.values())
    tensors = comfyui_names(lora.padded(rank), networks).factors(dtype)
    with atomic_write(target) as temporary:
        save_tensors(temporary, tensors, {"format": "pt", **origin(lora, path)})


def write_kohya(lora: LoRADeltas, path: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the LoRA in kohya's format: lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, ….

    Alpha is written as the rank, which diffusers' conversion of this format assumes.
    """
    if "unet" not in lora.parts:
        denoiser = next(iter(load_layout(str(lora.base_model), lora.base_options).values()))
        others = "comfyui or diffusers" if has_loader(denoiser) else "diffusers or merged"
        raise DraftuneError(f"--format kohya supports UNets only, not {type(denoiser).__name__}: use --format {others}")
    if any(UNCONDITIONAL.search(name) for name in lora.layers):
        raise DraftuneError("--format kohya does not support unconditional models: use --format diffusers or merged")
    named, rank = lora.tensors(dtype)
    # Text encoders are numbered if the pipeline has two, even if the LoRA changes only one.
    numbered = len(lora.parts) > 1 and "text_encoder_2" in load_layout(str(lora.base_model), lora.base_options)
    encoders = {"text_encoder": "te1" if numbered else "te", "text_encoder_2": "te2"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        layer, _, half = name.rpartition(".lora_")
        part, _, inner = layer.partition(".")
        key = f"lora_{encoders.get(part, part)}_{inner.replace('.', '_')}"
        tensors[f"{key}.{'lora_down' if half == 'A.weight' else 'lora_up'}.weight"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    info = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": target.stem,
    }
    if any(max(layer.shape[2:], default=1) > 1 for layer in lora.layers.values()):
        info["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": str(float(rank))})
    with atomic_write(target) as temporary:
        save_tensors(temporary, tensors, info | origin(lora, path))


def origin(lora: LoRADeltas, path: Path) -> dict[str, str]:
    """Return the metadata of a file's origin: the base model, the sampler options and the settings of the run."""
    info: dict[str, str] = {}
    if lora.base_model:
        info |= {"base_model": lora.base_model, "ss_sd_model_name": lora.base_model}
    if lora.grid:
        info[SAMPLER_METADATA] = lora.grid
    info |= steps_metadata(lora.lora_steps)
    if settings := run_settings(path):
        info |= training_metadata(settings)
    return info


def training_metadata(settings: Settings) -> dict[str, str]:
    """Return a run's settings under kohya's names where these mean the same, others in the comment."""
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
    """Write the base model's pipeline with the LoRA merged into its weights."""
    model = load_model(str(lora.base_model), **lora.base_options._asdict())
    if is_quantized(model.denoiser):
        raise DraftuneError(
            f"--format merged can't write the quantized weights of {model.name!r}: use --format diffusers, or merge "
            "into the unquantized model (--model)"
        )
    check_sampler(model, path)
    model.set_sampler_options(**sampler_options(path))
    merge(model, lora)
    save_pipeline(model, target, dtype)


@torch.no_grad()
def merge(model: DiffusionModel, lora: LoRADeltas) -> None:
    """Add the LoRA, which was read for this model, to the weights of the model's networks."""
    for part, network in model.lora_networks.items():
        for name, delta in lora.of_part(part).items():
            weight = network.get_submodule(in_network(part, name, network)).weight
            weight += delta.change.to(weight)


def save_pipeline(model: DiffusionModel, target: Path, dtype: torch.dtype) -> None:
    """Write the model's pipeline atomically, with the scheduler of draftune's sampler."""
    with silence_libraries():
        model.pipeline.scheduler = model.sampler()
        model.complete_config()
        model.pipeline.to(dtype=dtype)
        for part in (model.pipeline, *model.pipeline.components.values()):
            if hasattr(part, "register_to_config"):
                part.register_to_config(_name_or_path="")  # the path of the base model is private
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            model.pipeline.save_pretrained(Path(folder) / "model", safe_serialization=True)
            readable = (Path(folder) / "model" / "model_index.json").stat().st_mode
            for weights in Path(folder).rglob("*.safetensors"):
                weights.chmod(readable)  # safetensors writes files that only the owner can read
            os.replace(Path(folder) / "model", target)


WRITERS: dict[str, Callable[[LoRADeltas, Path, Path, torch.dtype], None]] = {
    "diffusers": write_diffusers,
    "comfyui": write_comfyui,
    "kohya": write_kohya,
    "merged": write_merged,
}
