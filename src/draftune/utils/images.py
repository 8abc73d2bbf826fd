"""Pictures in and out: tensors, PIL, grids with captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.utils.paths import IMAGE_ENDINGS, written_whole

NO_IMAGES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}
"""Endings that Pillow knows of documents, films and tables of numbers."""
CELL = 128  # pixels of a picture in a grid
GAP = 6
TEXT = 16


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [0, 1] to B pictures of 8 bits."""
    array = images.detach().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def from_pil(image: Image.Image) -> Tensor:
    """A picture to [1, 3, H, W] in [0, 1], upright; transparency becomes white, 16 bits a channel keep their scale."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # PIL's own conversion to RGB clips these at 255.
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
    """Return the endings of image files, in lower case: those that Pillow reads here, and those that it does not."""
    Image.init()
    return IMAGE_ENDINGS | Image.registered_extensions().keys() - NO_IMAGES


def is_hidden(path: Path) -> bool:
    """Return whether a path in a folder is hidden: a part of it begins with a dot, or is macOS's folder in archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def open_image(path: Path) -> Tensor:
    """The picture in a file, [1, 3, H, W]. Raises DraftuneError if there is none."""
    try:
        with Image.open(path) as image:
            return from_pil(image)
    except Exception as error:
        # Of a damaged file, a plugin may raise nearly anything.
        raise DraftuneError(f"cannot read the picture {str(path)!r}: {error}") from error


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG whole or not at all."""
    with written_whole(path) as temporary:
        image.save(temporary, format="PNG")


def grid(
    rows: Sequence[Tensor],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """A grid of pictures: each row is [N, 3, H, W] in [0, 1], with a caption under each picture where given."""
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
        for j, picture in enumerate(to_pil(row)):
            x = left + j * (CELL + GAP)
            picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            if picture.height < CELL:
                picture = picture.resize((CELL, CELL * picture.height // picture.width), Image.Resampling.BICUBIC)
            sheet.paste(picture, (x, y))
            if captions:
                centered(draw, captions[i][j], x, y + CELL + 1, font)
    return sheet


def centered(
    draw: ImageDraw.ImageDraw, text: str, x: int, y: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """The text in the middle of a cell, cut where it is too long."""
    if font.getlength(text) > CELL:
        while text and font.getlength(text + "…") > CELL:
            text = text[:-1]
        text += "…"
    draw.text((x + (CELL - font.getlength(text)) / 2, y), text, "black", font)
