"""Score a few inputs at a time, with their gradient, so that memory does not grow with the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Score = Callable[[Tensor, slice], Tensor]
"""Scores some of the inputs; the slice says which rows of the batch they are. Returns one number for each."""


def chunked_scores(score: Score, inputs: Tensor, size: int, scale: float = 1.0) -> Tensor:
    """Score inputs [B, ...], `size` at a time; returns [B]. Each score must depend on its own input only.

    If the inputs need a gradient, it is computed chunk by chunk in the forward pass, and each chunk's graph is freed at
    once. So the memory is that of one chunk's graph, nothing is computed twice, and there is no second derivative.

    Args:
        score: Scores one chunk.
        inputs: The batch.
        size: Inputs in a chunk.
        scale: Loss scale: multiplies the scores before the backward pass and divides the gradients after it, so that
            small gradients do not underflow in float16.
    """
    chunks = [slice(start, start + size) for start in range(0, len(inputs), size)]
    if torch.is_grad_enabled() and inputs.requires_grad:
        scores: Tensor = ChunkedScores.apply(inputs, score, chunks, scale)  # type: ignore[no-untyped-call]
        return scores
    return torch.cat([score(inputs[rows], rows) for rows in chunks])


class ChunkedScores(torch.autograd.Function):
    """Computes scores, and the gradient of each with respect to its input, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, score: Score, chunks: list[slice], scale: float) -> Tensor:
        scores, gradients = [], []
        for rows in chunks:
            some = inputs[rows].detach().requires_grad_()
            with torch.enable_grad():
                chunk_scores = score(some, rows)
                (gradient,) = torch.autograd.grad(chunk_scores.sum() * scale, some, allow_unused=True)
            scores.append(chunk_scores.detach())
            gradients.append(torch.zeros_like(some) if gradient is None else gradient / scale)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * outer[0].reshape(-1, *[1] * (gradients.dim() - 1)), None, None, None
