"""LoRA files: finding them, their metadata, the tensors that are in them by layer, and writing them for diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.lora.names import TEXT_ENCODER
from draftune.sampling.schedule import GRID
from draftune.utils.paths import user_path, written_whole
from draftune.utils.single_file import PICKLES, single_file_error
from draftune.utils.tensors import save_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIG = "lora_adapter_metadata"
"""The metadata key under which diffusers and peft store rank and alpha, as JSON."""
GRID_SAID = "sampler_grid"
"""The metadata key of the sampler settings that the LoRA was trained with, as JSON of what `Model.set_grid` takes."""

# What stands after a layer's name in the keys of diffusers, peft, kohya's sd-scripts, LyCORIS, ai-toolkit, SimpleTuner
# and OneTrainer. peft may put an adapter's name before ".weight".
SUFFIXES: dict[str, str] = {
    "down": r"\.lora_(?:down|A)(?:\.\w+)?\.weight|\.lora(?:_linear_layer)?\.down\.weight",
    "up": r"\.lora_(?:up|B)(?:\.\w+)?\.weight|\.lora(?:_linear_layer)?\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(?:\.(?!weight)\w+)?(?:\.weight)?",
}
# The oldest format of diffusers ("attn1.processor.to_q_lora.down.weight") and that of XLabs ("qkv_lora1.down.weight"):
# "_lora" belongs to the layer's name.
NAMED_LORA = re.compile(r"(_lora\d?)\.(down|up)\.weight$")


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and alpha of the layers of one network, as peft stores them."""

    rank: int
    alpha: float
    targets: Sequence[str]


