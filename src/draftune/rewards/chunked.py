"""Scores with their gradients, a few inputs at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Score = Callable[[Tensor, slice], Tensor]
"""Some of the inputs, and which of all they are, to one number for each."""


def at_once(score: Score, inputs: Tensor, size: int, scale: float = 1.0) -> Tensor:
    """The scores [B] of inputs [B, …], of `size` at a time; each score must depend on its own input alone.

    Where a gradient is wanted, that of each part is taken in the forward pass and its graph is let go: the memory is
    that of one part's graph, and nothing is computed twice. On its way back it is multiplied by `scale`, which keeps
    what is small from vanishing in float16, and at the inputs divided by it. There is no second derivative.
    """
    parts = [slice(start, start + size) for start in range(0, len(inputs), size)]
    if torch.is_grad_enabled() and inputs.requires_grad:
        scores: Tensor = ScoreWithGradient.apply(inputs, score, parts, scale)  # type: ignore[no-untyped-call]
        return scores
    return torch.cat([score(inputs[part], part) for part in parts])


class ScoreWithGradient(torch.autograd.Function):
    """Scores and the gradient of each by its input."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, score: Score, parts: list[slice], scale: float) -> Tensor:
        scores, gradients = [], []
        for part in parts:
            some = inputs[part].detach().requires_grad_()
            with torch.enable_grad():
                found = score(some, part)
                (gradient,) = torch.autograd.grad(found.sum() * scale, some, allow_unused=True)
            scores.append(found.detach())
            gradients.append(torch.zeros_like(some) if gradient is None else gradient / scale)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * outer[0].reshape(-1, *[1] * (gradients.dim() - 1)), None, None, None
