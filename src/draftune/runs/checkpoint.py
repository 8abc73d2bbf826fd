"""Where a run stands, on disk: what goes on from it is, bit for bit, what an undisturbed run would have been."""

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

from draftune.errors import DraftuneError
from draftune.utils.tensors import save_tensors

STATE, TENSORS, CHECKSUMS = "state.json", "tensors.safetensors", "checksums.json"
KEPT = 2
FORMAT = 3


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], best: int | None = None
) -> None:
    """Writes FOLDER/step-000040 whole or not at all, and lets go of all but the newest and the best."""
    target = folder / f"step-{step:06d}"
    temporary = folder / f".{target.name}"
    for stale in folder.glob(".*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_tensors(temporary / TENSORS, tensors)
        (temporary / STATE).write_text(json.dumps({"format": FORMAT, **state}), encoding="utf-8")
        sums = {name: checksum(temporary / name) for name in (STATE, TENSORS)}
        (temporary / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            synced(path)
        old = target.rename(folder / f".{target.name}-old") if target.exists() else None
        temporary.rename(target)
        synced(folder)
        if old:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(folder)[:-KEPT]:
        if best is None or old.name != f"step-{best:06d}":
            remove(old)


def remove(checkpoint: Path) -> None:
    """Takes the checkpoint away in one step, whatever interrupts its deletion."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}-old")), ignore_errors=True)


def synced(path: Path) -> None:
    """On the disk, and not only on its way there."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))


def check(checkpoint: Path) -> None:
    """Raises DraftuneError that names the file of a checkpoint that is not what was written, and a way on."""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        damaged = [name for name in (STATE, TENSORS) if checksum(checkpoint / name) != sums[name]]
    except FileNotFoundError as error:
        damaged = [Path(error.filename).name]
    except (OSError, ValueError, KeyError, TypeError):
        damaged = [CHECKSUMS]
    if damaged:
        found = checkpoints(checkpoint.parent)
        older = found[: found.index(checkpoint)]
        way = f"remove the folder to go on from {older[-1].name}" if older else "--no-resume begins anew"
        raise DraftuneError(
            f"the checkpoint {str(checkpoint)!r} is damaged: {damaged[0]} is not what was written; {way}"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was told. Raises DraftuneError for a damaged checkpoint, or one of another version."""
    check(checkpoint)
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise DraftuneError(f"the checkpoint {str(checkpoint)!r} was written by another version of draftune")
    return state


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / TENSORS)


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
    """Every global random generator that a reward or a network might draw from."""
    kind, keys, *rest = np.random.get_state()
    tensors = {"random/torch": torch.get_rng_state()}
    for i in range(count := torch.cuda.device_count()):
        # From this process's device on: with several, another one goes on with the same numbers on its own.
        tensors[f"random/cuda-{i}"] = torch.cuda.get_rng_state((torch.cuda.current_device() + i) % count)
    return {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}, tensors


def load_random_state(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["random/torch"])
    for i in range(count := torch.cuda.device_count()):
        if f"random/cuda-{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/cuda-{i}"], (torch.cuda.current_device() + i) % count)


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is only looked at in this block draws random numbers, but training goes on as if it had not."""
    state, tensors = random_state()
    yield
    load_random_state(state, tensors)
