"""Base class of optimizers that evaluate the gradient several times in a step, or at other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[[], Any]
"""Clear the gradients, compute them at the current weights on the same batch, and return the loss (as in torch)."""


class ClosureOptimizer(Optimizer):
    """Optimizer whose `step` requires a closure, as `torch.optim.LBFGS` does.

    State that belongs to all parameters is stored with the first parameter, so that `state_dict` includes it.
    """

    needs_closure = True
    """How the training loop recognizes it."""

    def parameters(self) -> list[Tensor]:
        """Return the parameters of all groups in order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def shared(self) -> dict[str, Any]:
        """State that belongs to all parameters together."""
        state: dict[str, Any] = self.state[self.parameters()[0]]
        return state

    def number(self, value: float) -> Tensor:
        """Round a number to the precision of the parameters, to which `load_state_dict` casts it: resume is exact."""
        return torch.tensor(value, dtype=self.parameters()[0].dtype)


def call_closure(closure: Closure | None) -> Any:
    """Call the closure and return the loss. Raise TypeError if there is no closure."""
    if closure is None:
        raise TypeError("step needs a closure that computes the gradients: optimizer.step(closure)")
    with torch.enable_grad():
        return closure()


def gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter, 0 if it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
