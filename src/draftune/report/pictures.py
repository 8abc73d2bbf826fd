"""A run's pictures as text that a page can hold: small, and each of them once."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

SIZES = (384, 256, 192, 128)
PIXELS = 12_000_000
"""Of all the pictures of a page together, which makes about 3 MB of them."""
LOSSLESS = 128
"""Pixels up to which a picture is kept exactly: it is shown larger than it is, where lost detail would be seen."""


class Pictures:
    """Data URIs by a short digest of each; a file is read again only when it has changed."""

    def __init__(self) -> None:
        self.uris: dict[str, str] = {}
        self.seen: dict[tuple[Path, int, int, int], str] = {}

    def take(self, path: Path, size: int) -> str | None:
        """The digest of the picture in a file, made at most `size` pixels wide and high; None if it can't be read."""
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
    """The picture in a file as WebP inside a URI."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=85, lossless=max(picture.size) <= LOSSLESS)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def fitting(count: int) -> int:
    """The largest size in which so many pictures fit on a page."""
    return next((size for size in SIZES if count * size**2 <= PIXELS), SIZES[-1])


def evenly(count: int, most: int, always: Iterable[int] = ()) -> list[int]:
    """At most `most` of the indices 0 to count - 1, evenly: the first and the last are there, and so is `always`.

    most: at least 2, and more than there are in `always`.
    """
    if count <= most:
        return list(range(count))
    chosen = {i * (count - 1) // (most - 1) for i in range(most)}
    kept = {0, count - 1}
    for wanted in always:
        if wanted not in chosen:
            chosen.remove(min(chosen - kept, key=lambda i: abs(i - wanted)))
            chosen.add(wanted)
        kept.add(wanted)
    return sorted(chosen)
