"""Where a run trains, and in what precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from draftune.errors import DraftuneError
from draftune.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator(settings: Settings) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # A second run in one process may want another device or precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        chosen = Accelerator(cpu=settings.cpu, mixed_precision=settings.mixed_precision)
    except ValueError as error:
        raise DraftuneError(f"mixed_precision={settings.mixed_precision} does not work here: {error}") from error
    if settings.mixed_precision == "fp16" and chosen.device.type == "cpu":
        raise DraftuneError("mixed_precision=fp16 does not work on a CPU: use bf16 or no")
    if chosen.num_processes > 1:
        raise DraftuneError("training by several processes is not supported: start one, on one device")
    return chosen
