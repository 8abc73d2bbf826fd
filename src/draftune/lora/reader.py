"""The one reader of LoRA files: from a file of any tool to what it adds to each layer of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.lora.deltas import LoRADelta, LoRADeltas
from draftune.lora.files import GRID_SAID, LoRAFile, read_file
from draftune.lora.names import TEXT_ENCODER, NameTable, Target, is_text

SKIP = "--skip-text-encoder-lora"


def read_lora(
    source: Path | str, networks: Mapping[str, nn.Module], model_name: str, skip_text_encoder: bool = False
) -> LoRADeltas:
    """Read a LoRA file and find the layers of these networks that it changes; see `fit`."""
    return fit(read_file(source), networks, model_name, skip_text_encoder)


def fit(
    file: LoRAFile, networks: Mapping[str, nn.Module], model_name: str, skip_text_encoder: bool = False
) -> LoRADeltas:
    """Find the layers of these networks that a LoRA file changes.

    Every tensor of the file ends up in a layer, or the file is refused. Read are the formats of diffusers, peft,
    kohya's sd-scripts, ai-toolkit, SimpleTuner, OneTrainer and XLabs; LoRA, LoCon with its middle matrix, DoRA.

    Args:
        file: what was read.
        networks: by PART the denoiser ("unet", "transformer") and the text encoders; `Model.lora_networks`. Their
            weights may be on the device "meta", but for DoRA, whose change of a weight depends on it.
        model_name: the model's name, for messages and as the result's base model.
        skip_text_encoder: whether the layers of text encoders are left out.

    Returns:
        The changes of the layers, as strong as the LoRA was trained.

    Raises:
        DraftuneError: the file does not fit these networks.
    """
    layers = file.layers
    if skip_text_encoder:
        layers = {name: tensors for name, tensors in layers.items() if not is_text(name)}
    table = NameTable(networks)
    found: dict[str, LoRADelta] = {}
    unknown = []
    for name, tensors in layers.items():
        target = table.find(name)
        if target is None:
            unknown.append(name)
            continue
        for layer, delta in changes(file, name, tensors, target, table).items():
            if layer in found:
                raise DraftuneError(f"{str(file.path)!r} changes {layer} twice, once as {name}")
            found[layer] = delta
    if unknown:
        raise no_place(file, unknown, len(layers), model_name)
    if not any(not name.startswith(TEXT_ENCODER) for name in found):
        raise DraftuneError(f"{str(file.path)!r} holds no LoRA for the denoiser of {model_name!r}")
    return LoRADeltas(found, model_name, file.metadata.get(GRID_SAID, ""))


def no_place(file: LoRAFile, unknown: list[str], count: int, model_name: str) -> DraftuneError:
    """Say which layers of a file the model does not have."""
    if texts := [name for name in unknown if is_text(name)]:
        return DraftuneError(
            f"the LoRA {str(file.path)!r} adapts a text encoder that {model_name!r} does not have, in {len(texts)} "
            f"layers such as {texts[0]}: {SKIP} leaves them out"
        )
    return DraftuneError(
        f"the LoRA {str(file.path)!r} does not fit {model_name!r}: {len(unknown)} of its {count} layers are not in "
        f"that model, such as {unknown[0]}"
    )


def changes(
    file: LoRAFile, name: str, tensors: Mapping[str, Tensor], target: Target, table: NameTable
) -> dict[str, LoRADelta]:
    """Convert the tensors of one name to the changes of the layers that it stands for."""
    where = f"{name} in {str(file.path)!r}"
    down, up = matrices(where, tensors)
    weights = [layer_weight(table.layers[layer]) for layer in target.layers]
    rows = [len(weight) for weight in weights]
    if len(up) != sum(rows):
        raise misfit(where, down, up, target, weights)
    strength = scale(file, target.layers[0], tensors, len(down), where)
    magnitude, axis = dora_magnitude(where, tensors, down, up)
    if target.halves_swapped:
        up = torch.cat(up.chunk(2)[::-1])
        magnitude = torch.cat(magnitude.chunk(2)[::-1]) if axis == 0 else magnitude
    magnitudes = magnitude.split(rows) if axis == 0 else [magnitude] * len(rows)
    if axis == 1 and len(rows) > 1:
        raise DraftuneError(f"{where} is a DoRA with one magnitude for each input of a fused layer: not supported")
    result = {}
    for layer, weight, part, size in zip(target.layers, weights, up.split(rows), magnitudes, strict=True):
        shaped = (down.reshape(len(down), *weight.shape[1:]) if fits(down, weight) else None, part)
        if shaped[0] is None:
            raise misfit(where, down, up, target, weights)
        # `up` is [out, rank, 1, ...] in as many dimensions as the weight has.
        delta = LoRADelta(shaped[0], part.reshape(len(part), len(down), *[1] * (weight.ndim - 2))).scaled(strength)
        if size is not None and size.numel():
            delta = decomposed(where, weight, delta, size, axis)
        result[layer] = delta
    return result


def layer_weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def fits(down: Tensor, weight: Tensor) -> bool:
    """Return whether [rank, in, ...] fits a weight [out, in, ...]; sizes of 1 at the end don't matter."""
    ours, theirs = ([*t.shape[1:]] for t in (down, weight))
    while len(ours) > 1 and ours[-1] == 1:
        ours.pop()
    while len(theirs) > 1 and theirs[-1] == 1:
        theirs.pop()
    return ours == theirs


