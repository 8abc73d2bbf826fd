"""EXTRAP-SGD (Lin, Kong, Stich & Jaggi, arXiv 2006.05720): the gradient is taken a little further on."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from draftune.errors import DraftuneError
from draftune.experimental.optimizers.base import Closure, Evaluating, evaluated


class Extrapolate(Evaluating):
    """EXTRAP around any optimiser: its gradient is taken at w - rate * h, where h is the gradient of the step before.

    Costs no further gradient, and as much memory as two. With `momentum` > 0 the last step, times it, is added to
    where the gradient is taken: around sgd(momentum=u), with the same u, that is the paper's Nesterov form.
    Both forms are as recalled from the paper, of which no code was found; its rule for the rate is not part of this.
    On a quadratic of curvature c the stable learning rates shrink: rate * c < 1 and lr * c < 2 * (1 - rate * c) around
    plain SGD. `rate` is in units of the weights by the gradient, whatever the optimiser. h is the mean over all
    processes: the paper's workers have each their own.
    """

    def __init__(self, optimizer: Optimizer, rate: float, momentum: float = 0.0) -> None:
        if isinstance(optimizer, Evaluating):
            raise DraftuneError("extrapolate wants an optimiser inside it that takes one gradient as it is")
        if not (rate >= 0 and 0 <= momentum < 1):
            raise DraftuneError(f"extrapolate: rate >= 0 and 0 <= momentum < 1 are wanted, not {rate} and {momentum}")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.rate, self.momentum = optimizer, rate, momentum
        self.follow()

    def follow(self) -> None:
        """One state and the same groups: what is set in either holds for both."""
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        parameters = self.parameters()
        here = [parameter.clone() for parameter in parameters]
        try:
            for parameter in parameters:
                state = self.state.get(parameter, {})
                if self.momentum and "moved" in state:
                    parameter.add_(state["moved"], alpha=self.momentum)
                if self.rate and "past" in state:
                    parameter.add_(state["past"], alpha=-self.rate)
            loss = evaluated(closure)
        finally:
            for parameter, before in zip(parameters, here, strict=True):
                parameter.copy_(before)
        self.optimizer.step()
        # Only now: an optimiser may take a state that is not empty for its own.
        for parameter, before in zip(parameters, here, strict=True):
            if parameter.grad is None:
                continue
            if self.rate:
                self.state[parameter]["past"] = parameter.grad.clone()
            if self.momentum:
                self.state[parameter]["moved"] = parameter - before
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        self.follow()
