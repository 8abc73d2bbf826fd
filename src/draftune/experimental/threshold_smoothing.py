"""Thresholds with a gradient: branches, steps and rounding that are smooth to a common width.

Source: Diagonalisation SGD (Wagner, Khajwal and Ong, arXiv 2402.11752), which replaces every `if guard ≥ 0` by a
logistic curve of one width and narrows it while it trains. A width of 0 is the threshold itself, and what these
functions are outside of `smoothed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from draftune.errors import DraftuneError

WIDTH: ContextVar[float] = ContextVar("width", default=0.0)
WIDE = 1.0
"""Width from which on a rounding that is smoothed is the number itself, to a part in ten million."""
REACH = 18
"""Widths from a threshold at which float32 sees no more of it."""


@contextmanager
def smoothed(width: float) -> Iterator[None]:
    """Makes every threshold in this block smooth to a width, in units of its guard; 0 makes it hard.

    Raises DraftuneError for a width below 0.
    """
    if not width >= 0:
        raise DraftuneError(f"the width of smoothed thresholds must be at least 0, not {width}")
    token = WIDTH.set(float(width))
    try:
        yield
    finally:
        WIDTH.reset(token)


def smooth_where(guard: Tensor, yes: Tensor | float, no: Tensor | float) -> Tensor:
    """`yes` where the guard is 0 or more, else `no`: σ(guard / width) · yes + (1 − σ(guard / width)) · no.

    Shapes broadcast. Both are computed whatever the guard is, and both must be finite. Guards of several kinds should
    be divided by their own spreads, for one width to fit all.
    """
    weight = smooth_step(guard)
    return weight * yes + (1 - weight) * no


def smooth_step(x: Tensor) -> Tensor:
    """1 where x is 0 or more, else 0: σ(x / width)."""
    width = WIDTH.get()
    return torch.sigmoid(x / width) if width else (x >= 0).to(x.dtype)


def smooth_round(x: Tensor) -> Tensor:
    """x rounded, half a unit up: a smooth step at each half. From a width of 1 on it is x itself."""
    width = WIDTH.get()
    if width == 0:
        return (x + 0.5).floor()
    if width >= WIDE:
        return x
    reach = math.ceil(REACH * width)
    below = x.detach().floor()
    steps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) + 0.5
    # Those before the first of these steps are behind x for good, those after the last one not in sight.
    return below - reach + smooth_step((x - below)[..., None] - steps).sum(-1)


def width_at(step: int, first: float, power: float) -> float:
    """first · step^−power, the width at an update, the first of which is 1.

    With a learning rate that falls as 1 / step, the smoothed ascent ends where the hard reward has no slope if the
    power is below 1 / ℓ, where ℓ is how deeply smoothed guards stand inside others (as recalled from the paper; no
    published code states it).
    """
    return first * step**-power
