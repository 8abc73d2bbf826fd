"""Channel-directed gradients (Lao, Zhu, Wonka & Sundaramoorthi, arXiv 2008.10766): steepest ascent in other metrics.

Each function takes a gradient [O, …], one row for each output channel, such as a convolution's kernel or the second
matrix of a LoRA, and returns the gradient of the same function in a metric that couples the rows; with G' the result,
<G', k>_metric = <G, k>, means over the O rows, for every k. A gradient that is the same for all rows stays as it is.
The paper's code is not public and its weights are not established: those here are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftune.errors import DraftuneError


def channel_mean(gradient: Tensor, weight: float = 2.0) -> Tensor:
    """Keeps the mean over the output channels and divides what differs from it by `weight`.

    The metric is <h, k> = <mean h, mean k> + weight * <h - mean h, k - mean k>. The order of channels does not matter.
    """
    positive("channel_mean", "weight", weight)
    mean = gradient.mean(0, keepdim=True)
    return mean + (gradient - mean) / weight


def channel_sobolev(gradient: Tensor, width: float = 2.0) -> Tensor:
    """Smooths along the output channels, over about `width` of them, as if they lay on a ring.

    The Sobolev metric H^1, <h, k> + lambda * <h', k'> on a ring of length 1 with lambda = (width / O)^2: the m-th
    frequency is multiplied by 1 / (1 + lambda * (2 pi m)^2). It takes the order of channels for one that means
    something.
    """
    positive("channel_sobolev", "width", width)
    weight = (width / len(gradient)) ** 2
    return multiplied(gradient, 1 / (1 + weight * frequencies(gradient)))


def channel_sobolev_mean(gradient: Tensor, weight: float = 1 / (4 * math.pi**2)) -> Tensor:
    """Keeps the mean over the output channels and smooths what differs from it more, the faster it changes.

    The metric <mean h, mean k> + weight * <h', k'> on a ring of length 1: the m-th frequency, from 1 on, is multiplied
    by 1 / (weight * (2 pi m)^2), which is 1 / m^2 with the weight unless set.
    """
    positive("channel_sobolev_mean", "weight", weight)
    squares = frequencies(gradient)
    squares[0] = 1 / weight
    return multiplied(gradient, 1 / (weight * squares))


def positive(name: str, setting: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise DraftuneError(f"{setting} of {name} must be more than 0, not {value}")


def frequencies(gradient: Tensor) -> Tensor:
    """(2 pi m)^2 for each frequency m that the rows can have."""
    count = len(gradient) // 2 + 1
    return (2 * math.pi * torch.arange(count, device=gradient.device, dtype=gradient.dtype)).square()


def multiplied(gradient: Tensor, gains: Tensor) -> Tensor:
    """Each frequency along the rows times its gain."""
    spectrum = torch.fft.rfft(gradient, dim=0)
    gains = gains.reshape(-1, *[1] * (gradient.dim() - 1))
    return torch.fft.irfft(spectrum * gains, n=len(gradient), dim=0)
