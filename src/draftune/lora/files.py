"""LoRA files: find them, read their tensors and metadata, and write them in diffusers' format."""

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
from draftune.utils.paths import atomic_write, user_path
from draftune.utils.single_file import PICKLES, single_file_error
from draftune.utils.tensors import save_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIG = "lora_adapter_metadata"
"""The metadata key of rank and alpha in files of diffusers and peft, as JSON."""

# The suffixes after a layer's name in the keys of diffusers, peft, kohya's sd-scripts, LyCORIS, ai-toolkit, SimpleTuner
# and OneTrainer. peft may insert an adapter's name before ".weight".
SUFFIXES: dict[str, str] = {
    "down": r"\.lora_(?:down|A)(?:\.\w+)?\.weight|\.lora(?:_linear_layer)?\.down\.weight",
    "up": r"\.lora_(?:up|B)(?:\.\w+)?\.weight|\.lora(?:_linear_layer)?\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(?:\.(?!weight)\w+)?(?:\.weight)?",
}
# In the oldest format of diffusers ("attn1.processor.to_q_lora.down.weight") and in that of XLabs
# ("qkv_lora1.down.weight"), "_lora" is part of the layer's name.
NAMED_LORA = re.compile(r"(_lora\d?)\.(down|up)\.weight$")
OTHER_KINDS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.diff(_b)?$": "a difference of whole weights",
}
"""By a pattern of the keys: the adapters that are no LoRA."""


@dataclass(frozen=True)
class AdapterConfig:
    """The peft config of the LoRA of one network.

    Attributes:
        rank: The rank of all layers.
        alpha: The numerator of the scale alpha / rank.
        targets: The names of the layers, or their ends.
    """

    rank: int
    alpha: float
    targets: Sequence[str]


