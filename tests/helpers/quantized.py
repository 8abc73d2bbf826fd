"""A FLUX.1 pipeline with wide layers, loaded with quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from test_flow import SCHNELL, save_two_blocks
from torch import Tensor, nn

from draftune.models import DiffusionModel, load_model
from draftune.utils.tensors import is_quantized_weight

STEPS = 3


def save_wide(folder: Path) -> Path:
    """A FLUX.1 pipeline of two blocks with 256 channels, wide enough that rounding errors average out."""
    sizes = {"attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)}
    return save_two_blocks(folder, SCHNELL, fill, **sizes)


def fill(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)


def opened(
    folder: Path, quantization: str = "none", precision: str = "no", device: torch.device | str = "cpu"
) -> DiffusionModel:
    model = load_model(folder, precision, quantization, device).to(device, precision)
    model.set_size(16, 16)
    return model


def images(model: DiffusionModel) -> Tensor:
    return model.sample_tensors(["a cat"], [0], model.schedule(STEPS), 1.0)


def quantized_layers(model: DiffusionModel) -> dict[str, Any]:
    modules = model.denoiser.named_modules()
    return {name: layer for name, layer in modules if is_quantized_weight(getattr(layer, "weight", None))}


def dequantized(layer: Any) -> Tensor:
    """The numbers that a layer's quantized weight stands for."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # the first call moves the scales to the layer
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data * scales[:, None] / 127
    return weight.dequantize()
