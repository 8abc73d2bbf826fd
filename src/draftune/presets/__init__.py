"""Settings that fit published models on devices of a given size, one YAML file each. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from draftune.errors import unknown
from draftune.utils.paths import user_path

PRESETS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def config_path(given: str) -> Path:
    """The settings file that was given, or the preset of that name where there is no such file.

    Raises DraftuneError for what is neither and looks like a name; a path that leads nowhere is left to the reader.
    """
    path = user_path(given)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    if given not in PRESETS:
        raise unknown("preset or file", given, PRESETS)
    return PRESETS[given]


def said(preset: Path) -> str:
    """The first line of a preset's comment."""
    return preset.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
