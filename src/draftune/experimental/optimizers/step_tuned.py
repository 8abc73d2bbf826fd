"""Step-Tuned SGD (Castera, Bolte, Févotte & Pauwels, arXiv 2103.03570): a step size from noisy gradients alone."""

from __future__ import annotations

import math
from typing import Any

import torch

from draftune.errors import DraftuneError
from draftune.experimental.optimizers.base import Closure, Evaluating, evaluated, gradient


class StepTunedSGD(Evaluating):
    """Step-Tuned SGD: two steps on each batch, whose change of gradient gives the next one's size (Barzilai-Borwein).

    The k-th pair of steps has the size lr * gamma_k / (k + 1)^(1/2 + delta). With the first step's dw and the running
    average G (`beta`) of the change of gradient that it made, gamma_{k+1} = |dw|^2 / <G, dw>, or `nu` where the
    curvature <G, dw> is not positive, clipped to `low` … `high`; gamma_0 = 1, and one gamma serves all weights. Both
    gradients must be of the same batch and noise. The defaults are the paper's; lr is to be tuned as that of SGD.
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
            raise DraftuneError(f"step_tuned_sgd: 0 < low <= high is wanted, not low={low}, high={high}")
        if not 0 <= beta < 1:
            raise DraftuneError(f"step_tuned_sgd: beta must be at least 0 and less than 1, not {beta}")
        if not (nu > 0 and -0.5 <= delta < math.inf):
            raise DraftuneError(f"step_tuned_sgd: nu > 0 and delta >= -0.5 are wanted, not nu={nu}, delta={delta}")
        super().__init__(params, {"lr": lr})
        self.nu, self.beta, self.low, self.high, self.delta = nu, beta, low, high, delta

    @property
    def gamma(self) -> float:
        """The factor of the next pair of steps."""
        return float(self.shared.get("gamma", 1.0))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Both steps on one batch; the loss before the first of them."""
        loss = evaluated(closure)
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
            evaluated(closure)
        except BaseException:
            # Both steps or none.
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
