"""Check paths that users give, and write files atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from draftune.errors import DraftuneError

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Maximum length of a name and of a path in bytes, on common file systems."""


def user_path(path: str | Path) -> Path:
    """Return the path with a leading ~ expanded, if that user exists.

    Raises:
        DraftuneError: no file can have this name: it is too long or contains a null byte.
    """
    expanded = Path(os.path.expanduser(path))
    sizes = [len(part.encode(errors="surrogatepass")) for part in (str(expanded), *expanded.parts)]
    if "\0" in str(expanded) or sizes[0] > LONGEST_PATH or max(sizes[1:], default=0) > LONGEST_NAME:
        raise DraftuneError(f"no file can have the name {str(path)!r}")
    return expanded


def check_writable(path: Path) -> None:
    """Raise DraftuneError if a path cannot be written; called before long work starts."""
    ends = path.absolute()
    existing = next(folder for folder in (*ends.parents, ends) if folder.exists() or folder.is_symlink())
    if not existing.is_dir():
        raise DraftuneError(f"cannot write to {str(path)!r}: {str(existing)!r} is not a folder")
    if not os.access(path if path.is_dir() else existing, os.W_OK):
        raise DraftuneError(f"cannot write to {str(path)!r}: no permission")


IMAGE_ENDINGS = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".ico", ".icns", ".svg", ".tga", ".ppm", ".pgm",
    ".pbm", ".pnm", ".qoi", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2",
})  # fmt: skip
"""Endings of image files in lower case, whether Pillow reads them or not."""


def folder_output(text: str, flag: str) -> Path:
    """Return the folder that an option names.

    Raises:
        DraftuneError: the text names a file, ends like an image file without a slash after it, or cannot be written.
    """
    output = user_path(text)
    if output.exists() and not output.is_dir():
        raise DraftuneError(f"{flag} must be a folder, {text!r} is a file")
    if output.suffix.lower() in IMAGE_ENDINGS and not names_folder(text):
        raise DraftuneError(
            f"{flag} must be a folder, {text!r} ends like an image file; end a folder's name with a slash"
        )
    check_writable(output)
    return output


def image_output(text: str, flag: str = "--output") -> tuple[Path, bool]:
    """Return the .png file or the folder that an option names, and whether it is the file.

    Raises:
        DraftuneError: the text ends like another image file, or cannot be written.
    """
    output = user_path(text)
    if names_folder(text) or output.suffix.lower() not in IMAGE_ENDINGS:
        return folder_output(text, flag), False
    if output.suffix.lower() != ".png":
        raise DraftuneError(f"{flag} must be a .png file or a folder, not {text!r}; end a folder's name with a slash")
    check_writable(output)
    return output, True


def names_folder(text: str) -> bool:
    """Return whether a text names an existing folder or ends in a slash."""
    return text.endswith(("/", os.sep)) or user_path(text).is_dir()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and replace `path` by it after the block (atomic write)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
