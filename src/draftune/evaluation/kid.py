"""How far a set of pictures is from another, as sets: no picture has a partner."""

from __future__ import annotations

from torch import Tensor


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """The squared distance of two distributions, estimated without bias from their features [N, D] and [M, D].

    The maximum mean discrepancy with the kernel (x · y + 1)^3, as KID has it (Bińkowski et al., arXiv 1801.01401) with
    x · y / D for features that are no unit vectors. It may be less than 0 where the sets are alike. N and M at least 2.
    """
    # On the CPU, since MPS has no float64.
    a, b = first.cpu().double(), second.cpu().double()

    def within(x: Tensor) -> float:
        kernel = (x @ x.T + 1) ** 3
        return float(kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * float(((a @ b.T + 1) ** 3).mean())