@dataclass
class LoRAFile:
    """The contents of a LoRA file.

    Attributes:
        path: The file.
        layers: For each layer, by its name in the file: its tensors by kind ("down", "up", "mid", "alpha",
            "dora_scale", "magnitude").
        metadata: The file's metadata.
        config: Rank and alpha from the metadata or from peft's adapter_config.json, with peft's keys; may be empty.
    """

    path: Path
    layers: dict[str, dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def base_model(self) -> str | None:
        """The name of the base model, if the file states it."""
        return self.metadata.get("base_model") or self.config.get("base_model_name_or_path") or None

    @property
    def is_dora(self) -> bool:
        """Whether a layer is a DoRA."""
        return any("dora_scale" in tensors or "magnitude" in tensors for tensors in self.layers.values())


def lora_file(source: Path | str) -> Path:
    """Return the path of a LoRA file, given the file, its folder or a run's folder.

    Raises:
        DraftuneError: There is no LoRA file, or the file is a single-file checkpoint.
    """
    source = user_path(source)
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    only = files if len(files) == 1 and not (source / "config.json").exists() else []
    for path in (source, source / FILE_NAME, source / "lora" / FILE_NAME, source / PEFT_FILE, *only):
        if path.is_file():
            if error := single_file_error(path):
                raise error
            return path
    pickled = [path.name for path in sorted(source.glob("*")) if path.suffix in PICKLES] if source.is_dir() else []
    if pickled:
        raise not_safetensors(source / pickled[0])
    more = f" (it has {len(files)} .safetensors files: give the path of one)" if len(files) > 1 else ""
    if (source / "checkpoints").is_dir():
        more = " (the training of this run has not ended: its command resumes it)"
    elif runs := sorted(path.parent for path in source.glob("*/config.yaml")):
        more = f" (it has runs, such as {str(runs[0])!r})"
    raise DraftuneError(
        f"no LoRA at {str(source)!r}{more}: give a run's folder, a .safetensors file, or a folder with {FILE_NAME} or "
        f"{PEFT_FILE}"
    )


def not_safetensors(path: Path) -> DraftuneError:
    """Return the error for a pickle file."""
    return DraftuneError(
        f"{str(path)!r} is a pickle file, which can run code when it is loaded: convert it to safetensors "
        "(safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW))"
    )


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises DraftuneError if it is not readable as safetensors."""
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
        DraftuneError: The file is not a safetensors file, contains no LoRA or another kind of adapter, or its metadata
            is damaged.
    """
    path = lora_file(source)
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        name, kind = split_key(key)
        if not kind:
            others.append(key)
        elif kind in layers.setdefault(name, {}):
            raise DraftuneError(f"{str(path)!r} holds two {kind!r} tensors for {name}, one of them is {key}")
        else:
            layers[name][kind] = tensor
    if not any("down" in kinds or "up" in kinds for kinds in layers.values()):
        raise no_lora(path, others)
    if others:
        raise DraftuneError(
            f"{str(path)!r} is not a plain LoRA: {len(others)} of its {len(tensors)} tensors are not supported, such "
            f"as {others[0]}{other_kind(others)}"
        )
    return LoRAFile(path, layers, metadata, adapter_config(path, metadata))


def no_lora(path: Path, keys: Sequence[str]) -> DraftuneError:
    """Return the error for a file with these keys, none of which is a LoRA factor."""
    example = f": it holds {keys[0]}{other_kind(keys) or ', which is no LoRA factor'}" if keys else ""
    return DraftuneError(f"{str(path)!r} holds no LoRA{example}")


def other_kind(keys: Sequence[str]) -> str:
    """Return what kind of adapter these keys belong to, as the end of a message; "" if it is unknown."""
    kind = next((kind for part, kind in OTHER_KINDS.items() if any(re.search(part, key) for key in keys)), "")
    return f" ({kind}, which is not supported)" if kind else ""


def split_key(key: str) -> tuple[str, str]:
    """Split a tensor's key into the layer's name and the kind of tensor, which is "" if it is unknown."""
    for kind, suffix in SUFFIXES.items():
        if match := re.search(f"(?:{suffix})$", key):
            return key[: match.start()], kind
    if match := NAMED_LORA.search(key):
        return key[: match.end(1)], match[2]
    return key, ""


def adapter_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read rank and alpha from a file's metadata, or from peft's adapter_config.json in the same folder.

    Returns:
        The entries as they are stored: diffusers adds the prefix "unet." or "text_encoder." to peft's keys.

    Raises:
        DraftuneError: The config can't be read, or belongs to another kind of adapter.
    """
    peft_config = path.with_name(PEFT_CONFIG)
    where = CONFIG if CONFIG in metadata else PEFT_CONFIG
    try:
        if CONFIG in metadata:
            config = json.loads(metadata[CONFIG])
        elif path.name == PEFT_FILE and peft_config.is_file():
            config = json.loads(peft_config.read_text(encoding="utf-8"))
            if (kind := config.get("peft_type", "LORA")) != "LORA":
                raise DraftuneError(f"{str(path)!r} is not a LoRA: peft_type in its {PEFT_CONFIG} is {kind!r}")
        else:
            return {}
        for name, value in config.items():
            if name.rpartition(".")[2] in ("r", "lora_alpha"):
                float(value)
            if name.rpartition(".")[2] in ("alpha_pattern", "rank_pattern"):
                {str(key): float(number) for key, number in (value or {}).items()}
        return dict(config)
    except (ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        raise DraftuneError(f"the metadata of {str(path)!r} is damaged: {where} can't be read") from error


def base_model(source: Path | str) -> str | None:
    """Return the name of the base model of a LoRA file; None if the file does not state it.

    Raises:
        DraftuneError: There is no such file, or it contains no LoRA.
    """
    path = lora_file(source)
    with open_safetensors(path) as file:
        metadata, keys = file.metadata() or {}, list(file.keys())
    if not any(split_key(key)[1] in ("down", "up") for key in keys):
        raise no_lora(path, keys)
    return LoRAFile(path, {}, metadata, adapter_config(path, metadata)).base_model


def write_lora(
    folder: Path, tensors: Mapping[str, Tensor], configs: Mapping[str, AdapterConfig], metadata: Mapping[str, str]
) -> Path:
    """Write a LoRA in diffusers' format, FOLDER/pytorch_lora_weights.safetensors.

    Args:
        folder: Created if it does not exist.
        tensors: By PART.LAYER.lora_A.weight and PART.LAYER.lora_B.weight.
        configs: By PART ("unet", "text_encoder"): the rank and alpha of its layers.
        metadata: More metadata of the file.

    Returns:
        The file's path.
    """
    # diffusers decides by the first name of the denoiser whether all names are peft's, and silently ignores the others.
    # For text encoders it expects peft's names.
    names = {
        name: name
        if name.startswith(TEXT_ENCODER)
        else name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        for name in tensors
    }
    # diffusers reads alpha only from the metadata, and otherwise silently loads another scale. Only keys that every
    # version of peft knows are written; older versions of diffusers require the patterns, even if empty.
    config: dict[str, Any] = {
        f"{part}.{key}": value
        for part, c in configs.items()
        for key, value in (
            *(("r", c.rank), ("lora_alpha", c.alpha), ("target_modules", list(c.targets))),
            *(("rank_pattern", {}), ("alpha_pattern", {})),
        )
    }
    path = folder / FILE_NAME
    with atomic_write(path) as temporary:
        save_tensors(
            temporary,
            {names[name]: tensor for name, tensor in tensors.items()},
            {"format": "pt", CONFIG: json.dumps(config), **metadata},
        )
    return path
