"""A run's folder: settings, metrics, evaluations, grids of samples, checkpoints, the LoRA."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.errors import DraftuneError
from draftune.paths import user_path, written_whole
from draftune.prompts import metadata
from draftune.settings import Settings, read_yaml

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
# What may change when a run goes on: how far, and what is only looked at on the way.
FREE = ("steps", "output", "sample_every", "save_every", "eval_every", "best_by", "patience")


class RunFolder:
    """The files of one run. Nothing is written before `create`.

    Raises DraftuneError where the folder can't be written to or holds anything but a run with these settings.
    """

    def __init__(self, settings: Settings, texts: Mapping[str, Sequence[str]]) -> None:
        self.path = path = user_path(settings.output)
        # What the run was asked for; what comes of it, such as normalised weights, is in its config.yaml.
        self.asked = asdict(settings)
        self.contents = {name: digest(given) for name, given in texts.items()}
        self.checkpoint: Path | None = None
        self.done = 0
        if path.exists() and not path.is_dir():
            raise DraftuneError(f"the output {str(path)!r} is a file; give a folder")
        if path.is_dir() and any(path.iterdir()):
            self.resume()
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not os.access(existing, os.W_OK):
            raise DraftuneError(f"cannot write to the output folder {str(path)!r}; give another (--output)")

    def resume(self) -> None:
        """Finds where the run in the folder stands, if it is this one."""
        from draftune.training.checkpoint import checkpoints, read_state

        found = checkpoints(self.path / "checkpoints")
        if not found:
            held = "another run" if (self.path / CONFIG).exists() else "other files"
            raise DraftuneError(f"the output folder {str(self.path)!r} holds {held}; give another (--output)")
        self.checkpoint = found[-1]
        state = read_state(self.checkpoint)
        self.done = state["step"]
        for key, value in state["settings"].items():
            if key not in FREE and value != (now := self.asked.get(key)):
                raise DraftuneError(
                    f"the output folder {str(self.path)!r} holds another run: its {key} is {value!r}, not {now!r}; "
                    "give another (--output)"
                )
        for name, content in state["contents"].items():
            if content != self.contents[name]:
                raise DraftuneError(
                    f"the output folder {str(self.path)!r} holds another run: its {name} were not these; give another "
                    "(--output)"
                )
        if self.done >= self.asked["steps"]:
            raise DraftuneError(
                f"the run in {str(self.path)!r} has made its {self.done} updates: ask for more (--steps) or give "
                "another folder (--output)"
            )

    def create(self, settings: Settings) -> None:
        """Makes the folder, or takes it back to the checkpoint, and writes the resolved settings.

        Raises DraftuneError where it can't be written to.
        """
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / CONFIG).write_text(settings.to_yaml(), encoding="utf-8")
            self.rows = {name: read_rows(self.path / name, self.done) for name in LOGS}
            for name, rows in self.rows.items():
                with written_whole(self.path / name) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            raise DraftuneError(f"cannot write to the output folder {str(self.path)!r}: {error.strerror}") from error
        self.events = SummaryWriter(str(self.path / "tensorboard"), purge_step=self.done + 1)

    def log(self, name: str, row: Mapping[str, float]) -> bool:
        """One line of metrics.jsonl or evaluations.jsonl, on disk at once, and the same numbers for TensorBoard.

        Whether it is new: a run that goes on measures its start again.
        """
        if self.rows[name] and row["step"] <= self.rows[name][-1]["step"]:
            return False
        finite: dict[str, Any] = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self.rows[name].append(finite)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        prefix = "" if name == METRICS else "eval/"
        for key, value in row.items():
            if key != "step":
                self.events.add_scalar(prefix + key, value, int(row["step"]))
        return True

    def save_checkpoint(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        from draftune.training.checkpoint import save_checkpoint

        run = {"step": step, "settings": self.asked, "contents": self.contents}
        save_checkpoint(self.path / "checkpoints", step, run | dict(state), tensors)

    def sample_path(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:06d}.png"

    def close(self) -> None:
        self.events.close()


LOGS = (METRICS, EVALUATIONS)


def digest(texts: Sequence[str]) -> str:
    """The same for the same prompts, with what they carry, in the same order."""
    known = [[str(text), metadata(text)] for text in texts]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def read_rows(path: Path, last: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a log up to an update; what a run that was cut off left of its last line does not count."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return [row for row in rows if row["step"] <= last]


def run_settings(lora: Path) -> Settings | None:
    """The settings of the run that wrote a LoRA file, where it still lies in the run's folder."""
    config = lora.parent.parent / CONFIG
    return Settings.from_mapping(read_yaml(config)) if lora.parent.name == "lora" and config.is_file() else None
