"""Gradient checkpointing: store only the inputs of a denoiser call or block, and repeat it in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

WHOLE_CALLS, BLOCKS = ("denoiser", "both"), ("blocks", "both")


def checkpoint_blocks(network: nn.Module, enabled: bool) -> None:
    """Enable or disable gradient checkpointing of the blocks of a diffusers network; others are left unchanged."""
    from diffusers import ModelMixin

    if isinstance(network, ModelMixin) and network._supports_gradient_checkpointing:
        network.enable_gradient_checkpointing(checkpoint_block) if enabled else network.disable_gradient_checkpointing()


def checkpoint_call(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Compute `function(x)` with gradient checkpointing (Chen et al., 2016, arXiv:1604.06174).

    The forward pass builds no graph and stores only `x`; the backward pass calls `function` again. Unlike
    `torch.utils.checkpoint`, the forward pass runs under `no_grad`, so that blocks inside `function` that are
    checkpointed too store nothing then. Second derivatives are not supported.

    Args:
        function: Must be deterministic. It must set any context that it depends on itself, such as autocast: the
            backward pass does not restore it.
        x: The input.
        parameters: The trainable tensors that `function` depends on. No other tensor except `x` gets a gradient.
        context: Makes the context of both calls of `function` and of its backward pass, in which blocks are repeated.

    Returns:
        `function(x)`.
    """
    result: Tensor = CheckpointCall.apply(function, context, x, *parameters)  # type: ignore[no-untyped-call]
    return result


class CheckpointCall(torch.autograd.Function):
    """The autograd function behind `checkpoint_call`."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor], Tensor],
        context: Callable[[], AbstractContextManager[None]],
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        """Call `function(x)` without a graph (autograd functions run under `no_grad`)."""
        ctx.function, ctx.context = function, context
        ctx.save_for_backward(x, *parameters)
        with context():
            return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Call `function` again with a graph and backpropagate through that graph."""
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        inputs = [x.detach().requires_grad_(needed[0]), *parameters]
        targets = [value for value, is_needed in zip(inputs, needed, strict=True) if is_needed]
        with ctx.context():
            with torch.enable_grad():
                result = ctx.function(inputs[0])
            gradients = iter(torch.autograd.grad(result, targets, grad_outputs, allow_unused=True))
        return None, None, *(next(gradients) if is_needed else None for is_needed in needed)


def checkpoint_block(block: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call one block of a network with gradient checkpointing, for `enable_gradient_checkpointing` of diffusers.

    The blocks must be deterministic: the random state is not restored.
    """
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **options)


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Call these blocks with gradient checkpointing inside this context, for networks that have no support for it.

    The backward pass, which may come after this context, calls their original `forward`.
    """
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint_block, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
