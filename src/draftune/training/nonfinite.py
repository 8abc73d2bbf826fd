"""What happens after a reward or a gradient that is not finite: save the batch, then skip the update or end the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from draftune.errors import DraftuneError
from draftune.runs.checkpoint import checkpoints
from draftune.training.data import BatchRecord
from draftune.utils.images import save_image, to_pil
from draftune.utils.logging import logger
from draftune.utils.processes import Processes
from draftune.utils.tensors import save_tensors

MAX_NONFINITE_STEPS = 20
"""Consecutive updates that may be skipped before the run ends."""


def save_nonfinite(folder: Path, batches: Sequence[BatchRecord], processes: Processes) -> None:
    """Save an update's batches: I.safetensors with noise, images, rewards and prompts, and the images I-J.png."""
    for i, batch in enumerate(batches):
        tensors = {"noise": batch.noise}
        if batch.images is not None:
            tensors["images"] = processes.gather(batch.images)
        if batch.reward is not None:
            tensors["reward"] = batch.reward
        if not processes.main:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for j, image in enumerate(to_pil(tensors["images"].nan_to_num(0)) if "images" in tensors else ()):
            save_image(image, folder / f"{i}-{j}.png")
        save_tensors(folder / f"{i}.safetensors", tensors, {"prompts": json.dumps(list(map(str, batch.prompts)))})


def skip_or_stop(error: DraftuneError, folder: Path, step: int, skip: bool, in_a_row: int) -> None:
    """Log that an update was skipped.

    Args:
        error: The reward or gradient that is not finite.
        folder: The run's folder.
        step: Number of the update.
        skip: Whether such updates may be skipped (`nonfinite_action`).
        in_a_row: Consecutive updates that were skipped, with this one.

    Raises:
        DraftuneError: the update may not be skipped, or too many were.
    """
    saved = str(folder / "nonfinite" / f"step-{step:06d}")
    if skip and in_a_row <= MAX_NONFINITE_STEPS:
        logger.warning("%s; the update is skipped, its batch is in %r", error, saved)
        return
    advice = "--nonfinite-action skip skips such updates"
    if skip:
        advice = f"{MAX_NONFINITE_STEPS} updates in a row were skipped: lower the learning rate, or use "
        advice += "--mixed-precision no"
    last = checkpoints(folder / "checkpoints")
    checkpoint = f"; the last checkpoint is {last[-1].name}" if last else ""
    raise DraftuneError(f"{error}; its batch is in {saved!r}{checkpoint}; {advice}") from error
