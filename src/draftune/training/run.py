"""A run's folder: settings, metrics, grids of samples, the LoRA."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from draftune.errors import DraftuneError
from draftune.paths import user_path
from draftune.settings import Settings, read_yaml

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"


class RunFolder:
    """The files of one run. Nothing is written before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        if self.path.exists() and not self.path.is_dir():
            raise DraftuneError(f"the output {str(self.path)!r} is a file; give a folder")
        if self.path.is_dir() and any(self.path.iterdir()):
            held = "another run" if (self.path / CONFIG).exists() else "other files"
            raise DraftuneError(f"the output folder {str(self.path)!r} holds {held}; give another (--output)")

        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(existing, os.W_OK):
            raise DraftuneError(f"cannot write to the output folder {str(self.path)!r}; give another (--output)")

    def create(self, settings: Settings) -> None:
        """Makes the folder and writes the resolved settings. Raises DraftuneError where it can't be written to."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / CONFIG).write_text(settings.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise DraftuneError(f"cannot write to the output folder {str(self.path)!r}: {error.strerror}") from error
        self.metrics = (self.path / METRICS).open("a", encoding="utf-8")
        self.events = SummaryWriter(str(self.path / "tensorboard"))

    def log(self, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, on disk at once, and the same numbers for TensorBoard."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self.metrics.write(json.dumps(finite) + "\n")
        self.metrics.flush()
        for key, value in metrics.items():
            if key != "step":
                self.events.add_scalar(key, value, int(metrics["step"]))

    def sample_path(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:06d}.png"

    def close(self) -> None:
        self.metrics.close()
        self.events.close()


def run_settings(lora: Path) -> Settings | None:
    """The settings of the run that wrote a LoRA file, where it still lies in the run's folder."""
    config = lora.parent.parent / CONFIG
    return Settings.from_mapping(read_yaml(config)) if lora.parent.name == "lora" and config.is_file() else None
