"""Images of a run as data URIs: small, and each one once."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

SIZES = (384, 256, 192, 128)
PIXELS = 12_000_000
"""Pixels of all images of a page together, about 3 MB."""
LOSSLESS = 128
"""Width up to which images are stored without loss: the page enlarges them, which shows compression artifacts."""


class ImageStore:
    """Data URIs of images by digest. A file is read again only if it has changed."""

    def __init__(self) -> None:
        self.uris: dict[str, str] = {}
        self.seen: dict[tuple[Path, int, int, int], str] = {}

    def take(self, path: Path, size: int) -> str | None:
        """Add an image, at most `size` pixels wide and high, and return its digest; None if it cannot be read."""
        try:
            stat = path.stat()
            known = path, stat.st_mtime_ns, stat.st_size, size
            if known not in self.seen:
                uri = data_uri(path, size)
                self.seen[known] = digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
                self.uris[digest] = uri
            return self.seen[known]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None


def data_uri(path: Path, size: int) -> str:
    """Return an image file as a WebP data URI."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85, lossless=max(image.size) <= LOSSLESS)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def fitting(count: int) -> int:
    """Return the largest of `SIZES` in which `count` images fit on a page."""
    return next((size for size in SIZES if count * size**2 <= PIXELS), SIZES[-1])


def evenly(count: int, most: int, always: Iterable[int] = ()) -> list[int]:
    """Return at most `most` evenly spaced indices from 0 to count - 1, in increasing order.

    Args:
        count: Number of items.
        most: Number of indices, at least 2 and greater than the number of those in `always`.
        always: Indices to include, besides the first and the last.
    """
    if count <= most:
        return list(range(count))
    chosen = {i * (count - 1) // (most - 1) for i in range(most)}
    fixed = {0, count - 1}
    for index in always:
        if index not in chosen:
            chosen.remove(min(chosen - fixed, key=lambda i: abs(i - index)))
            chosen.add(index)
        fixed.add(index)
    return sorted(chosen)
