"""Channel-directed gradients: preconditioners that couple the output channels of a layer.

Lao, Zhu, Wonka and Sundaramoorthi, 2020, arXiv:2008.10766. Each function maps a gradient G [O, ...], with one row for
each output channel, to the gradient G' of the same function in another metric:

    <G', k>_metric = <G, k>  for every k,  inner products being means over the O rows

G may be the gradient of a convolution's kernel or of a LoRA's up matrix. A gradient that is equal in all rows does not
change. The authors' code is not public, and the paper does not settle the weights; the defaults are this project's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftune.errors import DraftuneError


def channel_mean(gradient: Tensor, weight: float = 2.0) -> Tensor:
    """Divide the deviation from the mean over output channels by `weight`.

        G' = mean(G) + (G - mean(G)) / weight
        <h, k>_metric = <mean h, mean k> + weight * <h - mean h, k - mean k>

    The order of the channels does not matter.

    Args:
        weight: Above 0. Default: 2. 1 changes nothing.
    """
    positive("channel_mean", "weight", weight)
    mean = gradient.mean(0, keepdim=True)
    return mean + (gradient - mean) / weight


def channel_sobolev(gradient: Tensor, width: float = 2.0) -> Tensor:
    """Smooth along the output channels over about `width` of them (Sobolev gradient, H^1 metric on a ring).

        <h, k>_metric = <h, k> + lambda <h', k'>,  lambda = (width / O)^2
        frequency m is multiplied by 1 / (1 + lambda (2 pi m)^2)

    It assumes that neighboring channels are related.

    Args:
        width: Smoothing width in channels, above 0. Default: 2.
    """
    positive("channel_sobolev", "width", width)
    weight = (width / len(gradient)) ** 2
    return multiplied(gradient, 1 / (1 + weight * frequencies(gradient)))


def channel_sobolev_mean(gradient: Tensor, weight: float = 1 / (4 * math.pi**2)) -> Tensor:
    """Smooth the deviation from the mean over output channels (homogeneous Sobolev metric on a ring).

        <h, k>_metric = <mean h, mean k> + weight <h', k'>
        frequency m >= 1 is multiplied by 1 / (weight (2 pi m)^2), the mean by 1

    Args:
        weight: Above 0. Default: 1 / (4 pi^2), which multiplies frequency m by 1 / m^2.
    """
    positive("channel_sobolev_mean", "weight", weight)
    squares = frequencies(gradient)
    squares[0] = 1 / weight
    return multiplied(gradient, 1 / (weight * squares))


def positive(name: str, setting: str, value: float) -> None:
    """Raise DraftuneError if a setting is not above 0 and finite."""
    if not 0 < value < math.inf:
        raise DraftuneError(f"{setting} of {name} must be above 0 and finite, got {value}")


def frequencies(gradient: Tensor) -> Tensor:
    """Return (2 pi m)^2 for each frequency m of the real Fourier transform over the rows [O // 2 + 1]."""
    count = len(gradient) // 2 + 1
    return (2 * math.pi * torch.arange(count, device=gradient.device, dtype=gradient.dtype)).square()


def multiplied(gradient: Tensor, gains: Tensor) -> Tensor:
    """Multiply each frequency along the rows by its gain."""
    spectrum = torch.fft.rfft(gradient, dim=0)
    gains = gains.reshape(-1, *[1] * (gradient.dim() - 1))
    return torch.fft.irfft(spectrum * gains, n=len(gradient), dim=0)
