"""Read the configs of a saved pipeline's components. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.utils.hub import cached_folder
from draftune.utils.paths import user_path

ConfigOf = Callable[[str], Mapping[str, Any]]
"""A function from a component's name to its config with its `_class_name`; empty if it cannot be read."""
PIPELINE = "pipeline"
"""The name that stands for the pipeline itself in ConfigOf."""


def model_folder(model: str, revision: str | None = None) -> Path | None:
    """Return the folder of a saved pipeline, by path or hub id; None if it is not on this machine."""
    try:
        folder = user_path(model)
        if (folder / "model_index.json").is_file():
            return folder
    except (DraftuneError, OSError, ValueError):
        return None
    return cached_folder(model, "model_index.json", revision=revision)


def config_reader(folder: Path) -> ConfigOf:
    """Return a reader of the configs of the components in a saved pipeline's folder."""

    def config_of(part: str) -> Mapping[str, Any]:
        files = {"scheduler": "scheduler/scheduler_config.json", PIPELINE: "model_index.json"}
        return read_config(folder / files.get(part, f"{part}/config.json"))

    return config_of


def read_config(path: Path) -> Mapping[str, Any]:
    """Return a JSON object, empty if it cannot be read; loading the model reports what is wrong with it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
