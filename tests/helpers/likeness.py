"""Small random DINO and DreamSim models in the published formats, and DreamSim's embedding written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, multi_head_attention_forward
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from draftune.rewards.dreamsim import VARIANTS, VisionTransformer
from draftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from helpers.published_weights import published_tensors, randomise, squashed_pixels, to_tensor

VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
V2: dict[str, Any] = VIT | {"image_size": 42, "patch_size": 14, "mlp_ratio": 2}
V3: dict[str, Any] = VIT | {"intermediate_size": 64, "patch_size": 8, "num_register_tokens": 4}
BIT = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 64}, "resample": 3}
BIT |= {"crop_size": {"height": 56, "width": 56}, "do_center_crop": True}
BIT |= {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
FLOATS = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 64, "width": 64}, "resample": 2}
DINO: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dinov2": (Dinov2Model, Dinov2Config(**V2), BIT),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**V2, num_register_tokens=3), BIT),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**V3), FLOATS),
    "convnext": (DINOv3ConvNextModel, DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4), FLOATS),
}
SMALL = {"width": 48, "depth": 2, "heads": 4, "size": 224, "output": 32}
RANK, ALPHA = 3, 2.0


def save_dino(folder: Path, kind: str) -> Path:
    network, config, processor = DINO[kind]
    torch.manual_seed(0)
    randomise(network(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def float_pixels(image: Image.Image, size: int = 64) -> Tensor:
    """DINOv3's processor: to floats, resized without rounding, whatever the aspect ratio, then the normalization."""
    array = np.asarray(image, dtype=np.float32) / 255
    resized = [Image.fromarray(array[..., c]).resize((size, size), Image.Resampling.BILINEAR) for c in range(3)]
    return to_tensor(np.stack([np.asarray(channel) for channel in resized], -1), IMAGENET_MEAN, IMAGENET_STD)


def save_dreamsim(folder: Path, variant: str) -> dict[str, dict[str, Tensor]]:
    """Write an unzipped release with a small network; returns the tensors of each file."""
    lora, branches = VARIANTS[variant]
    (folder / lora).mkdir(parents=True)
    files, adapter = {}, {}
    for i, branch in enumerate(branches):
        layout = {name: tuple(t.shape) for name, t in VisionTransformer(branch, **SMALL).state_dict().items()}
        files[branch.file] = tensors = published_tensors(layout, seed=i)
        torch.save({"state_dict": tensors} if branch.clip else tensors, folder / branch.file)
        for j in range(SMALL["depth"]):
            layer = f"base_model.model.extractor_list.{i}.model.blocks.{j}.attn.qkv"
            adapter[f"{layer}.lora_A.weight"] = 0.3 * torch.randn(RANK, 48)
            adapter[f"{layer}.lora_B.weight"] = 0.3 * torch.randn(3 * 48, RANK)
    torch.save(adapter, folder / lora / "adapter_model.bin")
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["qkv"], "lora_dropout": 0.3, "bias": "none"}
    (folder / lora / "adapter_config.json").write_text(json.dumps(config))
    return files | {"adapter": adapter}


def dreamsim_embedding(files: dict[str, dict[str, Tensor]], variant: str, image: Image.Image) -> Tensor:
    """DreamSim's embedding [D] from the published tensors: concatenated, centered, normalized."""
    parts = []
    for i, branch in enumerate(VARIANTS[variant][1]):
        t, clip = files[branch.file], branch.clip
        eps = 1e-5 if clip else 1e-6
        pixels = squashed_pixels(image, 224, *((CLIP_MEAN, CLIP_STD) if clip else (IMAGENET_MEAN, IMAGENET_STD)))
        kernel = t["patch_embed.proj.weight"], t["patch_embed.proj.bias"]
        x = torch.conv2d(pixels, *kernel, stride=branch.patch).flatten(2).transpose(1, 2)
        x = torch.cat([t["cls_token"], x], 1) + t["pos_embed"]
        if clip:
            x = layer_norm(x, (48,), t["pos_drop.weight"], t["pos_drop.bias"], eps)
        for j in range(SMALL["depth"]):
            p = {name.removeprefix(f"blocks.{j}."): tensor for name, tensor in t.items()}
            layer = f"base_model.model.extractor_list.{i}.model.blocks.{j}.attn.qkv"
            up, down = (files["adapter"][f"{layer}.lora_{part}.weight"] for part in "BA")
            h = layer_norm(x, (48,), p["norm1.weight"], p["norm1.bias"], eps).transpose(0, 1)
            weights = p["attn.qkv.weight"] + ALPHA / RANK * up @ down, p["attn.qkv.bias"], None, None, False, 0.0
            out = p["attn.proj.weight"], p["attn.proj.bias"]
            x = x + multi_head_attention_forward(h, h, h, 48, 4, *weights, *out, False)[0].transpose(0, 1)
            h = layer_norm(x, (48,), p["norm2.weight"], p["norm2.bias"], eps)
            h = linear(h, p["mlp.fc1.weight"], p["mlp.fc1.bias"])
            h = h * (1.702 * h).sigmoid() if branch.quick else gelu(h)
            x = x + linear(h, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
        if clip:
            x = layer_norm(x, (48,), t["norm.weight"], t["norm.bias"], eps) @ t["proj"]
        parts.append(x[0, 0])
    embedding = torch.cat(parts)
    embedding = embedding - embedding.mean()
    return embedding / embedding.norm()
