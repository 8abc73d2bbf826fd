"""Signal-to-noise ratio of an update's gradient (as in MEKA, arXiv:2011.04803), from gradients computed anyway."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from draftune.utils.logging import logger
from draftune.utils.processes import SINGLE_PROCESS, Processes

WINDOW = 20
"""Number of recent updates that a warning is based on, since a single measurement is noisy."""


def square_sum(tensor: Tensor) -> float:
    """Return the sum of squares, computed in float64 on the CPU: MPS has no float64."""
    return float(tensor.cpu().double().square().sum())


class GradientNoise:
    """Measure how much the gradients of an update's batches differ. Stores one copy of the gradient.

    For n batches with mean gradient g, and S the trace of the covariance of their gradients, the noise of g is S / n.
    Its signal is |g|^2 - S / n, an unbiased estimate that may be negative. The losses are divided by n beforehand, so
    g is the accumulated gradient.

    Attributes:
        ratio: Signal over noise of the last update; NaN for fewer than two batches.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], processes: Processes = SINGLE_PROCESS) -> None:
        self.parameters, self.processes = parameters, processes
        self.recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.warned = False
        self.clear()

    def clear(self) -> None:
        """Start an update. Call it when the gradients are cleared."""
        self.sum: Tensor | None = None
        self.squares, self.count = 0.0, 0
        self.ratio = math.nan

    def add(self) -> None:
        """Add a batch's gradient. Call it in every process, after the batch's last backward pass."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        total = torch.cat([grad.flatten() for grad in grads])
        own = total if self.sum is None else total - self.sum
        mean = self.processes.gather(own[None]).mean(0) if self.processes.count > 1 else own
        self.squares += square_sum(mean)
        self.sum, self.count = total, self.count + 1

    def measure(self) -> None:
        """Compute the ratio. Call it after the last batch, before the gradients are averaged over processes."""
        if self.sum is None or self.count < 2:
            return
        whole = self.processes.gather(self.sum[None]).mean(0) if self.processes.count > 1 else self.sum
        square = square_sum(whole)
        noise = max(0.0, self.count * self.squares - square) / (self.count - 1)
        self.recent.append((square - noise, noise))
        self.ratio = (square - noise) / noise if noise > 0 else math.inf
        self.warn()

    def warn(self) -> None:
        """Warn once, if the noise exceeded the signal over the last `WINDOW` updates."""
        signal, noise = (sum(values) for values in zip(*self.recent, strict=True))
        if self.warned or len(self.recent) < WINDOW or not signal < noise:
            return
        self.warned = True
        factor = f"about {noise / signal:.2g} times as many images would equal them" if signal > 0 else "by far"
        logger.warning(
            f"over the last {WINDOW} updates the gradient had more noise than signal (ratio {signal / noise:.2g}): the "
            f"batch is too small, {factor} (batch_size, gradient_accumulation_steps)"
        )
