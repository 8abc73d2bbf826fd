"""Injection of random values: a test says what is drawn, and does not repeat the order in which the code draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def injected(**values: list[Any]) -> Iterator[list[tuple[int, int]]]:
    """Let `torch.randint`, `torch.randperm` or `torch.randn` return these values, one for each call.

    Every value must be used, in the range and the shape that the code asks for, and the code must pass a generator.
    Functions that are not named draw as usual.

    Yields:
        The ranges [low, high) that `torch.randint` was asked for.
    """
    left = {name: list(given) for name, given in values.items()}
    ranges: list[tuple[int, int]] = []

    def randint(*bounds: Any, generator: torch.Generator) -> Tensor:
        low, high, size = bounds if len(bounds) == 3 else (0, *bounds)
        ranges.append((low, high))
        value = torch.as_tensor(left["randint"].pop(0))
        assert (low <= value).all(), (low, value)
        assert (value < high).all(), (high, value)
        assert value.ndim == 0 or value.shape == size
        return value.expand(size)

    def randperm(count: int, generator: torch.Generator) -> Tensor:
        value = left["randperm"].pop(0)
        assert sorted(value) == list(range(count))
        return torch.tensor(value)

    def randn(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
        value = torch.as_tensor(left["randn"].pop(0), dtype=dtype)
        assert value.shape == shape
        return value

    fakes = {"randint": randint, "randperm": randperm, "randn": randn}
    with ExitStack() as stack:
        for name in values:
            stack.enter_context(patch.object(torch, name, fakes[name]))
        yield ranges
    assert not any(left.values()), f"not drawn: {left}"


def noises(count: int, like: Tensor) -> list[Tensor]:
    """Return noises in the shape and type of a tensor."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(like.shape, generator=generator, dtype=like.dtype) for _ in range(count)]
