"""Paths that users type."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """The path with a leading ~ resolved; one that can't be is a name like any other."""
    return Path(os.path.expanduser(path))
