"""Differentiable picture preprocessing: what an image processor does to a PIL image, on tensors.

PIL resizes the width, rounds to 8 bits, resizes the height and rounds again; scores that agree with the official
scorers to the last digits need the same. Rounding and clipping pass the gradient as if they were not there.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from draftune.errors import DraftuneError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers

# What transformers' image processors do where their config does not say.
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": 3},
    "ConvNext": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "resample": 2},
    "OwlViT": {"size": {"height": 768, "width": 768}, "do_center_crop": False, "crop_size": 768, "resample": 3},
    "Siglip": {"size": {"height": 224, "width": 224}, "resample": 3},
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2},
}
for name, processor in PROCESSORS.items():
    clip = name in ("CLIP", "OwlViT")
    processor |= {"image_mean": CLIP_MEAN if clip else HALF, "image_std": CLIP_STD if clip else HALF}


@dataclass(frozen=True)
class Preprocess:
    """Resizes, crops the centre square where `crop` is given, normalises.

    `size`: pixels of the shortest edge, or (height, width) whatever the aspect. Takes [B, 3, H, W] in [0, 1] of any
    height and width; gives [B, 3, crop, crop] or [B, 3, height, width]. Where an odd number of pixels is to be cropped,
    `center` says which side loses one more: "floor" as transformers does, "round" as torchvision.
    """

    size: int | tuple[int, int] = 224
    crop: int | None = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"
    center: Literal["floor", "round"] = "floor"

    @classmethod
    def from_folder(cls, folder: Path) -> Preprocess:
        """Reads `preprocessor_config.json`, or the `processor_config.json` in which transformers 5 puts the same.

        Raises DraftuneError if there is none, and for one that asks for what is not done here.
        """
        names = ("preprocessor_config.json", "processor_config.json")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise DraftuneError(f"{str(folder)!r} does not say how pictures are prepared: it has no {names[0]}")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_config(config.get("image_processor", config))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DraftuneError(f"cannot read the picture preprocessing in {str(path)!r}: {error!r}") from error

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocess:
        """What the config of one of transformers' image processors says."""
        kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP"
        kind = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind)
        if kind not in PROCESSORS:
            raise ValueError(f"{kind} is not one of {', '.join(PROCESSORS)}")
        if skipped := [key for key in ("do_resize", "do_rescale", "do_normalize") if config.get(key) is False]:
            raise ValueError(f"{skipped[0]} is false")
        config = PROCESSORS[kind] | {key: value for key, value in config.items() if value is not None}
        size = config["size"]
        # A plain number is the shortest edge to some and a square to others.
        shortest = kind in ("CLIP", "ConvNext") if isinstance(size, int) else "shortest_edge" in size
        crop = edge(config["crop_size"]) if config.get("do_center_crop") else None
        if kind == "ConvNext":
            # The crop is a share of the resized picture; from 384 pixels on there is none.
            shortest, crop, size = edge(size) < 384, edge(size), edge(size)
            size, crop = (int(size / config["crop_pct"]), crop) if shortest else (size, None)
        if crop is not None and crop > edge(size):
            raise ValueError(f"crop_size {crop} is larger than the size {edge(size)}")
        return cls(
            size=edge(size) if shortest else (edge(size), edge(size, "width")),
            crop=crop,
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            mode=MODES[config["resample"]],
        )

    def __call__(self, images: Tensor) -> Tensor:
        shape = self.size if isinstance(self.size, tuple) else shortest_edge_shape(images, self.size)
        crop = shape if self.crop is None else (self.crop, self.crop)
        return normalized(resize(images, shape, self.mode, center(shape, crop, self.center)), self.mean, self.std)


def edge(size: int | list[int] | dict[str, Any], name: str = "height") -> int:
    """The configs of different years write 224, [224, 224], {"height": 224, …} or {"shortest_edge": 224}."""
    if isinstance(size, list):
        return size[name == "width"]
    return size if isinstance(size, int) else int(size.get("shortest_edge") or size[name])


