"""The settings of a run beside their defaults, and the command line that repeats the run."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from typing import Any

from draftune.settings import Settings


def defaults(settings: Settings) -> dict[str, Any]:
    """Return the defaults of all settings for the run's model and reward."""
    values = asdict(Settings(model=settings.model)) | {"model": Settings.model}
    template = Settings(model=settings.model, reward=settings.reward).eval_prompt_template
    return values | {"eval_prompt_template": template}


def changed(settings: Settings) -> list[str]:
    """Return the names of the settings that differ from the defaults."""
    usual = defaults(settings)
    return [name for name, value in asdict(settings).items() if value != usual[name]]


def command(settings: Settings) -> str:
    """Return the command line with these settings, quoted for a shell."""
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
    """Return name, value and default of every setting, those that differ from the default apart."""
    usual, different = defaults(settings), changed(settings)
    rows = {f.name: [f.name, written(getattr(settings, f.name)), written(usual[f.name])] for f in fields(settings)}
    return {
        "changed": [row for name, row in rows.items() if name in different],
        "usual": [row for name, row in rows.items() if name not in different],
    }


def written(value: Any) -> str:
    """Format a value as in config.yaml; None and '' as a dash."""
    if isinstance(value, bool):
        return str(value).lower()
    return "–" if value in (None, "") else str(value)
