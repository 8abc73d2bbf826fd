"""A FLUX.1 pipeline with wide layers, loaded with quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from test_flow import SCHNELL, tiny_clip, tiny_t5, tiny_vae
from torch import Tensor, nn
from transformers import CLIPTextModel

from draftune.models import DiffusionModel, load_model
from draftune.utils.tensors import is_quantized_weight
from helpers.pipelines import tiny_tokenizer

STEPS = 3


def save_wide(folder: Path) -> Path:
    """A FLUX.1 pipeline of two blocks with 256 channels, wide enough that rounding errors average out."""
    torch.manual_seed(0)
    tokenizer_2, text_encoder_2 = tiny_t5(folder / "t5")
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(16, 24, 24),
    )
    for name, parameter in transformer.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHNELL),
        vae=tiny_vae(),
        text_encoder=tiny_clip(CLIPTextModel, 8),
        tokenizer=tiny_tokenizer(folder / "words"),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder / "model")
    return folder / "model"


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
