"""The folder of runs that the page shows, and the files that it keeps beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from draftune.errors import DraftuneError
from draftune.evaluation.verdict import known
from draftune.report.summary import best_step
from draftune.runs.checkpoint import STATE, checkpoints
from draftune.runs.logs import COUNTERS, EVALUATIONS, METRICS, SAMPLES, read_rows
from draftune.runs.run_dir import CONFIG
from draftune.utils.paths import user_path

RECORDS = ".ui"
"""Folder in the folder of runs with the settings, prompts, logs and process records of each run's page."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAMES_ALLOWED = "letters, digits, dots, hyphens and underscores, at most 64, the first a letter or digit"
TAIL = 65536
"""Bytes that are read from the end of a log."""
T = TypeVar("T")


class RunsFolder:
    """The runs in a folder, by name. No name leads out of the folder.

    Args:
        folder: The folder; it is made if it does not exist.

    Raises:
        DraftuneError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = user_path(folder).absolute()  # settings with it hold when the page is served from elsewhere
        try:
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DraftuneError(f"cannot write to the folder {str(folder)!r}: {error.strerror} (--folder)") from error
        if not os.access(self.path / RECORDS, os.W_OK):
            raise DraftuneError(f"cannot write to the folder {str(folder)!r} (--folder)")

    def names(self) -> list[str]:
        """Return the names of all runs and drafts, newest first."""
        names = {path.name for folder in (self.path, self.path / RECORDS) for path in folder.iterdir()}
        changed = {name: self.changed(name) for name in names if self.exists(name)}
        return sorted(changed, key=lambda name: (-changed[name], name))

    def holds(self, name: str) -> bool:
        """Return whether a name is that of an entry of the folder, which is no link out of it."""
        if not name or name.startswith((".", "-")) or re.search("[/\\\\\0\ud800-\udfff]", name):
            return False
        root = os.path.realpath(self.path)
        paths = [os.path.join(root, name), os.path.join(root, RECORDS, name)]
        return all(os.path.realpath(path) == path for path in paths)

    def exists(self, name: str) -> bool:
        """Return whether there is a run or a draft of this name."""
        return self.holds(name) and (self.has_run(name) or os.path.isfile(self.settings(name)))

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
        return os.path.isfile(self.run(name) / CONFIG)  # False also for a folder that may not be read

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
        return read_once(self.run(name) / log, last_row) or {}

    def sampled(self, name: str) -> int:
        """Return the update of the last sample images; -1 without any."""
        return int(self.last_row(name, SAMPLES).get("step", -1))

    def changed(self, name: str) -> float:
        """Return when a run or draft was last changed by an update or by its settings, in seconds since 1970."""
        paths = (self.run(name) / METRICS, self.run(name) / CONFIG, self.settings(name))
        return max((stamp[1] / 1e9 for path in paths if (stamp := stamp_of(path))), default=0.0)

    def best(self, name: str) -> int:
        """Return the update of the best LoRA; 0 if there is none, or if the base model is the best."""
        return (self.lora(name, best=True) and read_once(self.run(name) / EVALUATIONS, best_in)) or 0

    def finished(self, name: str) -> bool:
        """Return whether the newest checkpoint is that of a run after its last evaluation."""
        newest = checkpoints(self.run(name) / "checkpoints")[-1:]
        return any(read_once(checkpoint / STATE, is_finished) for checkpoint in newest)

    def lora(self, name: str, best: bool = False) -> bool:
        """Return whether the run has written its last LoRA, or its best one."""
        return any((self.run(name) / ("best" if best else "lora")).glob("*.safetensors"))


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Return a file's inode, time of change in nanoseconds and size, None if it cannot be read."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_once(path: Path, read: Callable[[Path], T]) -> T | None:
    """Return what a function reads from a file, None without the file. It is read again only after a change."""
    stamp = stamp_of(path)
    return None if stamp is None else read_at(path, stamp, read)


@lru_cache(maxsize=4000)
def read_at(path: Path, stamp: tuple[int, int, int], read: Callable[[Path], Any]) -> Any:
    """Return what a function reads from a file with this stamp."""
    return read(path)


def last_row(path: Path) -> dict[str, Any]:
    """Return the last whole row of a log, without counters that are no numbers; an empty one without rows."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line that is being written, or the end of one
        if isinstance(row, dict):
            return {key: value for key, value in row.items() if key not in COUNTERS[METRICS] or known(row, key)}
    return {}


def best_in(path: Path) -> int:
    """Return the update of the best evaluation in a log, 0 if there is none or if the log cannot be read."""
    try:
        return best_step(read_rows(path)) or 0
    except DraftuneError:
        return 0


def is_finished(path: Path) -> bool:
    """Return whether a checkpoint's state is that of a finished run."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("finished") is True
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
