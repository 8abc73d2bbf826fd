"""Changes of published configs: text encoders with one layer, and tiny networks. See `architectures.CHANGES`."""

from __future__ import annotations

from typing import Any

from draftune.rewards.hpsv2 import VIT_H_14

SHALLOW: dict[str, dict[str, Any]] = {
    "T5-XXL encoder": {"num_layers": 1},
    "Qwen3-4B without head": {"num_hidden_layers": 1},
}
"""Text encoders with one layer, for updates, before which they are freed: their embeddings have the published shape."""
TINY_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
TINY_VAE: dict[str, Any] = {"sample_size": 64, "block_out_channels": (32,) * 4, "layers_per_block": 1}
TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 2,
}
TINY: dict[str, dict[str, Any]] = {
    "SD 1.4 UNet": TINY_UNET
    | {
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "SDXL UNet": TINY_UNET
    | {
        "cross_attention_dim": 64,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 1,
        "projection_class_embeddings_input_dim": 6 * 256 + 32,
    },
    "FLUX.1-dev transformer": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "Z-Image transformer": {
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": (4, 6, 6),
    },
    **dict.fromkeys(("SD 1.4 VAE", "SDXL VAE", "FLUX.1 VAE"), TINY_VAE),
    **dict.fromkeys(("CLIP-L text", "CLIP bigG text"), TINY_CLIP),
    "T5-XXL encoder": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "Qwen3-4B without head": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "CLIP ViT-H/14": {
        "projection_dim": 32,
        "text_config": VIT_H_14["text_config"] | TINY_CLIP,
        "vision_config": VIT_H_14["vision_config"] | TINY_CLIP,
    },
}
"""Small sizes of the networks that `gpu.py` measures, to rehearse it on a CPU."""
