"""LoRA: adding it to a model, saving it as other tools read it, loading it back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.base import Model
from draftune.paths import user_path, written_whole
from draftune.quiet import quiet
from draftune.tensors import save_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
CONFIG = "lora_adapter_metadata"
"""Where a file's metadata says rank and alpha, as diffusers and peft read them."""
ADAPTER = "default"
LAYERS = (nn.Linear, nn.Conv2d)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(model: Model, rank: int, alpha: float | None = None, targets: Sequence[str] = ATTENTION) -> None:
    """Adds a trainable LoRA to the model's denoiser: A Gaussian, B zero, so that nothing changes yet.

    `targets` are the ends of the names of the layers to adapt. The LoRA's weights are float32 whatever the model's
    precision. Raises DraftuneError if no layer has such a name.
    """
    from peft import LoraConfig

    if ADAPTER in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} carries a LoRA already: load the model anew to train another")
    targets = [target.strip() for target in targets]
    layers = {name: layer for name, layer in model.denoiser.named_modules() if isinstance(layer, LAYERS)}
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in layers):
            raise DraftuneError(f"no linear or convolution layer of {model.name!r} ends in {target!r} (lora_targets)")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=targets,
        init_lora_weights="gaussian",
    )
    model.denoiser.add_adapter(config, adapter_name=ADAPTER)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def lora_parameters(model: Model) -> dict[str, nn.Parameter]:
    """The trainable tensors by name."""
    return {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}


def set_lora_scale(model: Model, scale: float) -> None:
    """The LoRA's strength: 0 is the base model, 1 is as trained."""
    set_lora_scales(model, {ADAPTER: scale})


def set_lora_scales(model: Model, scales: Mapping[str, float]) -> None:
    """The strength of each LoRA by the name it was loaded under; the weights are W_0 + sum_i scale_i dW_i."""
    model.denoiser.set_adapters(list(scales), weights=list(scales.values()))


def save_lora(model: Model, folder: Path | str) -> Path:
    """Writes the LoRA in diffusers' format, with its alpha and the base model's name; returns the file's path."""
    from peft.utils import get_peft_model_state_dict

    if ADAPTER not in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} carries no LoRA to save")
    tensors = get_peft_model_state_dict(model.denoiser, adapter_name=ADAPTER)
    config = model.denoiser.peft_config[ADAPTER]
    targets = sorted(config.target_modules)
    said = {"base_model": model.name}
    return write_lora(Path(folder), model.lora_prefix, tensors, config.r, config.lora_alpha, targets, said)


def write_lora(
    folder: Path,
    prefix: str,
    tensors: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    targets: Sequence[str],
    said: Mapping[str, str],
) -> Path:
    """Writes tensors by their names in peft, LAYER.lora_A.weight, in diffusers' format; returns the file's path.

    All layers have this rank and alpha; `said` goes into the file's metadata.
    """
    # From the first name diffusers takes whether all are peft's, and drops those that are not without a word.
    names = {name: name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.") for name in tensors}
    # diffusers takes alpha from the metadata alone; without it, another strength is loaded silently. No more than what
    # every version of peft understands.
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}  # older versions of diffusers want them
    metadata = {
        "format": "pt",
        CONFIG: json.dumps({f"{prefix}.{key}": value for key, value in config.items()}),
        **said,
    }
    path = folder / FILE_NAME
    with written_whole(path) as temporary:
        save_tensors(temporary, {f"{prefix}.{names[name]}": tensor for name, tensor in tensors.items()}, metadata)
    return path


def lora_file(source: Path | str) -> Path:
    """The LoRA's file, given itself, its folder or a run's folder. Raises DraftuneError if there is none."""
    source = user_path(source)
    for path in (source, source / FILE_NAME, source / "lora" / FILE_NAME):
        if path.is_file():
            return path
    raise DraftuneError(f"no LoRA at {str(source)!r}: a run's folder or a {FILE_NAME} is wanted")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises DraftuneError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DraftuneError(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def base_model(source: Path | str) -> str | None:
    """The name of the model that a LoRA was trained on, where its file says so. Raises DraftuneError."""
    with opened(lora_file(source)) as file:
        return (file.metadata() or {}).get("base_model")


def load_lora(model: Model, source: Path | str, name: str = ADAPTER) -> None:
    """Loads a LoRA file, or that of a run, onto the model, under a name where there are several.

    Raises DraftuneError if it does not fit the model.
    """
    path = lora_file(source)
    base_model(path)
    try:
        with quiet():
            model.pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DraftuneError(f"the LoRA {str(path)!r} does not fit {model.name!r}: {str(error)[:200]}") from error
    if name not in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{str(path)!r} holds no LoRA for the denoiser of {model.name!r}")
    model.denoiser.requires_grad_(False)
