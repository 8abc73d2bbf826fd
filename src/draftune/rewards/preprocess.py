"""Differentiable image preprocessing: the operations of an image processor on a PIL image, for tensors.

PIL resizes the width, rounds to 8 bits, resizes the height and rounds again. This module does the same, so that scores
agree with those of the official scorers. Rounding and clipping have the gradient of the identity (straight-through
estimator).
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
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.functional import interpolate

from draftune.errors import DraftuneError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers

# Defaults of transformers' image processors.
PROCESSORS: dict[str, dict[str, Any]] = {
    "Bit": {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": 3},
    "CLIP": {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": 3},
    "ConvNext": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "resample": 2},
    "DINOv3ViT": {"size": {"height": 224, "width": 224}, "resample": 2},
    "OwlViT": {"size": {"height": 768, "width": 768}, "do_center_crop": False, "crop_size": 768, "resample": 3},
    "Siglip": {"size": {"height": 224, "width": 224}, "resample": 3},
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2},
}
for name, processor in PROCESSORS.items():
    mean, std = (CLIP_MEAN, CLIP_STD) if name in ("Bit", "CLIP", "OwlViT") else (HALF, HALF)
    if name == "DINOv3ViT":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    processor |= {"image_mean": mean, "image_std": std}


@dataclass(frozen=True)
class Preprocess:
    """Resizes images [B, 3, H, W] in [0, 1], crops the center square if `crop` is set, and normalizes.

    Attributes:
        size: Pixels of the shortest edge, or (height, width) whatever the aspect ratio.
        crop: Side of the center square in pixels, or None. The result is [B, 3, crop, crop] or [B, 3, height, width].
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        mode: "bilinear" or "bicubic".
        center: How the crop's start is rounded: "floor" as in transformers, "round" as in torchvision.
        rounding: Whether resized values are rounded to 8 bits, as PIL's are. The processor of DINOv3 resizes floats.
    """

    size: int | tuple[int, int] = 224
    crop: int | None = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"
    center: Literal["floor", "round"] = "floor"
    rounding: bool = True

    @classmethod
    def from_folder(cls, folder: Path) -> Preprocess:
        """Read `preprocessor_config.json`, or the `processor_config.json` of transformers 5.

        Raises:
            DraftuneError: if there is neither, and for a config that is not supported.
        """
        names = ("preprocessor_config.json", "processor_config.json")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise DraftuneError(f"{str(folder)!r} has no image preprocessing config: it has no {names[0]}")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_config(config.get("image_processor", config))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DraftuneError(f"cannot read the image preprocessing in {str(path)!r}: {error!r}") from error

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocess:
        """Convert the config of one of transformers' image processors. Raises ValueError for one not supported."""
        kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP"
        kind = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind)
        if kind not in PROCESSORS:
            raise ValueError(f"{kind} is not one of {', '.join(PROCESSORS)}")
        if skipped := [key for key in ("do_resize", "do_rescale", "do_normalize") if config.get(key) is False]:
            raise ValueError(f"{skipped[0]} is false")
        config = PROCESSORS[kind] | {key: value for key, value in config.items() if value is not None}
        size = config["size"]
        # A plain number is the shortest edge for some processors and a square for others.
        shortest = kind in ("Bit", "CLIP", "ConvNext") if isinstance(size, int) else "shortest_edge" in size
        crop = edge(config["crop_size"]) if config.get("do_center_crop") else None
        if kind == "ConvNext":
            # Images are resized to size / crop_pct and cropped to size; from 384 pixels on they are not cropped.
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
            rounding=kind != "DINOv3ViT",
        )

    def __call__(self, images: Tensor) -> Tensor:
        shape = self.size if isinstance(self.size, tuple) else shortest_edge_shape(images, self.size)
        crop = shape if self.crop is None else (self.crop, self.crop)
        window = center(shape, crop, self.center)
        if self.rounding:
            images = resize(images, shape, self.mode, window)
        else:
            if shape != images.shape[-2:]:
                images = interpolate(images, shape, mode=self.mode, antialias=True, align_corners=False)
            images = images[..., window[0], window[1]]
        return normalized(images, self.mean, self.std)


def edge(size: int | list[int] | dict[str, Any], name: str = "height") -> int:
    """Return a side in pixels from 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(size, list):
        return size[name == "width"]
    return size if isinstance(size, int) else int(size.get("shortest_edge") or size[name])


def shortest_edge_shape(images: Tensor, size: int) -> tuple[int, int]:
    """Return the (height, width) whose shortest edge is `size`, with the images' aspect ratio."""
    height, width = images.shape[-2:]
    long = int(size * max(height, width) / min(height, width))
    return (size, long) if height <= width else (long, size)


