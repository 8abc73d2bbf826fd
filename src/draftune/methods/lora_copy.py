"""A second LoRA: a copy of the trained one that is moved rarely or slowly, and samples or serves as the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class LoRACopy:
    """A copy of the trained LoRA's tensors, which can take their place for calls without gradient.

    Attributes:
        weights: The copy's tensors by name; empty before `start`.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy the trained tensors, unless there is a copy; one that was restored is moved to their devices."""
        self.weights = {
            name: self.weights[name].to(parameter.device) if name in self.weights else parameter.detach().clone()
            for name, parameter in parameters.items()
        }

    @contextmanager
    def in_use(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the trained LoRA the copy's values inside this context, without gradient."""
        trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            write(parameters, self.weights)
            with torch.no_grad():
                yield
        finally:
            write(parameters, trained)

    def move(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Move the copy towards the trained tensors: copy <- decay * copy + (1 - decay) * trained."""
        for name, parameter in parameters.items():
            self.weights[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copy's tensors for a checkpoint."""
        return {f"old/{name}": weight for name, weight in self.weights.items()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the tensors among the values of `state`."""
        found = {key.removeprefix("old/"): value for key, value in state.items() if key.startswith("old/")}
        self.weights = {name: value.clone() for name, value in found.items() if isinstance(value, Tensor)}


def write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into the tensors in place. A graph that saved them is not told: their values must come back."""
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])
