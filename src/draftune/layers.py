"""A LoRA as what it adds to each layer, whichever tool wrote its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.adapters import KEPT
from draftune.errors import DraftuneError
from draftune.loading import first_line
from draftune.lora import CONFIG, GRID_SAID, load_lora, lora_file, opened, write_lora
from draftune.models import FAMILIES, Model


class Layer(NamedTuple):
    """What is added to one layer's weight is up · down: down [rank, in, ...], up [out, rank, ...], float32."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return len(self.up), *self.down.shape[1:]

    @property
    def change(self) -> Tensor:
        """What is added to the weight."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(self.shape)

    def scaled(self, scale: float) -> Layer:
        return Layer(self.down, scale * self.up)

    def padded(self, rank: int) -> Layer:
        """The same with more ranks, which add nothing."""
        more = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(more, *self.down.shape[1:])])
        return Layer(down, torch.cat([self.up, self.up.new_zeros(len(self.up), more, *self.up.shape[2:])], 1))

    def joined(self, other: Layer) -> Layer:
        """The layer that adds what both add."""
        return Layer(torch.cat([self.down, other.down]), torch.cat([self.up, other.up], 1))

    def truncated(self, rank: int) -> Layer:
        """The nearest layer of at most this rank, by the squares of the change's numbers: its largest singular values.

        Each is shared out evenly between down and up.
        """
        # Of two thin matrices, so that the whole change is never made.
        outer, up = torch.linalg.qr(self.up.flatten(1))
        inner, down = torch.linalg.qr(self.down.flatten(1).T)
        left, values, right = torch.linalg.svd(up @ down.T, full_matrices=False)
        root = values[:rank].sqrt()
        kept = len(root)
        return Layer(
            (root[:, None] * right[:rank] @ inner.T).reshape(kept, *self.down.shape[1:]),
            (outer @ left[:, :rank] * root).reshape(len(self.up), kept, *self.up.shape[2:]),
        )


@dataclass
class Layers:
    """A LoRA's layers by their names in the denoiser, which `prefix` names, as strong as it was trained."""

    layers: dict[str, Layer]
    prefix: str
    base_model: str | None
    grid: str = ""
    """What its file says of the sampler's grid."""

    def scaled(self, scale: float) -> Layers:
        """The LoRA at this strength."""
        return replace(self, layers={name: layer.scaled(scale) for name, layer in self.layers.items()})

    def truncated(self, rank: int) -> Layers:
        """The nearest LoRA of at most this rank, layer by layer."""
        return replace(self, layers={name: layer.truncated(rank) for name, layer in self.layers.items()})

    def padded(self, rank: int) -> Layers:
        """The same with this rank in every layer."""
        return replace(self, layers={name: layer.padded(rank) for name, layer in self.layers.items()})

    def plus(self, tensors: Mapping[str, Tensor], scale: float) -> Layers:
        """The sum with another LoRA, given by its names in peft, LAYER.lora_A.weight, which acts at this scale."""
        layers = dict(self.layers)
        for name in sorted({key.rpartition(".lora_")[0] for key in tensors}):
            down, up = (tensors[f"{name}.lora_{half}.weight"].detach().float().cpu() for half in "AB")
            other = Layer(down, up).scaled(scale)
            layers[name] = layers[name].joined(other) if name in layers else other
        return replace(self, layers=layers)

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
        """LAYER.lora_A.weight and LAYER.lora_B.weight in this precision, and the rank of all of them, which is alpha.

        One rank, equal to alpha, is what every reader understands: some versions of diffusers mistake the strength of
        layers whose ranks differ. Raises DraftuneError for numbers that the precision can't hold.
        """
        rank = max(layer.rank for layer in self.layers.values())
        tensors = {}
        for name, layer in self.padded(rank).layers.items():
            for half, tensor in zip("AB", layer, strict=True):
                tensors[f"{name}.lora_{half}.weight"] = cast = tensor.to(dtype)
                if not cast.isfinite().all():
                    raise DraftuneError(f"the LoRA's weights of {name} are not finite in {cast.dtype}")
        return tensors, rank

    def write(self, folder: Path, dtype: torch.dtype = torch.float32, **said: str) -> Path:
        """Writes FOLDER/pytorch_lora_weights.safetensors as `save_lora` does; returns its path."""
        tensors, rank = self.tensors(dtype)
        if self.base_model:
            said["base_model"] = self.base_model
        if self.grid:
            said[GRID_SAID] = self.grid
        return write_lora(folder, self.prefix, tensors, rank, rank, sorted(self.layers), said)


