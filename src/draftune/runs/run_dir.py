"""A run's folder: settings, versions, metrics, evaluations, samples, checkpoints, the LoRA."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.errors import DraftuneError
from draftune.lora.files import FILE_NAME
from draftune.prompts import metadata
from draftune.runs.resuming import COMPUTED, ROUNDING, Asked, changeable
from draftune.settings import Settings, read_yaml
from draftune.utils.paths import user_path, written_whole
from draftune.utils.processes import ALONE, Processes, tell

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
LOCK = ".draftune.lock"
LOGS = (METRICS, EVALUATIONS, SAMPLES)
COUNTERS = {
    METRICS: ("step", "reward_queries", "train_seconds"),
    EVALUATIONS: ("step", "reward_queries", "train_seconds"),
    SAMPLES: ("step",),
}
NO_NUMBERS: dict[str, Any] = {"stderr": {}, "scores": [], "prompts": []}
"""Columns of the logs that are tables or lists."""
CHANGES = "changes"
"""The file that says what changed while the run went on."""


class RunFolder:
    """The files of one run, which the main process writes. Nothing is written before `create`.

    Raises DraftuneError where the folder can't be written to or holds anything but a run with these settings.
    """

    def __init__(self, settings: Settings, texts: Mapping[str, Sequence[str]], processes: Processes = ALONE) -> None:
        from filelock import FileLock

        self.processes = processes
        self.path = path = user_path(settings.output)
        if not settings.resume:
            # From here on it is a run like any other, which its config.yaml goes on with.
            self.path = path = first_free(path)
            settings.output, settings.resume = str(path), True
        self.allowed = changeable(settings.allow_changes)
        settings.allow_changes = ""
        self.lock = FileLock(path / LOCK, timeout=0, thread_local=False)
        # What the run was asked for; what comes of it, such as normalised weights, is in its config.yaml.
        self.asked = asdict(settings)
        self.contents = {name: digest(given) for name, given in texts.items()}
        self.earlier: Asked | None = None
        self.changed: list[str] = []
        self.changes: list[dict[str, Any]] = []
        self.sources: list[dict[str, str]] = []
        self.checkpoint: Path | None = None
        self.done = 0
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in LOGS}
        self.events: SummaryWriter | None = None
        try:
            if path.exists() and not path.is_dir():
                raise DraftuneError(f"the output {str(path)!r} is a file; give a folder")
            if path.is_dir() and any(path.iterdir()):
                self.find()
            existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        except OSError as error:
            raise DraftuneError(f"cannot look into the output folder {str(path)!r}: {error.strerror}") from error
        if not os.access(existing, os.W_OK):
            raise DraftuneError(f"cannot write to the output folder {str(path)!r}; give another (--output)")

    def take(self) -> None:
        """Keeps every other process out of the folder until `close`, or until this one ends in whatever way.

        Raises DraftuneError where another is at work in it.
        """
        from filelock import Timeout

        try:
            self.lock.acquire()
        except Timeout as error:
            raise DraftuneError(
                f"another process is training in {str(self.path)!r}: wait for it, or give another folder (--output)"
            ) from error
        except NotImplementedError:
            pass  # a file system without locks

    def find(self) -> None:
        """Finds where the run in the folder stands, if it is this one."""
        from draftune.runs.checkpoint import checkpoints, read_state

        if self.processes.main and (self.path / LOCK).exists():
            # Said at once, and not after everything was loaded.
            self.take()
            self.lock.release()
        found = checkpoints(self.path / "checkpoints")
        if not found and (self.path / LOCK).exists() and not read_rows(self.path / METRICS):
            return  # it ended before its first checkpoint: there is nothing to lose
        if not found:
            held = "another run" if (self.path / CONFIG).exists() else "other files"
            raise DraftuneError(f"the output folder {str(self.path)!r} holds {held}; give another (--output)")
        self.checkpoint = found[-1]
        state = read_state(self.checkpoint)
        self.done = state["step"]
        self.rows = {name: read_rows(self.path / name, self.done) for name in (METRICS, SAMPLES)}
        self.rows[EVALUATIONS] = state["evaluations"]
        self.earlier = Asked(state["settings"], state["contents"], state.get("sources", ()))
        self.changed = self.now.differences(self.earlier)
        self.changes = state.get("changes", [])
        self.check_changes(self.earlier)
        # A run that ended in its last look at the pictures has that left to do.
        if self.done > self.asked["steps"] or (self.done == self.asked["steps"] and state["finished"]):
            raise DraftuneError(
                f"the run in {str(self.path)!r} has made its {self.done} updates: ask for more (--steps) or give "
                "another folder (--output)"
            )

    @cached_property
    def now(self) -> Asked:
        """What the run is asked to compute now."""
        return Asked(self.asked, self.contents)

    def check_changes(self, earlier: Asked) -> None:
        """Note what differs from the earlier run. Raises DraftuneError for differences that were not allowed."""
        refused = [name for name in self.changed if name not in ROUNDING and name not in self.allowed]
        if refused:
            said = [self.now.said(name, earlier) for name in refused]
            said[0] = f"the output folder {str(self.path)!r} holds another run: {said[0]}"
            ways = ["give another (--output)"]
            if set(refused) <= set(COMPUTED):
                ways.append(f"insist (--allow-changes {','.join(refused)})")
            ways.append(f"train another LoRA on top of that run's (--continue-from {self.path})")
            raise DraftuneError(*said, f"{', '.join(ways[:-1])}, or {ways[-1]}")
        told: dict[str, list[str]] = {}
        for name in self.changed:
            was, value = earlier.settings.get(name), self.asked.get(name)
            how = "the same is computed, with other rounding" if name in ROUNDING else "as --allow-changes says"
            new = f"{value!r} in place of {was!r}" if value != was else f"{value!r}, whose contents changed"
            told.setdefault(how, []).append(f"{name} {new}")
            self.changes.append({"step": self.done, "setting": name, "was": was, "now": value})
        for how, changes in told.items():
            tell(f"the run goes on with {', '.join(changes)}: {how}")

    def agree(self) -> None:
        """Raises DraftuneError where the processes do not see one and the same folder."""
        here = [str(self.path), self.done]
        main = self.processes.of_main(here)
        with self.processes.together():
            if here != main:
                raise DraftuneError(
                    f"the run in {here[0]!r} stands at update {here[1]} here, and where the main process is that in "
                    f"{main[0]!r} at {main[1]}: all machines must share the output folder"
                )

    def create(self, settings: Settings, space: int, **known: Any) -> None:
        """Makes the folder, or takes it back to the checkpoint, and writes the resolved settings.

        `space`: bytes that the run is sure to take. Each of `known` becomes a .json file. Raises DraftuneError where
        the folder can't be written to, is in use, or has too little space.
        """
        from torch.utils.tensorboard import SummaryWriter

        from draftune.runs.checkpoint import checkpoints

        self.sources = self.now.saved_sources(self.earlier)
        known = known if not self.changes else known | {CHANGES: self.changes}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.take()
            for stale in self.path.rglob("*.*[0-9].tmp"):
                stale.unlink()  # of a process that was killed
            if checkpoints(self.path / "checkpoints")[-1:] != ([self.checkpoint] if self.checkpoint else []):
                raise DraftuneError(f"another process went on with the run in {str(self.path)!r}: start again")
            if (free := shutil.disk_usage(self.path).free) < space:
                raise DraftuneError(
                    f"the disk of {str(self.path)!r} has {free / 2**20:.0f} MiB left, and the run takes at least "
                    f"{space / 2**20:.0f}: make room or give another folder (--output)"
                )
            texts = {CONFIG: settings.to_yaml()}
            texts |= {f"{name}.json": json.dumps(value, indent=1) + "\n" for name, value in known.items()}
            for name, text in texts.items():
                with written_whole(self.path / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            for name, rows in self.rows.items():
                with written_whole(self.path / name) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            raise DraftuneError(f"cannot write to the output folder {str(self.path)!r}: {error.strerror}") from error
        self.events = SummaryWriter(str(self.path / "tensorboard"), purge_step=self.done + 1)

    def log(self, name: str, row: Mapping[str, Any]) -> bool:
        """One line of one of the logs, on disk at once, and the same numbers for TensorBoard.

        Whether it is new: a run that goes on measures its start again.
        """
        if self.rows[name] and row["step"] <= self.rows[name][-1]["step"]:
            return False
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.rows[name].append(finite)
        if not self.processes.main:
            return True
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        prefix = "" if name == METRICS else "validation/"
        try:
            for key, value in numbers(row).items():
                if key != "step" and self.events:
                    self.events.add_scalar(prefix + key, value, int(row["step"]))
        except OSError:
            self.events = None  # a full disk: what must be written says so itself
        return True

    def save_checkpoint(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], best: int | None
    ) -> None:
        from draftune.runs.checkpoint import save_checkpoint, synced

        for name in LOGS:
            if (self.path / name).exists():
                synced(self.path / name)
        run = {"step": step, "settings": self.asked, "contents": self.contents, "evaluations": self.rows[EVALUATIONS]}
        run |= {"sources": self.sources, "changes": self.changes}
        save_checkpoint(self.path / "checkpoints", step, run | dict(state), tensors, best)

    def sample_path(self, step: int) -> Path:
        """The grid of pictures after an update; the single ones are in a folder of that name."""
        return self.path / "samples" / f"step-{step:06d}.png"

    def close(self) -> None:
        try:
            if self.events:
                self.events.close()
        except OSError:
            pass  # of a full disk its own thread has heard as well, and the logs are whole
        finally:
            self.lock.release()


def first_free(path: Path) -> Path:
    """The folder, or the first of FOLDER-2, FOLDER-3, … where nothing lies."""
    others = (path.with_name(f"{path.name}-{i}") for i in count(2))
    return next(f for f in chain([path], others) if not f.exists() or (f.is_dir() and not any(f.iterdir())))


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row is a number, and no truth value, list or table."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def digest(texts: Sequence[str]) -> str:
    """The same for the same prompts, with what they carry, in the same order."""
    known = [[str(text), metadata(text)] for text in texts]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def read_rows(path: Path, last: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a log up to an update; what a run that was cut off left of its last line does not count.

    Raises DraftuneError for any other line that is not of this log.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DraftuneError(f"cannot read the log {str(path)!r}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if is_row(row, path.name):
            rows.append(row)
        elif number < len(lines):
            raise DraftuneError(
                f"{str(path)!r} is not a log as 'draftune train' writes it: mend line {number}, or take it out"
            )
    return [row for row in rows if row["step"] <= last]


def is_row(row: Any, log: str) -> bool:
    """Whether this is a line of the log of that name: a table of numbers, null for what is not finite."""
    if not isinstance(row, dict) or any(not isinstance(row.get(key), int | float) for key in COUNTERS.get(log, ())):
        return False
    apart: dict[str, Any] = {key: row.get(key, default) for key, default in NO_NUMBERS.items()}
    if log == SAMPLES and not (row.keys() >= {"prompts", "scores"} and isinstance(apart["prompts"], list)):
        return False
    if not isinstance(apart["stderr"], dict) or not isinstance(apart["scores"], list):
        return False
    values = (value for key, value in row.items() if key not in NO_NUMBERS)
    return all(isinstance(v, int | float | None) for v in (*values, *apart["stderr"].values(), *apart["scores"]))


def read_settings(config: Path) -> Settings:
    """The settings of a run. Raises DraftuneError that names the file where it is not what a run wrote."""
    values = read_yaml(config)
    try:
        if not values:
            raise DraftuneError("it is empty")
        return Settings.from_mapping(values)
    except DraftuneError as error:
        raise DraftuneError(f"{str(config)!r} is not what 'draftune train' wrote: {error}") from error


def run_settings(lora: Path) -> Settings | None:
    """The settings of the run that wrote a LoRA file, where it still lies in the run's folder."""
    config = lora.parent.parent / CONFIG
    in_run = lora.name == FILE_NAME and lora.parent.name in ("lora", "best") and config.is_file()
    return read_settings(config) if in_run else None