def shortest_edge_shape(images: Tensor, size: int) -> tuple[int, int]:
    height, width = images.shape[-2:]
    long = int(size * max(height, width) / min(height, width))
    return (size, long) if height <= width else (long, size)


def center(shape: tuple[int, int], crop: tuple[int, int], how: str = "floor") -> tuple[slice, slice]:
    """The rows and columns of the middle of a picture of this (height, width)."""
    starts = [(n - c) // 2 if how == "floor" else round((n - c) / 2) for n, c in zip(shape, crop, strict=True)]
    rows, columns = (slice(start, start + c) for start, c in zip(starts, crop, strict=True))
    return rows, columns


def resize(
    images: Tensor, shape: tuple[int, int], mode: str = "bicubic", window: tuple[slice, slice] | None = None
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] resized to (height, width), to the bit as PIL resizes pictures of 8 bits.

    Of the result, only the rows and columns in the window are made, where one is given.
    """
    rows, columns = window or (slice(0, shape[0]), slice(0, shape[1]))
    shrink_height, shrink_width = (now - new for now, new in zip(images.shape[-2:], shape, strict=True))
    passes = [(-1, shape[1], columns), (-2, shape[0], rows)]
    if shrink_height > max(0, 2 * shrink_width):
        # As Pillow does since version 13; the two orders differ by single levels of 255.
        passes.reverse()
    for axis, size, kept in passes:
        if images.shape[axis] == size:
            images = images.narrow(axis, kept.start, kept.stop - kept.start)
        else:
            # PIL sums whole numbers. float64 holds the sums exactly, where the device has it.
            exact = torch.float32 if images.device.type == "mps" else torch.float64
            weights = pil_weights(images.shape[axis], size, mode, kept.start, kept.stop).to(exact).to(images.device)
            lines = levels(images.to(exact)).transpose(axis, -1) @ weights.T
            images = rounded(lines.transpose(axis, -1)).to(images.dtype)
    return images


def levels(images: Tensor) -> Tensor:
    """0 to 1 as 0 to 255, and whole where it is meant to be: float32 holds k / 255 only nearly."""
    scaled = images * 255
    whole = scaled.round()
    return scaled + torch.where((scaled - whole).abs() < 1e-4, whole - scaled, 0.0).detach()


def rounded(scaled: Tensor) -> Tensor:
    """0 to 255 as the nearest of 256 levels from 0 to 1."""
    images = scaled / 255
    return images + ((scaled + 0.5).floor().clamp(0, 255) / 255 - images).detach()


@functools.lru_cache(maxsize=64)
def pil_weights(size_in: int, size_out: int, mode: str, start: int, stop: int) -> Tensor:
    """How much each of `size_in` pixels counts in the new ones from start to stop, of `size_out` in all.

    [stop - start, size_in] float64, rows that sum to about 1. As in Pillow's Resample.c: the filter is stretched where
    pixels get fewer, and its weights have 22 bits.
    """
    scale = size_in / size_out
    centers = (torch.arange(start, stop, dtype=torch.float64)[:, None] + 0.5) * scale
    pixels = torch.arange(size_in, dtype=torch.float64)[None]
    stretch = max(scale, 1.0)
    support = {"bilinear": 1.0, "bicubic": 2.0}[mode] * stretch
    first, last = (centers - support + 0.5).trunc().clamp(min=0), (centers + support + 0.5).trunc()
    x = ((pixels - centers + 0.5) * (1 / stretch)).abs()
    if mode == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:
        # Keys' cubic with a = -1/2.
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5 * (x < 2))
    weights = weights * ((pixels >= first) & (pixels < last))
    weights = weights / weights.sum(1, keepdim=True) * 2**22
    return (weights + 0.5 * weights.sign()).trunc() / 2**22


def normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    means, stds = (torch.tensor(v, dtype=images.dtype, device=images.device)[:, None, None] for v in (mean, std))
    return (images - means) / stds
