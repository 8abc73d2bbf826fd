"""Architectures of published models with random weights, or with weights that are never written and use no memory.

They follow the published configs. Each network's parameter count is checked against the published one.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from draftune.assets import EMBEDDED
from draftune.rewards import Reward
from draftune.rewards.clip import ClipEncoder
from draftune.rewards.hpsv2 import VIT_H_14, LongestEdge

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD14_UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
FLUX_VAE = VAE | {
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PUBLISHED = {
    "SD 1.4 UNet": 859_520_964,
    "SDXL UNet": 2_567_463_684,
    "CLIP-L text": 123_060_480,
    "CLIP bigG text": 694_659_840,
    "VAE": 83_653_863,
    "FLUX.1-dev transformer": 11_901_408_320,
    "FLUX.1 VAE": 83_819_683,
    "T5-XXL encoder": 4_762_310_656,
    "CLIP ViT-H/14": 986_109_441,
}
"""Number of parameters of each network."""


def architecture(name: str, make: Callable[[], nn.Module], dtype: torch.dtype, fill: bool) -> Any:
    """Build a network named in PUBLISHED. Raise ValueError if its parameter count is not the published one.

    Without `fill` the weights are never written. On most systems they then use no memory.
    """
    with torch.device("meta"):
        network = make().to(dtype)
    if (count := sum(p.numel() for p in network.parameters())) != PUBLISHED[name]:
        raise ValueError(f"{name} has {count:,} parameters, not {PUBLISHED[name]:,}")
    network = network.to_empty(device="cpu").eval()
    if hasattr(network, "tie_weights"):
        network.tie_weights()  # `to_empty` gives each name a tensor of its own
    return filled(network) if fill else network


@torch.no_grad()
def filled(network: nn.Module) -> nn.Module:
    """Initialize weights that preserve the scale of activations: N(0, 1 / fan_in), norm weights 1, biases 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, buffer in network.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"the contents of the buffer {name} are unknown")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return network


def tokenizer() -> CLIPTokenizer:
    """Return the embedded model's tokenizer, with CLIP's length of 77 tokens and a smaller vocabulary."""
    return CLIPTokenizer.from_pretrained(EMBEDDED["emoji"] / "tokenizer", model_max_length=77)


def sd14(dtype: torch.dtype, fill: bool) -> DiffusionPipeline:
    build = partial(architecture, dtype=dtype, fill=fill)
    return StableDiffusionPipeline(
        unet=build("SD 1.4 UNet", lambda: UNet2DConditionModel(**SD14_UNET)),
        vae=build("VAE", lambda: AutoencoderKL(**VAE, sample_size=512, scaling_factor=0.18215)),
        text_encoder=build("CLIP-L text", lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L))),
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(dtype: torch.dtype, fill: bool) -> DiffusionPipeline:
    build = partial(architecture, dtype=dtype, fill=fill)
    return StableDiffusionXLPipeline(
        unet=build("SDXL UNet", lambda: UNet2DConditionModel(**SDXL_UNET)),
        vae=build("VAE", lambda: AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=True)),
        text_encoder=build("CLIP-L text", lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L))),
        text_encoder_2=build("CLIP bigG text", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G))),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=DDIMScheduler(**SCHEDULER),
        add_watermarker=False,
    )


def flux(dtype: torch.dtype, fill: bool) -> DiffusionPipeline:
    build = partial(architecture, dtype=dtype, fill=fill)
    return FluxPipeline(
        transformer=build("FLUX.1-dev transformer", lambda: FluxTransformer2DModel(**FLUX)),
        vae=build("FLUX.1 VAE", lambda: AutoencoderKL(**FLUX_VAE)),
        text_encoder=build("CLIP-L text", lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L))),
        text_encoder_2=build("T5-XXL encoder", lambda: T5EncoderModel(T5Config(**T5_XXL))),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),  # only the number of tokens matters
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


HUB = {"CompVis/stable-diffusion-v1-4": "sd14", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl"}
PIPELINES: dict[str, Callable[[torch.dtype, bool], DiffusionPipeline]] = {"sd14": sd14, "sdxl": sdxl, "flux": flux}


class ViTH(Reward):
    """ViT-H/14 CLIP score in float32, the computation of `hpsv2` and `pickscore`, with random weights."""

    label = "vit-h"

    def __init__(self, fill: bool) -> None:
        super().__init__()
        clip = architecture("CLIP ViT-H/14", lambda: CLIPModel(CLIPConfig(**VIT_H_14)), torch.float32, fill)
        self.clip = ClipEncoder(clip, tokenizer(), LongestEdge(224))

    def score(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return self.clip.cosine(images, prompts)
