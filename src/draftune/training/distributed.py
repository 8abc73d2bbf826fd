"""Where a run trains, in what precision, and with which other processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from draftune.errors import DraftuneError
from draftune.settings import Settings
from draftune.training.fsdp import wants_shards
from draftune.utils.processes import Processes, launched, tell

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator(settings: Settings) -> Accelerator:
    """The device and, under a launcher, the way to the other processes. Raises DraftuneError for what can't be used."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, disable_fsdp_ram_efficient_loading

    from draftune.models.base import default_device

    for other in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{other}", "false").lower() == "true":
            raise DraftuneError(f"accelerate's {other} is not supported: launch without it, or with FSDP 2")
    _, count = launched()
    # Without a GPU accelerate would let each process train alone.
    cpu = settings.cpu or (count > 1 and default_device().type in ("cpu", "mps"))
    # A second run in one process may want another device or precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        # What the launcher says of accumulation would divide the losses a second time.
        chosen = Accelerator(
            cpu=cpu,
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except ValueError as error:
        raise DraftuneError(f"mixed_precision={settings.mixed_precision} does not work here: {error}") from error
    # With it transformers would read weights in the first process alone, and leave the others' as they came.
    disable_fsdp_ram_efficient_loading()
    if count != chosen.num_processes:
        raise DraftuneError(f"the launcher speaks of {count} processes and accelerate of {chosen.num_processes}")
    with processes_of(chosen).together():
        wants_shards()
        if settings.mixed_precision == "fp16" and chosen.device.type == "cpu":
            raise DraftuneError("mixed_precision=fp16 does not work on a CPU: use bf16 or no")
        if settings.batch_size % chosen.num_processes:
            raise DraftuneError(
                f"batch_size={settings.batch_size} is that of all {chosen.num_processes} processes together: give a "
                "multiple of their number"
            )
    return chosen


def processes_of(accelerator: Accelerator) -> Processes:
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)


def tell_unheeded(settings: Settings) -> None:
    """Says what a launcher was asked for and does not come to pass."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", settings.mixed_precision):
        tell(f"accelerate's mixed precision {asked} is not used: --mixed-precision is {settings.mixed_precision}")
    # Without mpirun, accelerate's launcher for CPUs starts one process that waits for nobody.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        tell(
            "accelerate launch --cpu has started one process alone: torchrun starts several "
            "(docs/how-to/several-devices.md)"
        )
