"""Convert a LoRA file of any tool to the weight change of each layer of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.lora.deltas import LoRADelta, LoRADeltas
from draftune.lora.files import LoRAFile, read_file
from draftune.lora.metadata import SAMPLER_METADATA, steps_of
from draftune.lora.names import TEXT_ENCODER, NameTable, is_text, layer_weight
from draftune.lora.original_names import Target

if TYPE_CHECKING:
    from draftune.lora.targets import LoRATarget

SKIP = "--skip-text-encoder-lora"


def read_lora(
    source: Path | str, networks: Mapping[str, nn.Module], model_name: str, skip_text_encoder: bool = False
) -> LoRADeltas:
    """Read a LoRA file and convert it to weight changes of these networks; see `fit`."""
    return fit(read_file(source), networks, model_name, skip_text_encoder)


def read_for(model: LoRATarget, source: Path | str, skip_text_encoder: bool) -> LoRADeltas:
    """Read a LoRA file for a model, whose text encoders are loaded if the LoRA adapts them or may depend on them."""
    file = read_file(source)
    if file.is_dora and not skip_text_encoder:
        model.load_text_encoders()
    deltas = fit(file, model.lora_networks, model.name, skip_text_encoder)
    if deltas.parts != [model.lora_prefix]:
        model.load_text_encoders()
    return deltas


def fit(
    file: LoRAFile, networks: Mapping[str, nn.Module], model_name: str, skip_text_encoder: bool = False
) -> LoRADeltas:
    """Convert a LoRA file to the weight changes of the layers of these networks.

    Every tensor of the file must belong to a layer. Supported are the formats of diffusers, peft, kohya's sd-scripts,
    ai-toolkit, SimpleTuner, OneTrainer and XLabs, with LoRA, LoCon (including its middle matrix) and DoRA.

    Args:
        file: The contents of the file.
        networks: The denoiser and the text encoders by PART, as in `DiffusionModel.lora_networks`. Their weights may be
            on the device "meta", except for DoRA, whose weight change depends on the weight.
        model_name: The model's name, for messages and as the base model of the result.
        skip_text_encoder: Whether to skip the layers of text encoders.

    Returns:
        The weight changes at scale 1.

    Raises:
        DraftuneError: The file does not fit these networks.
    """
    layers = file.layers
    if skip_text_encoder:
        layers = {name: tensors for name, tensors in layers.items() if not is_text(name)}
    table = NameTable(networks)
    deltas: dict[str, LoRADelta] = {}
    unknown = []
    for name, tensors in layers.items():
        target = table.find(name)
        if target is None:
            unknown.append(name)
            continue
        for layer, delta in changes(file, name, tensors, target, table).items():
            if layer in deltas:
                raise DraftuneError(f"{str(file.path)!r} changes {layer} twice, once as {name}")
            deltas[layer] = delta
    if unknown:
        raise no_place(file, unknown, len(layers), model_name)
    if all(name.startswith(TEXT_ENCODER) for name in deltas):
        raise DraftuneError(f"{str(file.path)!r} holds no LoRA for the denoiser of {model_name!r}")
    lora_steps = steps_of(file.path, file.metadata)
    return LoRADeltas(deltas, model_name, file.metadata.get(SAMPLER_METADATA, ""), lora_steps)


def no_place(file: LoRAFile, unknown: list[str], count: int, model_name: str) -> DraftuneError:
    """Return the error for layers of a file that the model does not have."""
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
    """Convert the tensors of one name in a file to the weight changes of its target's layers."""
    where = f"{name} in {str(file.path)!r}"
    down, up = matrices(where, tensors)
    weights = [layer_weight(table.layers[layer]) for layer in target.layers]
    rows = [len(weight) for weight in weights]
    if len(up) != sum(rows):
        raise misfit(where, down, up, target, weights)
    factor = scale(file, target.layers[0], tensors, len(down), where)
    magnitude, axis = dora_magnitude(where, tensors, down, up)
    if target.halves_swapped:
        up = torch.cat(up.chunk(2)[::-1])
        magnitude = torch.cat(magnitude.chunk(2)[::-1]) if axis == 0 else magnitude
    magnitudes = magnitude.split(rows) if axis == 0 else [magnitude] * len(rows)
    if axis == 1 and len(rows) > 1:
        raise DraftuneError(f"{where} is a DoRA with one magnitude per input of a fused layer: not supported")
    result = {}
    for layer, weight, part, size in zip(target.layers, weights, up.split(rows), magnitudes, strict=True):
        if not fits(down, weight):
            raise misfit(where, down, up, target, weights)
        # `up` becomes [out, rank, 1, ...] with as many dimensions as the weight.
        up_shape = len(part), len(down), *[1] * (weight.ndim - 2)
        delta = LoRADelta(down.reshape(len(down), *weight.shape[1:]), part.reshape(up_shape)).scaled(factor)
        if size is not None and size.numel():
            delta = decomposed(where, weight, delta, size, axis)
        result[layer] = delta
    return result


