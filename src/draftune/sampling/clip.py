"""Clipping of the predicted x_0 in pixel space."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClipSample:
    """Clip the predicted x_0 of pixel-space models (`clip_sample` and `thresholding` in diffusers).

    Attributes:
        limit: x_0 is clipped to [-limit, limit].
        quantile: If set, apply dynamic thresholding (Saharia et al., 2022, arXiv:2205.11487, Sec. 2.3). Each image is
            clipped at this quantile of its absolute values, bounded to [1, limit], and divided by that bound.
    """

    limit: float
    quantile: float | None = None

    def __call__(self, clean: Tensor) -> Tensor:
        """Return the clipped x_0, `[B, C, H, W]`."""
        if self.quantile is None:
            return clean.clamp(-self.limit, self.limit)
        bound = clean.abs().flatten(1).quantile(self.quantile, 1).clamp(1, self.limit)[:, None, None, None]
        return clean.clamp(-bound, bound) / bound

    def grad_mask(self, clean: Tensor) -> Tensor:
        """Return a mask of the values of an already clipped x_0 that carry gradient. For `quantile=None` only."""
        return clean.abs() < self.limit
