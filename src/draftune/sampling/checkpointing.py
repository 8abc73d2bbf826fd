"""A call that keeps its input alone and is made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """`function(x)`, with gradients by x and by those of `parameters` that it depends on, and no second derivative.

    The first call builds no graph, where torch's own checkpoint builds one to throw it away. What the function reads
    besides, such as autocast, it must set itself, and random numbers it must not draw.
    """
    result: Tensor = Recomputed.apply(function, x, *parameters)  # type: ignore[no-untyped-call]
    return result


class Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x, *parameters)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(needed[0]), *parameters]
        with torch.enable_grad():
            result = ctx.function(inputs[0])
        wanted = [value for value, wants in zip(inputs, needed, strict=True) if wants]
        found = iter(torch.autograd.grad(result, wanted, outer, allow_unused=True))
        return None, *(next(found) if wants else None for wants in needed)
