"""Before a long run: what one real update takes, how long all of it will, and what to change where it does not fit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch

from draftune.errors import out_of_memory
from draftune.evaluation.metrics import score_batches
from draftune.methods import load_method
from draftune.settings import Settings
from draftune.training.distributed import accelerator
from draftune.training.train import prepare
from draftune.training.trainer import Trainer
from draftune.utils.memory import peak_memory

ROOM = 0.9
"""The share of the memory that may be used: allocators leave gaps, and a device's own context takes some."""
TIMED = 2
"""Updates that are timed at least, after two in which everything is made for the first time and memory is counted."""
WORTH = 0.99
"""A change that leaves more than this share of the memory in use is not worth making."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Trial:
    """Real updates with some settings; where memory did not suffice, `ran` is false and all else is 0.

    held, peak: bytes of the networks, and the most that an update takes on top, the optimiser's averages included, or a
    batch of sample pictures where that is more.
    update, picture: seconds of an update, and of a picture drawn and scored. run: for "updates", "sample grids" and
    "evaluations" of the whole run how many there are and their seconds.
    """

    settings: Settings
    change: dict[str, Any]
    ran: bool = False
    held: int = 0
    peak: int = 0
    update: float = 0.0
    picture: float = 0.0
    run: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.held + self.peak

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(seconds for _, seconds in self.run.values())


@dataclass
class Preflight:
    """What was tried on a device with so many bytes to use: the settings asked for first, then the changed ones."""

    device: torch.device
    memory: int
    trials: list[Trial]
    best: Trial
    """The trial with all changes that were worth making."""

    @property
    def fits(self) -> bool:
        return self.best.ran and self.best.total <= ROOM * self.memory

    @property
    def changes(self) -> dict[str, Any]:
        """The settings to change."""
        first, last = self.trials[0].settings, self.best.settings
        return {name: value for name, value in vars(last).items() if value != getattr(first, name)}


def preflight(settings: Settings, memory: int | None = None) -> Preflight:
    """Makes real updates at the real size, writes nothing, and changes one setting after the other until they fit.

    `memory`: bytes to fit into; what is free on the device unless given. Raises DraftuneError as `train` would.
    """
    # As if in a folder of its own, so that a run that is there does not matter.
    settings = replace(settings, resume=False)
    device = accelerator(settings).device
    memory = memory or free_memory(device)
    first = measured(settings, {})
    found = Preflight(device, memory, [first], first)
    for lever in LEVERS:
        while not found.fits and (change := lever(found.best.settings)):
            trial = measured(replace(found.best.settings, **change), change)
            found.trials.append(trial)
            # Where neither runs, the next lever is pulled on top of this one.
            if found.best.ran and not (trial.ran and trial.total < WORTH * found.best.total):
                break
            found.best = trial
    return found


def checkpointing(settings: Settings) -> dict[str, Any]:
    """What takes less memory, by whether a graph of the method's holds several calls of the denoiser."""
    modes = ["no", "calls", "both"] if load_method(settings.method).spans_calls() else ["no", "blocks"]
    mode = settings.gradient_checkpointing or modes[-1]
    less = modes[modes.index(mode) + 1 :] if mode in modes else modes[-1:]
    return {"gradient_checkpointing": less[0]} if less else {}


def fewer_scored(settings: Settings) -> dict[str, Any]:
    return {"reward_batch_size": 1} if min(settings.reward_batch_size, settings.batch_size) > 1 else {}


def smaller_batches(settings: Settings) -> dict[str, Any]:
    """Half the batch in twice as many: as many pictures in an update."""
    size, number = settings.batch_size, settings.gradient_accumulation_steps
    if size == 1:
        return {}
    half = size // 2 if size % 2 == 0 else 1
    return {"batch_size": half, "gradient_accumulation_steps": number * size // half}


def half_precision(settings: Settings) -> dict[str, Any]:
    return {"mixed_precision": "bf16"} if settings.mixed_precision == "no" else {}


# What costs least first.
LEVERS: tuple[Callable[[Settings], dict[str, Any]], ...] = (
    checkpointing,
    fewer_scored,
    smaller_batches,
    half_precision,
)


def measured(settings: Settings, change: dict[str, Any]) -> Trial:
    """Loads everything anew and makes some updates."""
    trial = Trial(settings, change)
    try:
        return filled(trial, prepare(settings=settings))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return Trial(settings, change)
    finally:
        # What the trainer held is let go of before the next is made.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def filled(trial: Trial, trainer: Trainer) -> Trial:
    device, s = trainer.accelerator.device, trainer.settings
    trial.held = held_memory(trainer)
    trainer.updates.folder = None
    trainer.probe()
    # In the second of two the optimiser's averages are there.
    update = peak_memory(lambda: [trainer.updates.update(1 + i) for i in range(2)], device)
    timed = max(TIMED, s.prefix_reuse)  # as many as share a path, one of which draws it
    trial.update = seconds(lambda: [trainer.updates.update(3 + i) for i in range(timed)], device) / timed
    prompts = list(islice(cycle(trainer.prompts), s.batch_size))

    def look() -> None:
        pictures = trainer.watch.draw(prompts, range(len(prompts)))
        for reward in (trainer.reward, trainer.held_out):
            if reward is not None:
                score_batches(reward, pictures, prompts, device)

    trial.picture = seconds(look, device) / len(prompts)
    # Where the gradient goes through a small decoder, the model's own is called here alone.
    trial.peak = max(update, peak_memory(look, device))
    grids = 2 + ((s.steps - 1) // s.sample_every if s.sample_every else 0)
    trial.run = {
        "updates": (s.steps, s.steps * trial.update),
        "sample grids": (grids, grids * len(trainer.watch.shown) * trial.picture),
    }
    if trainer.watch.eval_prompts:
        evaluations = 2 + ((s.steps - 1) // s.eval_every if s.eval_every else 0)
        # `denoiser_mse_from_base` calls the network twice for each step of a batch of pictures.
        drawn = list(trainer.watch.eval_prompts)
        if trainer.past is not None and trainer.past.reward is not None and list(trainer.past.prompts) != drawn:
            drawn += trainer.past.prompts
        pictures = len(drawn) * s.eval_images + 2 * s.batch_size
        trial.run["evaluations"] = evaluations, evaluations * pictures * trial.picture
    trial.ran = True
    return trial


def seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def held_memory(trainer: Trainer) -> int:
    """Bytes of every network that stays in memory during training, the LoRA's included."""
    first = trainer.past.reward if trainer.past is not None else None
    rewards = [reward for reward in (trainer.reward, trainer.held_out, first) if reward is not None]
    networks = [*trainer.model.networks, *rewards]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for network in networks
        for tensor in (*network.parameters(), *network.buffers())
        if tensor.device == trainer.accelerator.device
    }
    return sum(storages.values())


def free_memory(device: torch.device) -> int:
    """Bytes that can still be used on the device; on the CPU no more than the process's group may have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free: int = psutil.virtual_memory().available
    try:
        most, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(most) - int(used)) if most != "max" else free
    except (OSError, ValueError):
        return free
