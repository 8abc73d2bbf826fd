"""Images: conversion between tensors and PIL, files, and grids with labels and captions."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.utils.paths import IMAGE_ENDINGS, atomic_write, user_path

NO_IMAGES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}
"""Endings in Pillow's list of documents, videos and arrays."""
CELL = 128
"""Width of an image in a grid, in pixels."""
GAP = 6
TEXT = 16


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images [B, 3, H, W] in [0, 1] to 8-bit PIL images."""
    array = images.detach().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def from_pil(image: Image.Image) -> Tensor:
    """Convert a PIL image to [1, 3, H, W] in [0, 1].

    The EXIF orientation is applied, transparent pixels become white, and 16-bit channels are divided by 65535.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # PIL's conversion to RGB clips these modes at 255.
        levels = torch.from_numpy(np.asarray(image).astype(np.float32))
        most = 65535 if image.mode.startswith("I") else 255 if levels.max() > 1 else 1
        return (levels / most).clamp(0, 1).expand(1, 3, *levels.shape).clone()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None]


@cache
def image_endings() -> frozenset[str]:
    """Return the endings of image files in lower case, whether this Pillow reads them or not."""
    Image.init()
    return IMAGE_ENDINGS | Image.registered_extensions().keys() - NO_IMAGES


def is_hidden(path: Path) -> bool:
    """Return whether a part of the path begins with a dot or is __MACOSX, which macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def find_images(sources: Sequence[str]) -> list[Path]:
    """Return image files, each once.

    Args:
        sources: Files, glob patterns, and folders. A folder stands for all files in it with the ending of an image,
            readable or not, without hidden files and folders.

    Raises:
        DraftuneError: a source matches nothing.
    """
    images: dict[Path, None] = {}
    for source in sources:
        path = user_path(source)
        if path.is_dir():
            candidates = (p for p in path.rglob("*") if p.suffix.lower() in image_endings())
            paths = sorted(p for p in candidates if not is_hidden(p.relative_to(path)) and p.is_file())
        elif path.exists():
            paths = [path]
        else:
            paths = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not paths:
            raise DraftuneError(f"no image at {source!r}: give a file, a folder or a pattern such as 'out/*.png'")
        known = {path.resolve() for path in images}
        images |= dict.fromkeys(path for path in paths if path.resolve() not in known)
    return list(images)


def open_image(path: Path) -> Tensor:
    """Read an image file as [1, 3, H, W] in [0, 1]. Raises DraftuneError if that fails."""
    try:
        with Image.open(path) as image:
            return from_pil(image)
    except Exception as error:
        # Pillow's plugins raise nearly any exception for damaged files.
        raise DraftuneError(f"cannot read the image {str(path)!r}: {error}") from error


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def save_images(images: Tensor, folder: Path) -> list[Path]:
    """Write images [N, 3, H, W] to 00.png, 01.png, … in a folder, and return the paths."""
    digits = max(2, len(str(len(images) - 1)))
    paths = [folder / f"{i:0{digits}d}.png" for i in range(len(images))]
    for path, image in zip(paths, to_pil(images), strict=True):
        save_image(image, path)
    return paths


def grid(
    rows: Sequence[Tensor],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Draw a grid of images.

    Args:
        rows: Images [N, 3, H, W] in [0, 1] of each row.
        row_labels: Text left of each row.
        column_labels: Text above each column.
        captions: Text below each image, by row.
    """
    font = ImageFont.load_default(13)
    left = GAP + (max(int(font.getlength(label)) for label in row_labels) + GAP if row_labels else 0)
    top = GAP + (TEXT if column_labels else 0)
    height = CELL + GAP + (TEXT if captions else 0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (CELL + GAP), top + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        centered(draw, label, left + column * (CELL + GAP), GAP // 2, font)
    for i, row in enumerate(rows):
        y = top + i * height
        if row_labels:
            draw.text((GAP, y + CELL // 2 - 8), row_labels[i], "black", font)
        for j, image in enumerate(to_pil(row)):
            x = left + j * (CELL + GAP)
            image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            if image.height < CELL:
                image = image.resize((CELL, CELL * image.height // image.width), Image.Resampling.BICUBIC)
            sheet.paste(image, (x, y))
            if captions:
                centered(draw, captions[i][j], x, y + CELL + 1, font)
    return sheet


def centered(
    draw: ImageDraw.ImageDraw, text: str, x: int, y: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """Draw text centered in a cell that begins at `x`; too long a text ends in an ellipsis."""
    if font.getlength(text) > CELL:
        while text and font.getlength(text + "…") > CELL:
            text = text[:-1]
        text += "…"
    draw.text((x + (CELL - font.getlength(text)) / 2, y), text, "black", font)