@dataclass
class LoRAFile:
    """The contents of a LoRA file.

    Attributes:
        path: the file.
        layers: by the name of a layer as the file spells it, its tensors by kind: "down", "up", "mid", "alpha",
            "dora_scale", "magnitude".
        metadata: the file's own metadata.
        config: rank and alpha by the metadata or by peft's adapter_config.json, keys as in peft, empty if not there.
    """

    path: Path
    layers: dict[str, dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def base_model(self) -> str | None:
        return self.metadata.get("base_model") or self.config.get("base_model_name_or_path") or None

    @property
    def is_dora(self) -> bool:
        return any("dora_scale" in tensors or "magnitude" in tensors for tensors in self.layers.values())


def lora_file(source: Path | str) -> Path:
    """Find a LoRA's file, given itself, its folder or a run's folder.

    Raises:
        DraftuneError: there is none, or the file holds a whole model.
    """
    source = user_path(source)
    found = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    alone = found if len(found) == 1 and not (source / "config.json").exists() else []
    for path in (source, source / FILE_NAME, source / "lora" / FILE_NAME, source / PEFT_FILE, *alone):
        if path.is_file():
            if error := single_file_error(path):
                raise error
            return path
    pickled = [path.name for path in sorted(source.glob("*")) if path.suffix in PICKLES] if source.is_dir() else []
    if pickled:
        raise not_safetensors(source / pickled[0])
    more = f" ({len(found)} .safetensors files lie there: name one)" if len(found) > 1 else ""
    raise DraftuneError(
        f"no LoRA at {str(source)!r}{more}: give a run's folder, a .safetensors file, or a folder with {FILE_NAME} or "
        f"{PEFT_FILE}"
    )


def not_safetensors(path: Path) -> DraftuneError:
    return DraftuneError(
        f"{str(path)!r} is a pickle file, which can run code when it is read: convert it to safetensors "
        "(safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW))"
    )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises DraftuneError if it is none."""
    if path.suffix.lower() in PICKLES:
        raise not_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DraftuneError(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def read_file(source: Path | str) -> LoRAFile:
    """Read a LoRA file in the format of any tool.

    Raises:
        DraftuneError: not a safetensors file, no LoRA, a kind of adapter that is not one, or damaged metadata.
    """
    path = lora_file(source)
    with opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        name, kind = split_key(key)
        if not kind:
            others.append(key)
        elif kind in layers.setdefault(name, {}):
            raise DraftuneError(f"{str(path)!r} holds two tensors of one kind for {name}, one of them is {key}")
        else:
            layers[name][kind] = tensor
    if not any("down" in found or "up" in found for found in layers.values()):
        raise no_lora(path, others)
    if others:
        raise DraftuneError(
            f"{str(path)!r} is no plain LoRA: {len(others)} of its {len(tensors)} tensors can't be applied, such as "
            f"{others[0]}"
        )
    return LoRAFile(path, layers, metadata, adapter_config(path, metadata))


def no_lora(path: Path, keys: Sequence[str]) -> DraftuneError:
    """Return the error for a file with these tensors, none of which is a half of a LoRA."""
    example = f": it holds {keys[0]}; LoHa, LoKr and whole weights are not supported" if keys else ""
    return DraftuneError(f"{str(path)!r} holds no LoRA{example}")


def split_key(key: str) -> tuple[str, str]:
    """Split a tensor's key into a layer's name and a kind of tensor, which is empty where none is known."""
    for kind, suffix in SUFFIXES.items():
        if match := re.search(f"(?:{suffix})$", key):
            return key[: match.start()], kind
    if match := NAMED_LORA.search(key):
        return key[: match.end(1)], match[2]
    return key, ""


def adapter_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read rank and alpha of a file: of its metadata, else of peft's adapter_config.json beside it.

    Returns:
        The entries as they are stored: diffusers puts "unet." or "text_encoder." before peft's names.

    Raises:
        DraftuneError: they can't be read.
    """
    beside = path.with_name(PEFT_CONFIG)
    where = CONFIG if CONFIG in metadata else PEFT_CONFIG
    try:
        if CONFIG in metadata:
            config = json.loads(metadata[CONFIG])
        elif path.name == PEFT_FILE and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
            if (kind := config.get("peft_type", "LORA")) != "LORA":
                raise DraftuneError(f"{str(path)!r} is no LoRA: its {PEFT_CONFIG} says {kind}")
        else:
            return {}
        for name, value in config.items():
            if name.rpartition(".")[2] in ("r", "lora_alpha"):
                float(value)
            if name.rpartition(".")[2] in ("alpha_pattern", "rank_pattern"):
                {str(key): float(number) for key, number in (value or {}).items()}
        return dict(config)
    except (ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        raise DraftuneError(f"the metadata of {str(path)!r} is no LoRA's: {where} can't be read") from error


def base_model(source: Path | str) -> str | None:
    """Return the name of the model that a LoRA was trained on, where its file says so.

    Raises:
        DraftuneError: there is no such file, or it holds no LoRA.
    """
    path = lora_file(source)
    with opened(path) as file:
        metadata, keys = file.metadata() or {}, list(file.keys())
    if not any(split_key(key)[1] in ("down", "up") for key in keys):
        raise no_lora(path, keys)
    return LoRAFile(path, {}, metadata, adapter_config(path, metadata)).base_model


def saved_grid(source: Path | str) -> dict[str, Any]:
    """Return the sampler settings that a LoRA was trained with, as far as its file says so. Raises DraftuneError."""
    with opened(lora_file(source)) as file:
        stored = (file.metadata() or {}).get(GRID_SAID, "{}")
    try:
        found = json.loads(stored)
        return {name: found[name] for name in GRID if name in found}
    except (ValueError, TypeError) as error:
        raise DraftuneError(f"the metadata of {str(source)!r} is no LoRA's: {GRID_SAID} can't be read") from error


def write_lora(
    folder: Path, tensors: Mapping[str, Tensor], configs: Mapping[str, AdapterConfig], metadata: Mapping[str, str]
) -> Path:
    """Write a LoRA in diffusers' format, FOLDER/pytorch_lora_weights.safetensors.

    Args:
        folder: made if it is not there.
        tensors: PART.LAYER.lora_A.weight and PART.LAYER.lora_B.weight.
        configs: by PART ("unet", "text_encoder") the rank and alpha of all of its layers.
        metadata: more of the file's metadata.

    Returns:
        The file's path.
    """
    # From the denoiser's first name diffusers takes whether all of them are peft's, and drops those that are not
    # without a word. For a text encoder it wants peft's names.
    names = {
        name: name
        if name.startswith(TEXT_ENCODER)
        else name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        for name in tensors
    }
    # diffusers takes alpha from the metadata alone; without it, another strength is loaded silently. No more than what
    # every version of peft understands; older versions of diffusers want the patterns, empty or not.
    config: dict[str, Any] = {
        f"{part}.{key}": value
        for part, c in configs.items()
        for key, value in (
            *(("r", c.rank), ("lora_alpha", c.alpha), ("target_modules", list(c.targets))),
            *(("rank_pattern", {}), ("alpha_pattern", {})),
        )
    }
    path = folder / FILE_NAME
    with written_whole(path) as temporary:
        save_tensors(
            temporary,
            {names[name]: tensor for name, tensor in tensors.items()},
            {"format": "pt", CONFIG: json.dumps(config), **metadata},
        )
    return path
