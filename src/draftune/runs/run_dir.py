"""The folder of a run: settings, versions, logs, samples, checkpoints and LoRAs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.errors import DraftuneError
from draftune.lora.files import FILE_NAME
from draftune.presets import read_yaml
from draftune.prompts import metadata
from draftune.runs.logs import EVALUATIONS, LOGS, METRICS, SAMPLES, read_rows
from draftune.runs.resuming import CONSTANT, ROUNDING, RunIdentity, changeable
from draftune.settings import Settings
from draftune.utils.logging import logger
from draftune.utils.paths import atomic_write, user_path
from draftune.utils.processes import SINGLE_PROCESS, Processes

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.yaml"
LOCK = ".draftune.lock"
CHANGES = "changes"
"""File of the settings that were changed when the run was resumed."""


class RunFolder:
    """The files of a run. The main process writes them, and nothing before `create`.

    Args:
        settings: The settings of the run.
        texts: The loaded contents (prompts, LoRA checksums) by setting; their hashes detect changes on resume.
        processes: The processes of the run.

    Raises:
        DraftuneError: the folder cannot be written, or contains anything but a run with these settings.
    """

    def __init__(
        self, settings: Settings, texts: Mapping[str, Sequence[str]], processes: Processes = SINGLE_PROCESS
    ) -> None:
        from filelock import FileLock

        self.processes = processes
        self.path = path = user_path(settings.output)
        if not settings.resume:
            # Its config.yaml can resume the run.
            self.path = path = next_free_dir(path)
            settings = replace(settings, output=str(path), resume=True)
        self.allowed = changeable(settings.allow_changes)
        self.settings = settings = replace(settings, allow_changes="")
        self.lock = FileLock(path / LOCK, timeout=0, thread_local=False)
        # The settings as given. config.yaml holds the resolved ones, such as normalized weights.
        self.requested = asdict(settings)
        self.contents = {name: digest(items) for name, items in texts.items()}
        self.earlier: RunIdentity | None = None
        self.changed: list[str] = []
        self.changes: list[dict[str, Any]] = []
        self.sources: list[dict[str, str]] = []
        self.checkpoint: Path | None = None
        # The weights of the checkpoint's reward, unless the reward has changed.
        self.reward_weights: list[float] | None = None
        self.done = 0
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in LOGS}
        try:
            if path.exists() and not path.is_dir():
                raise DraftuneError(f"--output must be a folder, {str(path)!r} is a file")
            if path.is_dir() and any(path.iterdir()):
                self.load_checkpoint_state()
            existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        except OSError as error:
            raise DraftuneError(f"cannot read the output folder {str(path)!r}: {error.strerror}") from error
        if not os.access(existing, os.W_OK):
            raise DraftuneError(f"cannot write to the output folder {str(path)!r}; give another (--output)")

    def acquire(self) -> None:
        """Lock the folder until `close` or the end of the process. Raises DraftuneError if another process has it."""
        from filelock import Timeout

        try:
            self.lock.acquire()
        except Timeout as error:
            raise DraftuneError(
                f"another process is training in {str(self.path)!r}: wait, or give another folder (--output)"
            ) from error
        except NotImplementedError:
            pass  # the file system has no locks

    def load_checkpoint_state(self) -> None:
        """Read the last checkpoint of the run in the folder, and compare the run with this one."""
        from draftune.runs.checkpoint import checkpoints, read_state

        if self.processes.main and (self.path / LOCK).exists():
            # Fails now, not after everything was loaded.
            self.acquire()
            self.lock.release()
        saved = checkpoints(self.path / "checkpoints")
        if not saved and (self.path / LOCK).exists() and not read_rows(self.path / METRICS):
            return  # the run ended before its first checkpoint and has no data
        if not saved:
            content, more = "other files", ""
            if (self.path / CONFIG).exists():
                content = "a run without a checkpoint to resume from"
                more = f", or train another LoRA on top of that run's (--init-lora {self.path})"
            raise DraftuneError(
                f"the output folder {str(self.path)!r} contains {content}: give another (--output){more}"
            )
        self.checkpoint = saved[-1]
        state = read_state(self.checkpoint)
        self.done = state["step"]
        self.rows = {name: read_rows(self.path / name, self.done) for name in (METRICS, SAMPLES)}
        self.rows[EVALUATIONS] = state["evaluations"]
        if (count := len(self.rows[METRICS])) < self.done:
            logger.warning(
                f"{str(self.path / METRICS)!r} has lost {self.done - count} of the first {self.done} updates"
            )
        self.earlier = RunIdentity(state["settings"], state["contents"], state.get("sources", ()))
        self.changed = self.identity.differences(self.earlier)
        self.changes = state.get("changes", [])
        if not {"reward", "reward_normalization_samples"} & set(self.changed):
            self.reward_weights = state.get("weights")
        self.check_changes(self.earlier)
        # After the last update, the final evaluation may be missing.
        if self.done > self.requested["steps"] or (self.done == self.requested["steps"] and state["finished"]):
            more = "give more (--steps) or another folder (--output)"
            if (schedule := self.requested["lr_scheduler"]) not in CONSTANT:
                more = (
                    f"its learning rate has reached its end (lr_scheduler={schedule}): give another folder (--output), "
                    "or more --steps with --allow-changes steps, which makes the rate rise again"
                )
            raise DraftuneError(f"the run in {str(self.path)!r} has finished its {self.done} updates; {more}")

    @cached_property
    def identity(self) -> RunIdentity:
        """Return what the run is to compute with the present settings."""
        return RunIdentity(self.requested, self.contents)

    @property
    def reward_since(self) -> int:
        """Return the last update whose evaluation has the scores of another reward, -1 if there is none."""
        return max((entry["step"] for entry in self.changes if entry["setting"] == "reward"), default=-1)

    def check_changes(self, earlier: RunIdentity) -> None:
        """Record the settings that differ from the earlier run. Raises DraftuneError unless they are allowed to."""
        refused = [name for name in self.changed if name not in ROUNDING and name not in self.allowed]
        if refused:
            raise self.identity.refusal(refused, earlier, self.path)
        messages: dict[str, list[str]] = {}
        for name in self.changed:
            was, value = earlier.settings.get(name), self.requested.get(name)
            how = "results differ by rounding only" if name in ROUNDING else "allowed by --allow-changes"
            new = f"{value!r} instead of {was!r}" if value != was else f"{value!r}, whose contents changed"
            messages.setdefault(how, []).append(f"{name}={new}")
            self.changes.append({"step": self.done, "setting": name, "was": was, "now": value})
        for how, changes in messages.items():
            logger.warning(f"the run resumes with {', '.join(changes)}: {how}")

    def check_shared(self) -> None:
        """Raise DraftuneError if the processes see different folders or different states of the run."""
        here = [str(self.path), self.done]
        main = self.processes.broadcast(here)
        with self.processes.raise_on_all_ranks():
            if here != main:
                raise DraftuneError(
                    f"this process sees the run in {here[0]!r} at update {here[1]}, and the main process that in "
                    f"{main[0]!r} at update {main[1]}: all machines must share the output folder"
                )

    def create(self, settings: Settings, space: int, **known: Any) -> None:
        """Create the folder, or reset its logs to the checkpoint, and write the resolved settings.

        Args:
            settings: The resolved settings.
            space: Bytes that the run needs at least.
            known: Values to write as .json files, by name.

        Raises:
            DraftuneError: the folder cannot be written, is in use, or its disk has too little space.
        """
        from draftune.runs.checkpoint import checkpoints

        self.sources = self.identity.saved_sources(self.earlier)
        known = known if not self.changes else known | {CHANGES: self.changes}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.acquire()
            for stale in self.path.rglob("*.*[0-9].tmp"):
                stale.unlink()  # a killed process left it
            if checkpoints(self.path / "checkpoints")[-1:] != ([self.checkpoint] if self.checkpoint else []):
                raise DraftuneError(f"another process has resumed the run in {str(self.path)!r}: start again")
            if (free := shutil.disk_usage(self.path).free) < space:
                raise DraftuneError(
                    f"the disk of {str(self.path)!r} has {free / 2**20:.0f} MiB free, and the run needs at least "
                    f"{space / 2**20:.0f} MiB: free some space or give another folder (--output)"
                )
            texts = {CONFIG: settings.to_yaml()}
            texts |= {f"{name}.json": json.dumps(value, indent=1) + "\n" for name, value in known.items()}
            for name, text in texts.items():
                with atomic_write(self.path / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            for name, rows in self.rows.items():
                with atomic_write(self.path / name) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            raise DraftuneError(f"cannot write to the output folder {str(self.path)!r}: {error.strerror}") from error

    def log(self, name: str, row: Mapping[str, Any]) -> bool:
        """Append a row to a log.

        Returns:
            False if the log has a row of this step already: a resumed run evaluates its start again.
        """
        if self.rows[name] and row["step"] <= self.rows[name][-1]["step"]:
            return False
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.rows[name].append(finite)
        if not self.processes.main:
            return True
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        return True

    def save_checkpoint(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], best: int | None
    ) -> None:
        """Write a checkpoint of the run; see `draftune.runs.checkpoint.save_checkpoint`."""
        from draftune.runs.checkpoint import fsync, save_checkpoint

        for name in LOGS:
            if (self.path / name).exists():
                fsync(self.path / name)
        run = {
            "step": step,
            "settings": self.requested,
            "contents": self.contents,
            "evaluations": self.rows[EVALUATIONS],
        }
        run |= {"sources": self.sources, "changes": self.changes}
        save_checkpoint(self.path / "checkpoints", step, run | dict(state), tensors, best)

    def sample_path(self, step: int) -> Path:
        """Return the path of the image grid after an update; without its ending, the folder of the single images."""
        return self.path / "samples" / f"step-{step:06d}.png"

    def close(self) -> None:
        self.lock.release()


def next_free_dir(path: Path) -> Path:
    """Return the first of FOLDER, FOLDER-2, FOLDER-3, … that does not exist or is empty."""
    others = (path.with_name(f"{path.name}-{i}") for i in count(2))
    return next(f for f in chain([path], others) if not f.exists() or (f.is_dir() and not any(f.iterdir())))


def digest(texts: Sequence[str]) -> str:
    """Return a digest of prompts with their metadata, in order."""
    items = [[str(text), metadata(text)] for text in texts]
    return hashlib.sha256(json.dumps(items, sort_keys=True, default=str).encode()).hexdigest()


def read_settings(config: Path) -> Settings:
    """Read the settings of a run. Raises DraftuneError if the file is not what a run wrote."""
    values = read_yaml(config)
    try:
        if not values:
            raise DraftuneError("it is empty")
        return Settings.from_mapping(values)
    except DraftuneError as error:
        raise DraftuneError(f"{str(config)!r} is not a config of 'draftune train': {error}") from error


def run_settings(lora: Path) -> Settings | None:
    """Return the settings of the run that wrote a LoRA file, None if the file is not in a run's folder."""
    lora = lora.absolute()  # a relative path inside the folder does not name it
    config = lora.parent.parent / CONFIG
    in_run = lora.name == FILE_NAME and lora.parent.name in ("lora", "best") and config.is_file()
    return read_settings(config) if in_run else None
