"""Clamping of decoded pixels, with a straight-through or with the true gradient."""

from __future__ import annotations

from torch import Tensor


def clamp_unit(images: Tensor, gradient: str = "straight_through") -> Tensor:
    """Clamp `images` to [0, 1].

    Decoders overshoot on white and on black. The true gradient of a clamp is 0 at those pixels. A reward then cannot
    move a pixel back into the range, nor anything else through it. The straight-through estimator (Bengio et al.,
    2013, arXiv:1308.3432) takes a gradient of 1 instead.

    Args:
        images: of any shape.
        gradient: "straight_through" passes the gradient of every pixel unchanged. "hard" passes it where the pixel is
            within [0, 1] and sets it to 0 elsewhere.

    Returns:
        The clamped images. Their values do not depend on `gradient`.
    """
    clamped = images.clamp(0, 1)
    # The difference is exactly 0, so that the values are those of the clamp to the last bit.
    return clamped if gradient == "hard" else clamped.detach() + (images - images.detach())
