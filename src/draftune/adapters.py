"""Which of a network's adapters are heard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

KEPT = "kept"
"""The name of a frozen LoRA that belongs to the base of a training, where there is one."""


@contextmanager
def adapted_by(network: nn.Module, name: str) -> Iterator[None]:
    """The network with its adapter of this name alone, or with none where it has no such adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    active = [layer._active_adapter for layer in layers]
    # peft's own way to choose would also turn on and off what is trained.
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = names
