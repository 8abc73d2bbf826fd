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
