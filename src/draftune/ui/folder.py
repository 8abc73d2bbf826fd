"""The folder of runs that the page shows, and the files that it keeps beside them."""

from __future__ import annotations

import json
import os
import re
from itertools import count
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.report.summary import best_step
from draftune.runs.checkpoint import STATE, checkpoints
from draftune.runs.logs import EVALUATIONS, METRICS, read_rows
from draftune.runs.run_dir import CONFIG
from draftune.utils.paths import user_path

RECORDS = ".ui"
"""Folder in the folder of runs with the settings, prompts, logs and process records of each run's page."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAMES_ALLOWED = "letters, digits, dots, hyphens and underscores, at most 64, the first a letter or digit"
TAIL = 65536
"""Bytes that are read from the end of a log."""


class RunsFolder:
    """The runs in a folder, by name. No name leads out of the folder.

    Args:
        folder: The folder; it is made if it does not exist.

    Raises:
        DraftuneError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = user_path(folder)
        try:
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DraftuneError(f"cannot write to the folder {str(folder)!r}: {error.strerror} (--folder)") from error
        if not os.access(self.path / RECORDS, os.W_OK):
            raise DraftuneError(f"cannot write to the folder {str(folder)!r} (--folder)")

    def names(self) -> list[str]:
        """Return the names of all runs and drafts, newest first."""
        runs = [path for path in self.path.iterdir() if (path / CONFIG).is_file()]
        records = [path for path in (self.path / RECORDS).iterdir() if path.is_dir()]
        changed = {path.name: path.stat().st_mtime for path in (*records, *runs) if self.exists(path.name)}
        return sorted(changed, key=lambda name: -changed[name])

    def holds(self, name: str) -> bool:
        """Return whether a name is that of an entry of the folder, which is no link out of it."""
        if not name or name.startswith((".", "-")) or re.search(r"[/\\\0]", name):
            return False
        root = self.path.resolve()
        return all((base / name).resolve() == base / name for base in (root, root / RECORDS))

    def exists(self, name: str) -> bool:
        """Return whether there is a run or a draft of this name."""
        return self.holds(name) and (self.has_run(name) or self.settings(name).is_file())

    def run(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.path / name

    def record(self, name: str) -> Path:
        """Return the folder of the page's own files on a run."""
        return self.path / RECORDS / name

    def settings(self, name: str) -> Path:
        """Return the file of the settings that a run is started with."""
        return self.record(name) / "settings.yaml"

    def has_run(self, name: str) -> bool:
        """Return whether the run has written its settings: its page has data from then on."""
        return (self.run(name) / CONFIG).is_file()

    def free_name(self) -> str:
        """Return a name that no run has."""
        return next(name for i in count(1) if not (self.run(name := f"run-{i}").exists() or self.record(name).exists()))

    def check_new(self, name: str) -> None:
        """Raise DraftuneError unless a new run can have this name."""
        if not NAME.fullmatch(name):
            raise DraftuneError(f"the name must be {NAMES_ALLOWED}, not {name!r}")
        if not self.holds(name) or self.run(name).exists():
            raise DraftuneError(f"there is a run {name!r} already: give another name")

    def last_row(self, name: str, log: str = METRICS) -> dict[str, Any]:
        """Return the last row of a log; an empty one before the first row."""
        try:
            with (self.run(name) / log).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.read().splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line that is being written, or the end of one
            if isinstance(row, dict):
                return row
        return {}

    def changed(self, name: str) -> float:
        """Return when a run or draft was last changed by an update or by its settings, in seconds since 1970."""
        paths = (self.run(name) / METRICS, self.run(name) / CONFIG, self.settings(name))
        return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)

    def best(self, name: str) -> int:
        """Return the update of the best LoRA; 0 if there is none, or if the base model is the best."""
        try:
            return (self.lora(name, best=True) and best_step(read_rows(self.run(name) / EVALUATIONS))) or 0
        except DraftuneError:
            return 0

    def finished(self, name: str) -> bool:
        """Return whether the newest checkpoint is that of a run after its last evaluation."""
        for checkpoint in checkpoints(self.run(name) / "checkpoints")[-1:]:
            try:
                return json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("finished") is True
            except (OSError, ValueError, AttributeError):
                return False
        return False

    def lora(self, name: str, best: bool = False) -> bool:
        """Return whether the run has written its last LoRA, or its best one."""
        return any((self.run(name) / ("best" if best else "lora")).glob("*.safetensors"))
