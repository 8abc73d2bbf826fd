"""A small image of a run's last sample images, for the list of runs."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from draftune.report.collect import sample_images
from draftune.ui.folder import stamp_of

SIDE, MOST = 96, 3
"""Pixels of an image's longer side, and how many images stand side by side."""


def last_images(run: Path, step: int) -> list[Path]:
    """Return the paths of the first images after an update, as far as they exist. None lies outside of the run."""
    return [path for path in sample_images(run, step, MOST) if stamp_of(path) is not None]


def thumbnail(paths: list[Path]) -> bytes | None:
    """Return images side by side as WebP; None if there are none, or if one cannot be read."""
    stamps = tuple((path, stamp_of(path)) for path in paths)
    try:
        return drawn(stamps) if stamps else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


@lru_cache(maxsize=200)
def drawn(stamps: tuple[tuple[Path, tuple[int, int, int] | None], ...]) -> bytes:
    """Return the images at these paths, which have these stamps, side by side."""
    images = []
    for path, _ in stamps:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        images.append(image)
    strip = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width
    buffer = io.BytesIO()
    strip.save(buffer, format="WEBP", quality=80)
    return buffer.getvalue()