def keep_lora(model: Model, source: Path | str) -> None:
    """Makes a LoRA part of the base, before another is added: frozen, active, and saved with that one as their sum.

    It is never added to the weights, whose precision may be too coarse to hold it. Raises DraftuneError if it does not
    fit the model, or the model carries a LoRA already.
    """
    if getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} carries a LoRA already: load the model anew to go on from another")
    layers = read_layers(source)
    load_lora(model, source, KEPT)
    model.kept = layers


def read_layers(source: Path | str, base_model: str | None = None) -> Layers:
    """The layers of a run's LoRA, or of a file in diffusers' or kohya's format, without the base model.

    `base_model` is its name where the file does not say it, or says another. Raises DraftuneError for a file that is
    no LoRA of the denoiser alone, and for kinds of LoRA that are more than two matrices a layer.
    """
    path = lora_file(source)
    with opened(path) as file:
        said = file.metadata() or {}
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors, alphas = peft_names(path, stored)
    parts = {key.partition(".")[0] for key in tensors}
    denoisers = parts & {family.lora_prefix for family in FAMILIES.values()}
    if not denoisers:
        raise DraftuneError(f"{str(path)!r} holds no LoRA for a denoiser")
    if len(parts) > 1:
        others = ", ".join(sorted(parts - denoisers))
        raise DraftuneError(f"{str(path)!r} changes the {others} too; only LoRAs of the denoiser alone are read")
    prefix = denoisers.pop()
    config = adapter_config(path, said, prefix)
    layers = {}
    for key, (down, up) in pairs(path, tensors).items():
        name, rank = key.removeprefix(f"{prefix}."), len(down)
        alpha = alphas.get(key, alpha_of(name, config, rank))
        layers[name] = Layer(down, up).scaled(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return Layers(layers, prefix, base_model or said.get("base_model"), said.get(GRID_SAID, ""))


def peft_names(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors by their names in peft, PART.LAYER.lora_A.weight, and each alpha that is among them by PART.LAYER."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    alphas = {key: float(value) for key, value in tensors.items() if key.endswith(".alpha") and value.numel() == 1}
    kohya = all(key.startswith("lora_") for key in tensors)
    layers = {key.partition(".")[0] for key in tensors if kohya and key.startswith("lora_unet_")}
    if kohya:
        try:
            tensors, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors)
        except (ValueError, KeyError, IndexError) as error:
            raise DraftuneError(f"{str(path)!r} is no LoRA that can be read: {first_line(error)}") from error
    named = convert_unet_state_dict_to_peft({key: value for key, value in tensors.items() if key not in alphas})
    alphas = convert_unet_state_dict_to_peft(alphas)
    if kohya:
        # Older versions of diffusers leave a dot in the names of the first and the last layer, and take some for one.
        named = {key.replace("unet.conv.", "unet.conv_"): tensor for key, tensor in named.items()}
        alphas = {key.replace("unet.conv.", "unet.conv_"): alpha for key, alpha in alphas.items()}
        layers -= {f"lora_{key.rpartition('.lora_')[0].replace('.', '_')}" for key in named}
        if layers:
            raise DraftuneError(f"{str(path)!r} holds {min(layers)}, a layer that diffusers does not know by this name")
    return named, {key.removesuffix(".alpha").partition(".lora_A")[0]: alpha for key, alpha in alphas.items()}


def pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up of each layer in float32. Raises DraftuneError for whatever else there is."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, half = key.rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or tensor.ndim not in (2, 4) or not tensor.is_floating_point():
            raise DraftuneError(f"{str(path)!r} is no plain LoRA: it holds {key}")
        halves.setdefault(layer, {})[half] = tensor.float()
    found = {}
    for layer, both in halves.items():
        if len(both) < 2:
            raise DraftuneError(f"{str(path)!r} lacks a half of the LoRA of {layer}")
        down, up = found[layer] = both["A.weight"], both["B.weight"]
        if not len(down) or down.ndim != up.ndim or up.shape[1:] != (len(down), *[1] * (up.ndim - 2)):
            raise DraftuneError(
                f"{str(path)!r} is no plain LoRA: {layer} has shapes {list(down.shape)} and {list(up.shape)}"
            )
    return found


def adapter_config(path: Path, said: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """What the file's metadata says of rank and alpha, as diffusers reads it; nothing where there is none."""
    try:
        config = json.loads(said.get(CONFIG, "{}"))
        config = {key.removeprefix(f"{prefix}."): value for key, value in config.items()}
        return {**config, "lora_alpha": float(config["lora_alpha"])} if config else {}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DraftuneError(f"the metadata of {str(path)!r} is no LoRA's: {CONFIG} can't be read") from error


def alpha_of(layer: str, config: Mapping[str, Any], rank: int) -> float:
    """A layer's alpha by the metadata, else its rank, so that the LoRA acts as it is."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    return patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha", rank))
