"""Scores with their gradients at once: against plain autograd, and in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftune.rewards.chunked import chunked_scores
from draftune.utils.memory import PeakMemory

WEIGHTS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def score(x: Tensor, part: slice) -> Tensor:
    """Where a score stands in its batch matters too."""
    return (x.flatten(1) @ WEIGHTS).tanh().square().sum(1) * torch.arange(1.0, 8, dtype=x.dtype)[part]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_values_and_gradients_are_those_of_plain_autograd(size: int, scale: float) -> None:
    given = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
    plain = given.clone().requires_grad_()
    (score(plain.sin(), slice(None)) * weights).sum().backward()
    ours = given.clone().requires_grad_()
    scores = chunked_scores(score, ours.sin(), size, scale)
    (scores * weights).sum().backward()
    assert torch.allclose(scores, score(given.sin(), slice(None)), rtol=1e-14)
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-12)
    with torch.no_grad():
        assert torch.allclose(chunked_scores(score, given.sin(), size), scores, rtol=1e-14)


def test_small_gradients_survive_float16() -> None:
    def halved(x: Tensor, part: slice) -> Tensor:
        return (x.half() * 1e-3).float().sum(1) * 1e-7

    x = torch.ones(2, 4, requires_grad=True)
    chunked_scores(halved, x, 1).sum().backward()
    assert not x.grad.any()
    x.grad = None
    chunked_scores(halved, x, 1, scale=2.0**16).sum().backward()
    assert torch.allclose(x.grad, torch.full((2, 4), 1e-10), rtol=1e-2)


def test_one_graph_at_a_time() -> None:
    def deep(x: Tensor, part: slice) -> Tensor:
        for _ in range(20):
            x = x.sin()
        return x.sum(1)

    peaks = {}
    for size in (1, 8):
        x = torch.ones(8, 1000, requires_grad=True)
        with PeakMemory() as memory:
            chunked_scores(deep, x, size).sum().backward()
        peaks[size] = memory.peak / x.nbytes
    assert peaks[8] > 18
    assert peaks[1] < 6


def test_no_second_derivative() -> None:
    x = torch.ones(1, 12, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(chunked_scores(score, x, 1).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.sum().backward()
