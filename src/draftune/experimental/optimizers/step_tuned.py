"""Step-Tuned SGD (Castera, Bolte, Févotte and Pauwels, 2021, arXiv:2103.03570): a step size from noisy gradients."""

from __future__ import annotations

import math
from typing import Any

import torch

from draftune.errors import DraftuneError
from draftune.experimental.optimizers.base import Closure, ClosureOptimizer, call_closure, gradient


class StepTunedSGD(ClosureOptimizer):
    """Step-Tuned SGD: two steps on each batch; the change of the gradient sets the next step size (Barzilai-Borwein).

        size of the k-th pair of steps = lr * gamma_k / (k + 1)^(1/2 + delta),  gamma_0 = 1
        gamma_{k+1} = clip(|dw|^2 / <G, dw>, low, high) if <G, dw> > 0, else clip(nu, low, high)

    Castera, Bolte, Févotte and Pauwels, 2021, arXiv:2103.03570. dw is the first step of a pair, G the running average
    of the change of the gradient that it caused. All weights share one gamma. Two gradient evaluations a step, both on
    the same batch and noise. Tune lr as for SGD. The other defaults are the paper's.

    Args:
        nu: gamma for a curvature that is not positive, above 0. Default: 2.
        beta: Decay of the running average, 0 or more and below 1. Default: 0.9.
        low: Lower bound of gamma, above 0. Default: 0.5.
        high: Upper bound of gamma. Default: 2.
        delta: Additional decay of the step size, at least -0.5. Default: 0.001.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        nu: float = 2.0,
        beta: float = 0.9,
        low: float = 0.5,
        high: float = 2.0,
        delta: float = 0.001,
    ) -> None:
        if not 0 < low <= high < math.inf:
            raise DraftuneError(f"step_tuned_sgd needs 0 < low <= high, got low={low}, high={high}")
        if not 0 <= beta < 1:
            raise DraftuneError(f"step_tuned_sgd: beta must be at least 0 and below 1, got {beta}")
        if not (nu > 0 and -0.5 <= delta < math.inf):
            raise DraftuneError(f"step_tuned_sgd needs nu > 0 and delta >= -0.5, got nu={nu}, delta={delta}")
        super().__init__(params, {"lr": lr})
        self.nu, self.beta, self.low, self.high, self.delta = nu, beta, low, high, delta

    @property
    def gamma(self) -> float:
        """Step-size factor of the next pair of steps."""
        return float(self.shared.get("gamma", 1.0))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take both steps on one batch and return the loss before them."""
        loss = call_closure(closure)
        done, gamma = int(self.shared.get("step", 0)), self.gamma
        first = []
        for group in self.param_groups:
            size = group["lr"] / (done + 1) ** (0.5 + self.delta) * gamma
            for parameter in group["params"]:
                first.append((parameter, gradient(parameter).clone(), size))
        here = [parameter.clone() for parameter, *_ in first]
        for parameter, before, size in first:
            parameter.add_(before, alpha=-size)
        try:
            call_closure(closure)
        except BaseException:
            # An interrupted step leaves the weights unchanged.
            for (parameter, *_), start in zip(first, here, strict=True):
                parameter.copy_(start)
            raise
        length = curvature = 0.0
        for parameter, before, size in first:
            now, state = gradient(parameter), self.state[parameter]
            average = state.setdefault("change", torch.zeros_like(parameter))
            average.lerp_(now - before, 1 - self.beta)
            length += size**2 * float(before.square().sum())
            curvature -= size * float((average * before).sum())
            parameter.add_(now, alpha=-size)
        curvature /= 1 - self.beta ** (done + 1)
        tuned = length / curvature if curvature > 0 else self.nu
        self.shared["gamma"] = self.number(min(max(tuned, self.low), self.high))
        self.shared["step"] = torch.tensor(done + 1)
        return loss
