"""Gradient checkpointing of one denoiser call: only its input is stored, and the backward pass repeats the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Compute `function(x)` with gradient checkpointing (Chen et al., 2016, arXiv:1604.06174).

    The forward pass builds no graph and stores only `x`; the backward pass calls `function` again. Unlike
    `torch.utils.checkpoint`, the forward pass runs under `no_grad`, so that blocks inside `function` that are
    checkpointed too store nothing then. Second derivatives are not supported.

    Args:
        function: Must be deterministic. It must set any context that it depends on itself, such as autocast: the
            backward pass does not restore it.
        x: The input.
        parameters: The trainable tensors that `function` depends on. No other tensor except `x` gets a gradient.

    Returns:
        `function(x)`.
    """
    result: Tensor = Recomputed.apply(function, x, *parameters)  # type: ignore[no-untyped-call]
    return result


class Recomputed(torch.autograd.Function):
    """The autograd function behind `recomputed`."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        """Call `function(x)` without a graph (autograd functions run under `no_grad`)."""
        ctx.function = function
        ctx.save_for_backward(x, *parameters)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Call `function` again with a graph and backpropagate through that graph."""
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(needed[0]), *parameters]
        with torch.enable_grad():
            result = ctx.function(inputs[0])
        targets = [value for value, is_needed in zip(inputs, needed, strict=True) if is_needed]
        gradients = iter(torch.autograd.grad(result, targets, grad_outputs, allow_unused=True))
        return None, *(next(gradients) if is_needed else None for is_needed in needed)
