"""The model that LoRA functions work on, without importing the models."""

from __future__ import annotations

from typing import Any, Protocol

from draftune.lora.deltas import LoRADeltas
from draftune.sampling.step_range import StepRange


class LoRATarget(Protocol):
    """The members of `draftune.models.DiffusionModel` that LoRA functions use."""

    name: str
    lora_prefix: str
    frozen_lora: LoRADeltas | None
    lora_steps: StepRange

    @property
    def denoiser(self) -> Any: ...

    @property
    def lora_networks(self) -> dict[str, Any]: ...

    @property
    def sampler_options(self) -> dict[str, Any]: ...

    def unused_layers(self) -> frozenset[str]: ...