def center(shape: tuple[int, int], crop: tuple[int, int], how: str = "floor") -> tuple[slice, slice]:
    """Return the rows and columns of a center crop of an image of this (height, width)."""
    starts = [(n - c) // 2 if how == "floor" else round((n - c) / 2) for n, c in zip(shape, crop, strict=True)]
    rows, columns = (slice(start, start + c) for start, c in zip(starts, crop, strict=True))
    return rows, columns


def resize(
    images: Tensor, shape: tuple[int, int], mode: str = "bicubic", window: tuple[slice, slice] | None = None
) -> Tensor:
    """Resize images [B, 3, H, W] in [0, 1] to (height, width), bit for bit as PIL resizes 8-bit images.

    Args:
        images: The images.
        shape: Height and width of the result.
        mode: "bilinear", "bicubic" or "lanczos".
        window: Rows and columns of the result to compute and return; all by default.
    """
    rows, columns = window or (slice(0, shape[0]), slice(0, shape[1]))
    shrink_height, shrink_width = (now - new for now, new in zip(images.shape[-2:], shape, strict=True))
    passes = [(-1, shape[1], columns), (-2, shape[0], rows)]
    if shrink_height > max(0, 2 * shrink_width):
        # As in Pillow since version 13; the two orders differ by single levels of 255.
        passes.reverse()
    for axis, size, part in passes:
        if images.shape[axis] == size:
            images = images.narrow(axis, part.start, part.stop - part.start)
        else:
            # PIL sums integers; float64 represents these sums exactly. MPS has no float64.
            exact = torch.float32 if images.device.type == "mps" else torch.float64
            weights = pil_weights(images.shape[axis], size, mode, part.start, part.stop).to(exact).to(images.device)
            lines = levels(images.to(exact)).transpose(axis, -1) @ weights.T
            images = rounded(lines.transpose(axis, -1)).to(images.dtype)
    return images


def levels(images: Tensor) -> Tensor:
    """Scale [0, 1] to [0, 255], and round what is within 1e-4 of an integer: k / 255 is inexact in float32."""
    scaled = images * 255
    whole = scaled.round()
    return scaled + torch.where((scaled - whole).abs() < 1e-4, whole - scaled, 0.0).detach()


def rounded(scaled: Tensor) -> Tensor:
    """Round [0, 255] to integers and scale to [0, 1]; straight-through gradient."""
    images = scaled / 255
    return images + ((scaled + 0.5).floor().clamp(0, 255) / 255 - images).detach()


@functools.lru_cache(maxsize=64)
@unset_fake_temporarily()  # a fake tensor must not stay in the cache
def pil_weights(size_in: int, size_out: int, mode: str, start: int, stop: int) -> Tensor:
    """Return the resampling weights of new pixels `start` to `stop` of `size_out`, from `size_in` pixels.

    As in Pillow's Resample.c, the filter is stretched for downsampling and its weights have 22 bits.

    Returns:
        Weights [stop - start, size_in] in float64, whose rows sum to about 1.
    """
    scale = size_in / size_out
    centers = (torch.arange(start, stop, dtype=torch.float64)[:, None] + 0.5) * scale
    pixels = torch.arange(size_in, dtype=torch.float64)[None]
    stretch = max(scale, 1.0)
    support = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}[mode] * stretch
    first, last = (centers - support + 0.5).trunc().clamp(min=0), (centers + support + 0.5).trunc()
    x = ((pixels - centers + 0.5) * (1 / stretch)).abs()
    if mode == "bilinear":
        weights = (1 - x).clamp(min=0)
    elif mode == "lanczos":
        weights = torch.sinc(x) * torch.sinc(x / 3) * (x < 3)
    else:
        # Keys' cubic with a = -1/2.
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5 * (x < 2))
    weights = weights * ((pixels >= first) & (pixels < last))
    weights = weights / weights.sum(1, keepdim=True) * 2**22
    return (weights + 0.5 * weights.sign()).trunc() / 2**22


def normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract each channel's mean from images [B, 3, H, W] and divide by its standard deviation."""
    means, stds = (torch.tensor(v, dtype=images.dtype, device=images.device)[:, None, None] for v in (mean, std))
    return (images - means) / stds
