"""Paths that users type, and files that are written whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from draftune.errors import DraftuneError

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that the usual file systems take."""


def user_path(path: str | Path) -> Path:
    """The path with a leading ~ resolved; one that can't be is a name like any other.

    Raises DraftuneError for a text that no file can be named by.
    """
    found = Path(os.path.expanduser(path))
    sizes = [len(part.encode(errors="surrogatepass")) for part in (str(found), *found.parts)]
    if "\0" in str(found) or sizes[0] > LONGEST_PATH or max(sizes[1:], default=0) > LONGEST_NAME:
        raise DraftuneError(f"no file can have the name {str(path)!r}")
    return found


def check_writable(path: Path) -> None:
    """Raises DraftuneError where nothing can be written, before the work whose result is to be kept there."""
    existing = next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())
    if not existing.is_dir():
        raise DraftuneError(f"cannot write to {str(path)!r}: {str(existing)!r} is no folder")
    if not os.access(path if path.is_dir() else existing, os.W_OK):
        raise DraftuneError(f"cannot write to {str(path)!r}: no permission")


IMAGE_ENDINGS = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".ico", ".icns", ".svg", ".tga", ".ppm", ".pgm",
    ".pbm", ".pnm", ".qoi", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2",
})  # fmt: skip
"""Endings of image files, whether Pillow reads them or not, in lower case."""


def folder_output(text: str, flag: str) -> Path:
    """Return the folder that a flag names; its name may hold a dot.

    Raises:
        DraftuneError: for a file, for the name of an image file without a slash after it, and where nothing can be
            written.
    """
    output = user_path(text)
    if output.exists() and not output.is_dir():
        raise DraftuneError(f"{flag} takes a folder, and {text!r} is a file")
    if output.suffix.lower() in IMAGE_ENDINGS and not names_folder(text):
        raise DraftuneError(f"{flag} takes a folder, and {text!r} is the name of an image: end a folder's with a slash")
    check_writable(output)
    return output


def image_output(text: str, flag: str = "--output") -> tuple[Path, bool]:
    """Return the .png file or the folder that a flag names, and whether it is the file.

    The name of another image file is refused; anything else is a folder, and so is what ends in a slash.
    """
    output = user_path(text)
    if names_folder(text) or output.suffix.lower() not in IMAGE_ENDINGS:
        return folder_output(text, flag), False
    if output.suffix.lower() != ".png":
        raise DraftuneError(f"{flag} takes a .png file or a folder, not {text!r}: end a folder's name with a slash")
    check_writable(output)
    return output, True


def names_folder(text: str) -> bool:
    """Return whether a text names a folder: one that is there, or anything that ends in a slash."""
    return text.endswith(("/", os.sep)) or user_path(text).is_dir()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, in whose place it is put at the end: the old one or the new, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
