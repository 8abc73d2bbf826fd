"""The device, the precision and the processes of a run, as accelerate sets them up."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from draftune.errors import DraftuneError
from draftune.settings import Settings
from draftune.training.fsdp import fsdp_requested
from draftune.utils.logging import logger
from draftune.utils.processes import Processes, rank_and_world_size

if TYPE_CHECKING:
    from accelerate import Accelerator

DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"
"""Environment variable that sets accelerate's device in a run of one process."""
TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others in a collective operation."""


def accelerator(settings: Settings) -> Accelerator:
    """Return a new Accelerator for the run's device, precision and processes.

    Raises:
        DraftuneError: the device, the precision or the launcher's configuration is not supported here.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        disable_fsdp_ram_efficient_loading,
        patch_environment,
    )

    from draftune.utils.devices import default_device

    for other in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{other}", "false").lower() == "true":
            raise DraftuneError(f"accelerate's {other} is not supported: launch without it, or with FSDP 2")
    _, count = rank_and_world_size()
    device = default_device(settings.device)
    if count > 1 and ":" in settings.device:
        raise DraftuneError(f"device={settings.device} is for one process; {count} processes need auto, cuda or cpu")
    # With several processes and no GPU, accelerate would train separately in each.
    cpu = device.type == "cpu" or (count > 1 and device.type == "mps")
    # An earlier run of this process may have used another device or precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    chosen = {} if settings.device == "auto" or count > 1 else {DEVICE_VARIABLE: settings.device}
    try:
        with patch_environment(**chosen):
            made = Accelerator(
                cpu=cpu,
                mixed_precision=settings.mixed_precision,
                # TrainStep divides the losses itself: accelerate must not do it again, whatever its launcher was given.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                # The others wait while one process reads or downloads a model: NCCL's default is ten minutes.
                kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
            )
    except ValueError as error:
        raise DraftuneError(f"mixed_precision={settings.mixed_precision} does not work here: {error}") from error
    # Otherwise transformers would read weights in the first process only.
    disable_fsdp_ram_efficient_loading()
    if count != made.num_processes:
        raise DraftuneError(f"the launcher started {count} processes, but accelerate found {made.num_processes}")
    with processes_of(made).raise_on_all_ranks():
        if fsdp_requested() and settings.compile:
            raise DraftuneError("compile does not work with FSDP: leave out --compile")
        if fsdp_requested() and settings.quantization != "none":
            raise DraftuneError(f"quantization={settings.quantization} does not work with FSDP: leave it out")
        if settings.mixed_precision == "fp16" and made.device.type == "cpu":
            raise DraftuneError("mixed_precision=fp16 does not work on a CPU: use bf16 or no")
        if settings.batch_size % made.num_processes:
            raise DraftuneError(
                f"batch_size={settings.batch_size} must be a multiple of the {made.num_processes} processes, which "
                "share each batch"
            )
    return made


def processes_of(accelerator: Accelerator) -> Processes:
    """Return the processes of an Accelerator."""
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)


def warn_ignored_launcher_options(settings: Settings) -> None:
    """Warn about options of accelerate's launcher that have no effect."""
    launcher_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher_precision not in ("no", settings.mixed_precision):
        logger.warning(
            "accelerate's mixed precision %s is not used: --mixed-precision is %s",
            launcher_precision,
            settings.mixed_precision,
        )
    # Without mpirun, `accelerate launch --cpu` starts one process that trains with nobody else.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "accelerate launch --cpu has started one process only: use torchrun (docs/how-to/several-devices.md)"
        )