def misfit(where: str, down: Tensor, up: Tensor, target: Target, weights: list[Tensor]) -> DraftuneError:
    shapes = ", ".join(f"{layer} {list(weight.shape)}" for layer, weight in zip(target.layers, weights, strict=True))
    return DraftuneError(f"{where} has shapes {list(down.shape)} and {list(up.shape)}, which do not fit {shapes}")


def matrices(where: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return down [rank, in, ...] and up [out, rank], with LoCon's middle matrix multiplied into down, in float32."""
    for half in ("down", "up"):
        if half not in tensors:
            raise DraftuneError(f"{where} lacks a half of its LoRA: {half}")
    for kind, tensor in tensors.items():
        if not tensor.is_floating_point() and kind != "alpha":
            raise DraftuneError(f"{where}: {kind} is {tensor.dtype}, and a LoRA holds floating-point numbers")
        if not tensor.float().isfinite().all():
            raise DraftuneError(f"{where} holds weights that are not finite")
    down, up = tensors["down"].float(), tensors["up"].float()
    wrong = DraftuneError(f"{where} is no plain LoRA: its shapes are {list(down.shape)} and {list(up.shape)}")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.numel() != up.shape[0] * up.shape[1]:
        raise wrong
    up = up.flatten(1)
    if "mid" in tensors:
        # The weight's change is up · mid · down over the ranks (LoCon's Tucker decomposition).
        mid = tensors["mid"].float()
        if mid.ndim != 4 or down.numel() != down.shape[0] * down.shape[1] or mid.shape[1] != len(down):
            raise wrong
        down = torch.einsum("rshw,si->rihw", mid, down.flatten(1))
    if not len(down) or up.shape[1] != len(down):
        raise wrong
    return down, up


def scale(file: LoRAFile, layer: str, tensors: Mapping[str, Tensor], rank: int, where: str) -> float:
    """Return the strength of a layer: alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA.

    Alpha is the file's tensor of this name, else that of the metadata, else the rank.
    """
    config = part_config(file.config, layer.partition(".")[0])
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise DraftuneError(f"{where} has an alpha of {tensors['alpha'].numel()} numbers, not one")
        alpha = float(tensors["alpha"])
    else:
        alpha = alpha_of(layer.partition(".")[2], config, rank)
    if not math.isfinite(alpha):
        raise DraftuneError(f"{where} has an alpha that is not finite: {alpha}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def part_config(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return peft's settings for one network: diffusers writes them as "PART.r", peft as "r"."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    return own or {key: value for key, value in config.items() if "." not in key}


def alpha_of(layer: str, config: Mapping[str, Any], rank: int) -> float:
    """Return a layer's alpha by the metadata, else its rank, so that the LoRA acts as it is."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    return float(patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha", rank)))


def dora_magnitude(where: str, tensors: Mapping[str, Tensor], down: Tensor, up: Tensor) -> tuple[Tensor, int | None]:
    """Return the magnitudes of a DoRA and the axis of the weight that they belong to; nothing for a plain LoRA.

    peft has one for each output (axis 0); LyCORIS has one for each output, [out, 1], or each input, [1, in].
    """
    if "magnitude" in tensors and "dora_scale" in tensors:
        raise DraftuneError(f"{where} has two magnitudes")
    if "magnitude" in tensors:
        magnitude, axis = tensors["magnitude"].float(), 0
    elif "dora_scale" in tensors:
        magnitude = tensors["dora_scale"].float()
        axis = 0 if magnitude.ndim < 2 or magnitude.numel() == magnitude.shape[0] == len(up) else 1
    else:
        return torch.empty(0), None
    if magnitude.numel() != (len(up) if axis == 0 else down.shape[1]):
        sizes = f"{len(up)} outputs" if axis == 0 else f"{down.shape[1]} inputs"
        raise DraftuneError(f"{where} has magnitudes of shape {list(magnitude.shape)} for {sizes}")
    return magnitude.flatten(), axis


def decomposed(where: str, weight: Tensor, delta: LoRADelta, magnitude: Tensor, axis: int | None) -> LoRADelta:
    """Return the change of a weight by DoRA (Liu et al., arXiv 2402.09353), m * V / |V| - W with V = W + up · down.

    The norms |V| are over all other axes than that of the magnitudes m.
    """
    if weight.is_meta:
        raise DraftuneError(f"{where} is a DoRA, whose change of a weight depends on the base model's weights")
    base = weight.detach().float().cpu()
    value = base + delta.change
    others = [i for i in range(value.ndim) if i != axis]
    norms = torch.linalg.vector_norm(value, dim=others, keepdim=True)
    # A row of zeros has no direction: it stays 0, whatever its magnitude.
    direction = value / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return LoRADelta.from_change(magnitude.reshape(norms.shape) * direction - base)
