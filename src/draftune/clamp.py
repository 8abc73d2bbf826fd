"""Clamping that does not cut the gradient."""

from __future__ import annotations

from torch import Tensor


def clamp_unit(images: Tensor) -> Tensor:
    """`images` clamped to [0, 1]; the gradient passes as if they were not.

    Decoders overshoot on white and on black, resizing too. A hard clamp would leave those pixels without a gradient.
    """
    return images + (images.clamp(0, 1) - images).detach()
