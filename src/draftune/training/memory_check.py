"""Memory check: measure or count the memory of a run, and find settings that fit into the device's memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from draftune.errors import out_of_memory, require
from draftune.evaluation.metrics import score_batches
from draftune.methods import load_method
from draftune.settings import Settings
from draftune.training.distributed import accelerator
from draftune.training.memory_count import count_run, network_bytes
from draftune.training.trainer import Trainer
from draftune.utils.memory import peak_memory

ROOM = 0.9
"""Share of the memory that a run may use. The rest is for gaps between allocations and the device's own context."""
TIMED = 2
"""Minimum number of timed updates. Two untimed ones before them allocate the optimizer's state and fill caches."""
WORTH = 0.99
"""A change is rejected if it leaves more than this share of the memory in use."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass
class MemoryTrial:
    """Measurements of a run with some settings. If memory did not suffice, `ran` is False and the numbers are 0.

    Attributes:
        settings: The settings.
        change: What differs from the trial before.
        held: Bytes of all networks.
        peak: Bytes that an update needs on top, the optimizer's state included, or sampling if that needs more.
        update: Seconds of an update; 0 for a counted trial.
        picture: Seconds to sample and score an image; 0 for a counted trial.
        run: For "updates", "sample grids" and "evaluations" of the whole run, their number and their seconds; empty
            for a counted trial.
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
        """Return the bytes that the run needs."""
        return self.held + self.peak

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole run."""
        return sum(seconds for _, seconds in self.run.values())


@dataclass
class MemoryReport:
    """The trials on a device with `memory` bytes: first the requested settings, then changed ones.

    `best` is the trial with every change that saved memory.
    """

    device: torch.device
    memory: int
    trials: list[MemoryTrial]
    best: MemoryTrial

    @property
    def fits(self) -> bool:
        """Return whether the best trial fits into the memory."""
        return self.best.ran and self.best.total <= ROOM * self.memory

    @property
    def changes(self) -> dict[str, Any]:
        """Return the settings in which the best trial differs from the requested ones."""
        first, last = self.trials[0].settings, self.best.settings
        return {name: value for name, value in vars(last).items() if value != getattr(first, name)}


def preflight(settings: Settings, memory: int | None = None, count: bool = False) -> MemoryReport:
    """Run real updates at the real size, and change one setting after the other until they fit. Nothing is written.

    Args:
        settings: The settings of the run.
        memory: Bytes to fit into; the free memory of the device by default.
        count: Whether to count the memory from the configs instead (`memory_count`). No weights are downloaded.

    Raises:
        DraftuneError: as `train` would.
    """
    # Without resume, a run in the output folder does not matter.
    settings = replace(settings, resume=False)
    device = accelerator(settings).device
    memory = memory or free_memory(device)
    trial_of = counted if count else measured
    first = trial_of(settings, {})
    report = MemoryReport(device, memory, [first], first)
    for lever in LEVERS:
        while not report.fits and (change := lever(report.best.settings)):
            trial = trial_of(replace(report.best.settings, **change), change)
            report.trials.append(trial)
            # If neither trial ran, the next change is made on top of this one.
            if report.best.ran and not (trial.ran and trial.total < WORTH * report.best.total):
                break
            report.best = trial
    return report


def checkpointing(settings: Settings) -> dict[str, Any]:
    """Recompute more in the backward pass."""
    modes = (
        ["none", "denoiser", "both"] if load_method(settings.method).backprops_multiple_calls() else ["none", "blocks"]
    )
    mode = settings.gradient_checkpointing or modes[-1]
    less = modes[modes.index(mode) + 1 :] if mode in modes else modes[-1:]
    return {"gradient_checkpointing": less[0]} if less else {}


def fewer_scored(settings: Settings) -> dict[str, Any]:
    """Decode and score one image at a time."""
    return {"reward_batch_size": 1} if min(settings.reward_batch_size, settings.batch_size) > 1 else {}


def smaller_batches(settings: Settings) -> dict[str, Any]:
    """Halve the batch and double the gradient accumulation."""
    size, number = settings.batch_size, settings.gradient_accumulation_steps
    if size == 1:
        return {}
    half = size // 2 if size % 2 == 0 else 1
    if half % settings.num_images_per_prompt and load_method(settings.method).whole_groups_per_batch:
        return {}
    return {"batch_size": half, "gradient_accumulation_steps": number * size // half}


def use_bf16(settings: Settings) -> dict[str, Any]:
    """Use bfloat16."""
    return {"mixed_precision": "bf16"} if settings.mixed_precision == "no" else {}


# Changes that save memory, the cheapest first.
LEVERS: tuple[Callable[[Settings], dict[str, Any]], ...] = (
    checkpointing,
    fewer_scored,
    smaller_batches,
    use_bf16,
)


def counted(settings: Settings, change: dict[str, Any]) -> MemoryTrial:
    """Count the memory of a run with these settings from the configs."""
    memory = count_run(settings)
    return MemoryTrial(settings, change, ran=True, held=memory.networks, peak=memory.peak)


def measured(settings: Settings, change: dict[str, Any]) -> MemoryTrial:
    """Load everything and measure some updates."""
    trial = MemoryTrial(settings, change)
    try:
        return filled(trial, Trainer(settings=settings))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return MemoryTrial(settings, change)
    finally:
        # Free this trainer's memory before the next one is built.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def filled(trial: MemoryTrial, trainer: Trainer) -> MemoryTrial:
    """Fill in a trial's measurements."""
    c, s, device = trainer.context, trainer.settings, trainer.context.accelerator.device
    ema = trainer.train_step.ema
    trial.held = network_bytes(trainer) + sum(average.nbytes for average in (ema.shadow_params if ema else ()))
    trainer.train_step.folder = None
    trainer.checks.check_rewards(trainer.validation.shown)
    # The optimizer's state exists from the second update on.
    update = peak_memory(lambda: [trainer.train_step.run(1 + i) for i in range(2)], device)
    timed = max(TIMED, s.prefix_reuse_steps)  # one of `prefix_reuse_steps` updates samples the prefix
    trial.update = seconds(lambda: [trainer.train_step.run(3 + i) for i in range(timed)], device) / timed
    prompts = list(islice(cycle(trainer.prompts), s.batch_size))

    def look() -> None:
        images = c.sample_images(prompts, range(len(prompts)))
        for reward in (c.reward, c.eval_rewards):
            if reward is not None:
                score_batches(reward, images, prompts, device)

    trial.picture = seconds(look, device) / len(prompts)
    # With a tiny decoder in training, only sampling uses the model's own decoder.
    trial.peak = max(update, peak_memory(look, device))
    grids = 2 + ((s.steps - 1) // s.log_images_steps if s.log_images_steps else 0)
    trial.run = {
        "updates": (s.steps, s.steps * trial.update),
        "sample grids": (grids, grids * len(trainer.validation.shown) * trial.picture),
    }
    if c.eval_prompts:
        evaluations = 2 + ((s.steps - 1) // s.validation_steps if s.validation_steps else 0)
        prompts_of_evaluation = list(c.eval_prompts)
        earlier = c.continued_run
        if earlier is not None and earlier.reward is not None and list(earlier.prompts) != prompts_of_evaluation:
            prompts_of_evaluation += earlier.prompts
        # The template is evaluated once, the evaluation prompts `evaluations` times.
        once = len(c.template_prompts) * s.num_validation_images
        # `denoiser_mse_from_base` calls the network twice for each sampling step of `batch_size` images.
        images = len(prompts_of_evaluation) * s.num_validation_images + 2 * s.batch_size
        trial.run["evaluations"] = evaluations, (evaluations * images + once) * trial.picture
    trial.ran = True
    return trial


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; for the CPU at most the rest of the control group's limit.

    Raises:
        DraftuneError: the CPU's free memory is needed, and psutil is not installed.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    psutil: Any = require("psutil", "measuring free memory (or give --memory)", "preflight")
    free: int = psutil.virtual_memory().available
    try:
        most, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(most) - int(used)) if most != "max" else free
    except (OSError, ValueError):
        return free
