"""EXTRAP-SGD (Lin, Kong, Stich and Jaggi, 2020, arXiv:2006.05720): evaluate the gradient at extrapolated weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from draftune.errors import DraftuneError
from draftune.experimental.optimizers.base import Closure, ClosureOptimizer, call_closure


class Extrapolate(ClosureOptimizer):
    """EXTRAP-SGD around any optimizer: the gradient is evaluated at extrapolated weights.

        gradient at  w + momentum * (last step) - rate * h,  h = gradient of the previous step

    Lin, Kong, Stich and Jaggi, 2020, arXiv:2006.05720. One gradient evaluation a step, and memory for up to two more
    gradients. Around sgd(momentum=u), `momentum` = u is the paper's Nesterov form. On a quadratic of curvature c,
    plain SGD is stable for rate * c < 1 and lr * c < 2 (1 - rate * c). The paper's rule for the rate is not
    implemented. Here h is the mean over all processes; in the paper each worker has its own. No code of the authors
    was available.

    Args:
        optimizer: The optimizer that takes the step.
        rate: Extrapolation step along the previous gradient, 0 or more, in units of weight / gradient.
        momentum: Factor of the last step, 0 or more and below 1. Default: 0.
    """

    def __init__(self, optimizer: Optimizer, rate: float, momentum: float = 0.0) -> None:
        if isinstance(optimizer, ClosureOptimizer):
            raise DraftuneError("extrapolate cannot wrap an optimizer that needs a closure: use adamw or sgd inside it")
        if not (rate >= 0 and 0 <= momentum < 1):
            raise DraftuneError(f"extrapolate needs rate >= 0 and 0 <= momentum < 1, got {rate=} and {momentum=}")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.rate, self.momentum = optimizer, rate, momentum
        self.follow()

    def follow(self) -> None:
        """Share state and parameter groups with the wrapped optimizer, so that a change in one holds for both."""
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        parameters = self.parameters()
        here = [parameter.clone() for parameter in parameters]
        try:
            for parameter in parameters:
                state = self.state.get(parameter, {})
                if self.momentum and "last_step" in state:
                    parameter.add_(state["last_step"], alpha=self.momentum)
                if self.rate and "previous_gradient" in state:
                    parameter.add_(state["previous_gradient"], alpha=-self.rate)
            loss = call_closure(closure)
        finally:
            for parameter, before in zip(parameters, here, strict=True):
                parameter.copy_(before)
        self.optimizer.step()
        # After the step: an optimizer may take a state that is not empty for its own.
        for parameter, before in zip(parameters, here, strict=True):
            if parameter.grad is None:
                continue
            if self.rate:
                self.state[parameter]["previous_gradient"] = parameter.grad.clone()
            if self.momentum:
                self.state[parameter]["last_step"] = parameter - before
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        self.follow()
