"""How a LoRA was trained, in the metadata of its file: the sampler and the range of steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.lora.files import lora_file, open_safetensors
from draftune.sampling.schedule import SAMPLER_OPTIONS
from draftune.sampling.step_range import StepRange

SAMPLER_METADATA = "sampler_options"
"""The metadata key of the sampler in training, as JSON: the arguments of `set_sampler_options`, and its scheduler."""
STEPS_METADATA = "lora_steps"
"""The metadata key of the steps on which the LoRA is active, such as 0.0-0.4; files of other LoRAs do not have it."""


def saved_grid(source: Path | str) -> dict[str, Any]:
    """Return the timestep settings that a LoRA was trained with, from its file's metadata; may be empty.

    Raises:
        DraftuneError: There is no such file, or its metadata is damaged.
    """
    sampler = saved_sampler(source)
    return {name: sampler[name] for name in SAMPLER_OPTIONS if name in sampler}


def saved_sampler(source: Path | str) -> dict[str, Any]:
    """Return all that a LoRA's metadata say of its sampler, as `Family.sampler_metadata`; raises as `saved_grid`."""
    with open_safetensors(lora_file(source)) as file:
        text = (file.metadata() or {}).get(SAMPLER_METADATA, "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DraftuneError(f"the metadata of {str(source)!r} is damaged: {SAMPLER_METADATA} can't be read") from error


def steps_of(source: Path | str, metadata: Mapping[str, str]) -> StepRange:
    """Return the steps on which a LoRA is active, from its file's metadata. Raises DraftuneError if damaged."""
    try:
        return StepRange.parse(metadata.get(STEPS_METADATA, ""))
    except DraftuneError as error:
        raise DraftuneError(f"the metadata of {str(source)!r} is damaged: {error}") from error


def saved_steps(source: Path | str) -> StepRange:
    """Return the steps on which the LoRA of a file is active. Raises DraftuneError if there is no such file."""
    with open_safetensors(lora_file(source)) as file:
        return steps_of(source, file.metadata() or {})


def steps_metadata(lora_steps: StepRange) -> dict[str, str]:
    """Return the metadata of a range of steps; empty for all steps."""
    return {} if lora_steps.is_all else {STEPS_METADATA: str(lora_steps)}
