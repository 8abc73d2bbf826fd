"""Differentiable image preprocessing of vision-language models, equal to that of transformers' processors with PIL."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, HALF, normalized, resize

MODES = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
LARGEST = 4096
"""The longest side in pixels of an image in SmolVLM's processor."""


def processor_config(folder: Path) -> dict[str, Any]:
    """Return the image processor's config in a folder. Raises DraftuneError if there is none."""
    config: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                config |= found.get("image_processor", found)
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise DraftuneError(f"cannot read {str(folder / name)!r}: {error!r}") from error
    if not config.keys() - {"processor_class", "image_seq_len", "chat_template"}:
        raise DraftuneError(f"{str(folder)!r} has no image preprocessing config: it has no preprocessor_config.json")
    return config


@dataclass(frozen=True)
class QwenImages:
    """The image processor of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: resizes an image and cuts it into patches.

    Attributes:
        patch: Side of a patch in pixels.
        merge: Patches along each side of the square that becomes one token.
        frames: Equal frames that an image stands for, the temporal patch size.
        min_pixels: Lower bound of height times width after resizing.
        max_pixels: Upper bound of height times width after resizing.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        mode: Filter of the resizing.
    """

    patch: int = 14
    merge: int = 2
    frames: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QwenImages:
        """Convert the config of transformers' processor; `min_pixels` and `max_pixels` go before `size`."""
        size = config.get("size") or {}
        return cls(
            patch=config.get("patch_size", cls.patch),
            merge=config.get("merge_size", cls.merge),
            frames=config.get("temporal_patch_size", cls.frames),
            min_pixels=config.get("min_pixels") or size.get("shortest_edge", cls.min_pixels),
            max_pixels=config.get("max_pixels") or size.get("longest_edge", cls.max_pixels),
            mean=tuple(config.get("image_mean") or cls.mean),
            std=tuple(config.get("image_std") or cls.std),
            mode=MODES[config.get("resample", 3)],
        )

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to resize an image to: multiples of a token's side, within the bounds."""
        if max(height, width) / min(height, width) > 200:
            raise DraftuneError(
                f"a Qwen-VL model reads no image of {height}x{width}: one side is over 200 times longer"
            )
        side = self.patch * self.merge
        sides = [round(n / side) * side for n in (height, width)]
        if math.prod(sides) > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            sides = [max(side, math.floor(n / scale / side) * side) for n in (height, width)]
        elif math.prod(sides) < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            sides = [math.ceil(n * scale / side) * side for n in (height, width)]
        return sides[0], sides[1]

    def __call__(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Cut an image [1, 3, H, W] in [0, 1] into patches.

        Returns:
            Patches [rows * columns, 3 * frames * patch * patch], ordered so that those of one token are together, and
            the numbers of rows and columns.
        """
        height, width = self.shape(*image.shape[-2:])
        pixels = normalized(resize(image, (height, width), self.mode), self.mean, self.std)[0]
        m, p = self.merge, self.patch
        tokens = pixels.reshape(3, height // (m * p), m, p, width // (m * p), m, p)
        patches = tokens.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        patches = patches.expand(*patches.shape[:5], self.frames, p, p)
        return patches.reshape(-1, 3 * self.frames * p * p), (height // p, width // p)


@dataclass(frozen=True)
class SmolImages:
    """The image processor of SmolVLM and Idefics3: cuts a resized image into squares and adds the whole as one more.

    Attributes:
        longest: Pixels of the longest side that an image is resized to first.
        side: Side in pixels of the squares.
        split: Whether the image is cut; otherwise only the whole image is used.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        mode: Filter of the resizing.
    """

    longest: int = 4 * 364
    side: int = 364
    split: bool = True
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    mode: str = "lanczos"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SmolImages:
        """Convert the config of transformers' processor."""
        return cls(
            longest=(config.get("size") or {}).get("longest_edge", cls.longest),
            side=(config.get("max_image_size") or {}).get("longest_edge", cls.side),
            split=config.get("do_image_splitting", cls.split),
            mean=tuple(config.get("image_mean") or cls.mean),
            std=tuple(config.get("image_std") or cls.std),
            mode=MODES[config.get("resample", 1)],
        )

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) with the longest side `longest`, the other side even, neither above 4096."""
        ratio = width / height
        if width >= height:
            height, width = int(self.longest / ratio), self.longest
            height += height % 2
        else:
            height, width = self.longest, int(self.longest * ratio)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        ratio = width / height
        if width >= height and width > LARGEST:
            height, width = int(LARGEST / ratio), LARGEST
        elif height > width and height > LARGEST:
            height, width = LARGEST, int(LARGEST * ratio)
        return max(height, 1), max(width, 1)

    def __call__(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Resize an image [1, 3, H, W] in [0, 1] and cut it.

        Returns:
            The squares row by row and then the whole image, [N, 3, side, side], and the numbers of rows and columns;
            (0, 0) if there is only the whole image.
        """
        image = resize(image, self.shape(*image.shape[-2:]), self.mode)
        side = self.side
        if not self.split:
            return normalized(resize(image, (side, side), self.mode), self.mean, self.std), (0, 0)
        height, width = image.shape[-2:]
        ratio = width / height
        if width >= height:
            width = math.ceil(width / side) * side
            height = math.ceil(int(width / ratio) / side) * side
        else:
            height = math.ceil(height / side) * side
            width = math.ceil(int(height * ratio) / side) * side
        image = resize(image, (height, width), self.mode)
        rows, columns = height // side, width // side
        if rows * columns == 1:
            return normalized(image, self.mean, self.std), (0, 0)
        squares = image[0].reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
        squares = torch.cat([squares, resize(image, (side, side), self.mode)])
        return normalized(squares, self.mean, self.std), (rows, columns)


def read_images(folder: Path, family: str, max_side: int = 0) -> QwenImages | SmolImages:
    """Read the preprocessing of a saved model.

    Args:
        folder: Its folder.
        family: "qwen" or "smol".
        max_side: Pixels; an image has at most max_side x max_side, or with SmolVLM this longest side. 0 keeps the
            model's own.

    Raises:
        DraftuneError: There is no such config, or it is not supported.
    """
    config = processor_config(folder)
    if skipped := [key for key in ("do_resize", "do_rescale", "do_normalize") if config.get(key) is False]:
        raise DraftuneError(f"the image preprocessing in {str(folder)!r} is not supported: {skipped[0]} is false")
    try:
        if family == "qwen":
            bound = {"max_pixels": max_side**2, "min_pixels": 1} if max_side else {}
            return QwenImages.from_config(config | bound)
        return SmolImages.from_config(config | ({"size": {"longest_edge": max_side}} if max_side else {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise DraftuneError(f"cannot read the image preprocessing in {str(folder)!r}: {error!r}") from error
