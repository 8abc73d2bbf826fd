"""Linear layers whose frozen weight is moved and converted for each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class ConvertedLinear(torch.autograd.Function):
    """W x + b with W moved to the device of x and converted to its precision, in the forward and the backward pass.

    A graph holds W as it is stored. Autograd's own product would hold the converted W until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        output = linear(x, moved(weight, x), bias)
        # autograd forbids to change a view that such a function returns in place, as OWL-ViT does.
        return output.clone() if output._is_view() else output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad_outputs[0] @ moved(weight, grad_outputs[0]), None, None


def moved(weight: Tensor, x: Tensor) -> Tensor:
    """Return a weight on the device and in the precision of x."""
    return weight.to(x.device, non_blocking=True).to(x.dtype)  # converted by the device
