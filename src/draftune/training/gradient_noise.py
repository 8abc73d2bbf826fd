"""How much of an update's gradient is signal: MEKA's measurement (arXiv 2011.04803), from gradients made anyway."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from draftune.utils.processes import ALONE, Processes, tell

WINDOW = 20
"""Updates that a warning is about: a single one's measurement is itself noisy."""


def square_sum(tensor: Tensor) -> float:
    """Return the sum of a tensor's squares, in float64 and on the CPU: MPS has no float64."""
    return float(tensor.cpu().double().square().sum())


class GradientNoise:
    """Compares the gradients of the batches of one update with each other. Holds one copy of the gradient.

    With n batches, g their mean gradient and S the trace of their covariance, the noise of g is S / n and its signal
    |g|^2 - S / n, which is unbiased and may come out below 0. Each batch's loss is divided by n, so that g is the sum.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], processes: Processes = ALONE) -> None:
        self.parameters, self.processes = parameters, processes
        self.recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.told = False
        self.clear()

    def clear(self) -> None:
        """To be called where the gradients are cleared."""
        self.sum: Tensor | None = None
        self.squares, self.count = 0.0, 0
        self.ratio = math.nan
        """Signal over noise of the last update's gradient; undefined with fewer than two batches."""

    def add(self) -> None:
        """To be called after the last backward pass of each batch, in every process."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        total = torch.cat([grad.flatten() for grad in grads])
        own = total if self.sum is None else total - self.sum
        mean = self.processes.gather(own[None]).mean(0) if self.processes.count > 1 else own
        self.squares += square_sum(mean)
        self.sum, self.count = total, self.count + 1

    def measure(self) -> None:
        """To be called after the last batch, before the gradients are averaged. Warns where the ratio stays low."""
        if self.sum is None or self.count < 2:
            return
        whole = self.processes.gather(self.sum[None]).mean(0) if self.processes.count > 1 else self.sum
        square = square_sum(whole)
        noise = max(0.0, self.count * self.squares - square) / (self.count - 1)
        self.recent.append((square - noise, noise))
        self.ratio = (square - noise) / noise if noise > 0 else math.inf
        self.warn()

    def warn(self) -> None:
        """Says once where over the last updates the noise was larger than the signal."""
        signal, noise = (sum(values) for values in zip(*self.recent, strict=True))
        if self.told or len(self.recent) < WINDOW or not signal < noise:
            return
        self.told = True
        often = f"about {noise / signal:.2g} times as many pictures would even them" if signal > 0 else "by far"
        tell(
            f"over the last {WINDOW} updates the gradient held more noise than signal ({signal / noise:.2g} of it): "
            f"the batch is small, {often} (batch_size, gradient_accumulation_steps)"
        )
