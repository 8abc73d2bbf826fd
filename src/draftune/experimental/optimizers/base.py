"""What the optimisers have in common that ask for more than one gradient, or for one somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[[], Any]
"""Clears the gradients, computes them anew at the weights as they are, on the same batch, and returns the loss."""


class Evaluating(Optimizer):
    """An optimiser whose `step` must be given a closure, which it calls where and as often as it needs a gradient.

    What is not of one weight alone is kept in the state of the first one, where `state_dict` finds it.
    """

    needs_closure = True
    """How the training loop recognizes it."""

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def shared(self) -> dict[str, Any]:
        """The state of all weights together."""
        state: dict[str, Any] = self.state[self.parameters()[0]]
        return state

    def number(self, value: float) -> Tensor:
        """In the precision in which `load_state_dict` brings it back, so that a run goes on bit for bit."""
        return torch.tensor(value, dtype=self.parameters()[0].dtype)


def evaluated(closure: Closure | None) -> Any:
    """The loss, with the gradients at the weights as they are. Raises TypeError where there is no closure."""
    if closure is None:
        raise TypeError("step wants a closure that computes the gradients anew: optimizer.step(closure)")
    with torch.enable_grad():
        return closure()


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
