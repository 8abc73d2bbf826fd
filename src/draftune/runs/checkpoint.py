"""Checkpoints of a run. A run that resumes from one gives the same numbers, bit for bit, as an uninterrupted run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from draftune.errors import DraftuneError, first_line
from draftune.utils.devices import cuda_devices
from draftune.utils.processes import is_peer_failure
from draftune.utils.tensors import save_tensors

STATE, TENSORS, CHECKSUMS = "state.json", "tensors.safetensors", "checksums.json"
MAX_CHECKPOINTS = 2
REPLACED = "-replaced"
"""End of the hidden name of a checkpoint while a new one of the same update takes its place."""
FORMAT = 3


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], best: int | None = None
) -> None:
    """Write FOLDER/step-000040 atomically, and delete all checkpoints except the newest two and the best.

    Args:
        folder: The folder of the run's checkpoints.
        step: Number of updates.
        state: State for JSON.
        tensors: State as tensors by name.
        best: Step of the checkpoint to retain.
    """
    target = folder / f"step-{step:06d}"
    temporary = folder / f".{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_tensors(temporary / TENSORS, tensors)
        (temporary / STATE).write_text(json.dumps({"format": FORMAT, **state}), encoding="utf-8")
        sums = {name: checksum(temporary / name) for name in (STATE, TENSORS)}
        (temporary / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        if target.exists():
            replaced = folder / f".{target.name}{REPLACED}"
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        temporary.rename(target)
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(folder)[:-MAX_CHECKPOINTS]:
        if best is None or old.name != f"step-{best:06d}":
            remove(old)
    for stale in folder.glob(".*"):
        shutil.rmtree(stale, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. An interrupted deletion leaves no half checkpoint."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}-old")), ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = {path.name: path for path in folder.glob("step-*")}
    for path in folder.glob(f".step-*{REPLACED}"):
        # The process was killed when a checkpoint of the same update was to take its place.
        found.setdefault(path.name[1 : -len(REPLACED)], path)
    return [path for _, path in sorted(found.items(), key=lambda item: (len(item[0]), item[0]))]


def check(checkpoint: Path) -> None:
    """Raise DraftuneError if a checkpoint is damaged; the error names the file and what to do."""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        damaged = [name for name in (STATE, TENSORS) if checksum(checkpoint / name) != sums[name]]
    except FileNotFoundError as error:
        damaged = [Path(error.filename).name]
    except (OSError, ValueError, KeyError, TypeError):
        damaged = [CHECKSUMS]
    if damaged:
        all_checkpoints = checkpoints(checkpoint.parent)
        older = all_checkpoints[: all_checkpoints.index(checkpoint)]
        advice = f"delete its folder to resume from {older[-1].name}" if older else "start a new run with --no-resume"
        raise DraftuneError(
            f"the checkpoint {str(checkpoint)!r} is damaged: the checksum of {damaged[0]} differs; {advice}"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state of a checkpoint. Raises DraftuneError if it is damaged or of another version."""
    check(checkpoint)
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise DraftuneError(f"the checkpoint {str(checkpoint)!r} was written by another version of draftune")
    return state


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint."""
    return load_file(checkpoint / TENSORS)


@contextmanager
def explained_failures(run: Path) -> Iterator[None]:
    """Raise DraftuneError for a full disk or a lost process inside the block, with the checkpoint that is left."""
    try:
        yield
    except OSError as error:
        problem = f"cannot use {str(error.filename or run)!r}: {error.strerror or error}"
        raise DraftuneError(f"{problem}; {left_checkpoint(run)}") from error
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        problem = f"another process of this run has ended (torch: {first_line(error)})"
        raise DraftuneError(f"{problem}; {left_checkpoint(run)}") from error


def left_checkpoint(run: Path) -> str:
    """Return the part of an error that says from which checkpoint the run in a folder can be resumed."""
    newest = checkpoints(run / "checkpoints")[-1:]
    return f"the same command resumes from {newest[0].name}" if newest else "there is no checkpoint"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Return the optimizer's state by the names of its parameters.

    8-bit AdamW has numbers, which become tensors, and a nested dictionary, whose keys are joined by slashes. Its
    parameters share tensors, which safetensors refuses: they are copied.
    """

    def flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}/{key}")
            else:
                kind = "optimizer" if isinstance(value, Tensor) else "optimizer-number"
                tensor = torch.as_tensor(value)
                yield f"{kind}/{prefix}/{key}", tensor.clone() if "/" in prefix else tensor

    state = optimizer.state_dict()["state"]
    return dict(item for i, values in state.items() for item in flat(values, names[i]))


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind in ("optimizer", "optimizer-number"):
            name, *nested, entry = rest.split("/")
            values = state.setdefault(names.index(name), {})
            for inner in nested:
                values = values.setdefault(inner, {})
            values[entry] = value if kind == "optimizer" else value.item()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the states of the global random generators of Python, NumPy and torch."""
    kind, keys, *rest = np.random.get_state()
    tensors = {"random/torch": torch.get_rng_state()}
    for i in range(count := cuda_devices()):
        # Numbered from this process's device on, so that a single process with another device can resume the run.
        tensors[f"random/cuda-{i}"] = torch.cuda.get_rng_state((torch.cuda.current_device() + i) % count)
    return {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}, tensors


def load_random_state(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Restore the states of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["random/torch"])
    for i in range(count := cuda_devices()):
        if f"random/cuda-{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/cuda-{i}"], (torch.cuda.current_device() + i) % count)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the global random generators after the block, so that evaluations do not change training."""
    state, tensors = random_state()
    yield
    load_random_state(state, tensors)
