"""What a run was asked: its settings beside the defaults, and the command that asks the same again."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from typing import Any

from draftune.settings import Settings


def defaults(settings: Settings) -> dict[str, Any]:
    """What every setting would be had only the model been named, and what depends on it, the method."""
    usual = asdict(Settings(model=settings.model)) | {"model": Settings.model}
    return usual | {"prefix_reuse": Settings(model=settings.model, method=settings.method).prefix_reuse}


def changed(settings: Settings) -> list[str]:
    """The names of the settings that differ from the defaults."""
    usual = defaults(settings)
    return [name for name, value in asdict(settings).items() if value != usual[name]]


def command(settings: Settings) -> str:
    """The command line of these settings, quoted for a shell."""
    words = ["draftune", "train"]
    for name in changed(settings):
        flag, value = name.replace("_", "-"), getattr(settings, name)
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif str(value).startswith("-"):
            words.append(f"--{flag}={value}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def table(settings: Settings) -> dict[str, list[list[str]]]:
    """Name, value and default of every setting: those that were changed, then the others."""
    usual, different = defaults(settings), changed(settings)
    rows = {f.name: [f.name, written(getattr(settings, f.name)), written(usual[f.name])] for f in fields(settings)}
    return {
        "changed": [row for name, row in rows.items() if name in different],
        "usual": [row for name, row in rows.items() if name not in different],
    }


def written(value: Any) -> str:
    """A setting as config.yaml has it; one that is unset or empty is a dash."""
    if isinstance(value, bool):
        return str(value).lower()
    return "–" if value in (None, "") else str(value)
