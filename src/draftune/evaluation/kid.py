"""The kernel inception distance between two sets of images."""

from __future__ import annotations

from torch import Tensor


def kid(first: Tensor, second: Tensor) -> float:
    """Compute the unbiased squared maximum mean discrepancy of two sets of features with KID's polynomial kernel.

    k(x, y) = (x · y / D + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Bińkowski et al., 2018, arXiv:1801.01401, Section 4. The estimate can be negative for similar sets.

    Args:
        first: Features [N, D], N at least 2.
        second: Features [M, D], M at least 2.
    """
    # On the CPU, since MPS has no float64.
    x, y = first.cpu().double(), second.cpu().double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> float:
        values = kernel(a, a)
        return float(values.sum() - values.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())