def fits(down: Tensor, weight: Tensor) -> bool:
    """Return whether A `[rank, in, ...]` fits a weight `[out, in, ...]`; trailing sizes of 1 are ignored."""
    shapes = [[*t.shape[1:]] for t in (down, weight)]
    for shape in shapes:
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
    return shapes[0] == shapes[1]


def misfit(where: str, down: Tensor, up: Tensor, target: Target, weights: list[Tensor]) -> DraftuneError:
    """Return the error for LoRA factors whose shapes do not fit the layers' weights."""
    shapes = ", ".join(f"{layer} {list(weight.shape)}" for layer, weight in zip(target.layers, weights, strict=True))
    return DraftuneError(f"{where} has shapes {list(down.shape)} and {list(up.shape)}, which do not fit {shapes}")


def matrices(where: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the factors down `[rank, in, ...]` and up `[out, rank]` in float32.

    LoCon's middle matrix is multiplied into `down`: dW = up @ (mid @ down) (its Tucker decomposition).
    """
    for half in ("down", "up"):
        if half not in tensors:
            raise DraftuneError(f"{where} lacks one of its two LoRA factors: {half}")
    for kind, tensor in tensors.items():
        if not tensor.is_floating_point() and kind != "alpha":
            raise DraftuneError(f"{where}: {kind} is {tensor.dtype}, and must be floating-point")
        if not tensor.float().isfinite().all():
            raise DraftuneError(f"{where}: {kind} is not finite")
    down, up = tensors["down"].float(), tensors["up"].float()
    wrong = DraftuneError(f"{where} is not a plain LoRA: its shapes are {list(down.shape)} and {list(up.shape)}")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.numel() != up.shape[0] * up.shape[1]:
        raise wrong
    up = up.flatten(1)
    if "mid" in tensors:
        mid = tensors["mid"].float()
        if mid.ndim != 4 or down.numel() != down.shape[0] * down.shape[1] or mid.shape[1] != len(down):
            raise wrong
        down = torch.einsum("rshw,si->rihw", mid, down.flatten(1))
    if not len(down) or up.shape[1] != len(down):
        raise wrong
    return down, up


def scale(file: LoRAFile, layer: str, tensors: Mapping[str, Tensor], rank: int, where: str) -> float:
    """Return a layer's scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (arXiv:2312.03732).

    alpha is the layer's tensor "alpha" if there is one, or that of the config, or the rank.
    """
    config = part_config(file.config, layer.partition(".")[0])
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise DraftuneError(f"{where}: alpha has {tensors['alpha'].numel()} values, not one")
        alpha = float(tensors["alpha"])
    else:
        alpha = alpha_of(layer.partition(".")[2], config, rank)
    if not math.isfinite(alpha):
        raise DraftuneError(f"{where}: alpha must be finite, not {alpha}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def part_config(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the peft config of one network: its keys are "PART.r" in files of diffusers, "r" in peft's."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    return own or {key: value for key, value in config.items() if "." not in key}


def alpha_of(layer: str, config: Mapping[str, Any], rank: int) -> float:
    """Return a layer's alpha from the config, or its rank, which gives a scale of 1."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    return float(patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha", rank)))


def dora_magnitude(where: str, tensors: Mapping[str, Tensor], down: Tensor, up: Tensor) -> tuple[Tensor, int | None]:
    """Return the magnitudes of a DoRA and their axis in the weight; an empty tensor and None for a plain LoRA.

    peft has one magnitude per output (axis 0). LyCORIS has one per output, `[out, 1]`, or per input, `[1, in]`.
    """
    if "magnitude" in tensors and "dora_scale" in tensors:
        raise DraftuneError(f"{where} has both 'magnitude' and 'dora_scale', and only one is allowed")
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
    """Return the weight change of DoRA (Liu et al., 2024, arXiv:2402.09353, Eq. 5).

    dW = m * V / ||V|| - W,  V = W + up @ down

    The norm is taken over all axes except the axis of the magnitudes m.
    """
    if weight.is_meta:
        raise DraftuneError(f"{where} is a DoRA, whose weight change needs the unquantized weights of the base model")
    base = weight.detach().float().cpu()
    value = base + delta.change
    others = [i for i in range(value.ndim) if i != axis]
    norms = torch.linalg.vector_norm(value, dim=others, keepdim=True)
    # A row of zeros has no direction, and stays 0.
    direction = value / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return LoRADelta.from_change(magnitude.reshape(norms.shape) * direction - base)
