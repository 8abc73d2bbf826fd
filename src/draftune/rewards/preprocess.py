"""Differentiable picture preprocessing: what an image processor does to a PIL image, on tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from draftune.clamp import clamp_unit

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Preprocess:
    """Resizes the shortest edge to `size` (antialiased, as PIL does), crops the centre square, normalises.

    Takes [B, 3, H, W] in [0, 1] of any height and width; gives [B, 3, crop, crop].
    """

    size: int = 224
    crop: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"

    @classmethod
    def from_folder(cls, folder: Path) -> Preprocess:
        """Reads `preprocessor_config.json`; without one, the processing of OpenAI's CLIP."""
        path = folder / "preprocessor_config.json"
        if not path.exists():
            return cls()
        config = json.loads(path.read_text())
        size = edge(config.get("size") or config.get("crop_size") or 224)
        return cls(
            size=size,
            crop=edge(config.get("crop_size") or size),
            mean=tuple(config.get("image_mean", CLIP_MEAN)),
            std=tuple(config.get("image_std", CLIP_STD)),
            mode=MODES.get(config.get("resample", 3), "bicubic"),
        )

    def __call__(self, images: Tensor) -> Tensor:
        images = center_crop(resize_shortest_edge(images, self.size, self.mode), self.crop)
        mean, std = (torch.tensor(v, dtype=images.dtype, device=images.device) for v in (self.mean, self.std))
        return (images - mean[:, None, None]) / std[:, None, None]


def edge(size: int | dict[str, Any]) -> int:
    """The configs of different years write 224, {"height": 224, …} or {"shortest_edge": 224}."""
    return size if isinstance(size, int) else int(size.get("shortest_edge") or size["height"])


def resize_shortest_edge(images: Tensor, size: int, mode: str) -> Tensor:
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    if short == size:
        return images
    scaled = int(size * long / short)
    shape = (size, scaled) if height <= width else (scaled, size)
    if mode == "nearest":
        return interpolate(images, shape, mode="nearest")
    # PIL clips what bicubic overshoots.
    return clamp_unit(interpolate(images, shape, mode=mode, antialias=True, align_corners=False))


def center_crop(images: Tensor, size: int) -> Tensor:
    top = (images.shape[-2] - size) // 2
    left = (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
