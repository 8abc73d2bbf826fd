"""Store the linear layers of reward models in bfloat16, and compute with them in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from draftune.rewards.base import Reward, sub_rewards
from draftune.rewards.online import OnlineReward


def store_in_bf16(reward: Reward) -> None:
    """Round the weights of a reward's frozen linear layers to bfloat16, in place, which halves their memory.

    Each layer converts its weight to the precision of its input in every call, so that only the weights are rounded.
    Biases, norms, convolutions and embeddings keep their precision, and so do rewards that learn.
    """
    online = [part for part in sub_rewards(reward).values() if isinstance(part, OnlineReward)]
    learning = {module for part in online for module in part.modules()}
    for module in reward.modules():
        # Subclasses compute in ways of their own: torch's attention reads the weight of its output layer.
        if type(module) is nn.Linear and module not in learning:
            module.weight.data = module.weight.data.to(torch.bfloat16)
            module.__class__ = Bf16Linear


class Bf16Linear(nn.Linear):
    """A linear layer whose frozen weight is stored in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b in the precision of x."""
        output: Tensor = ConvertedLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class ConvertedLinear(torch.autograd.Function):
    """W x + b with W converted in the forward and again in the backward pass, so that no graph holds a converted W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        output = linear(x, weight.to(x.dtype), bias)
        # autograd forbids to change a view that such a function returns in place, as OWL-ViT does.
        return output.clone() if output._is_view() else output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad_outputs[0] @ weight.to(grad_outputs[0].dtype), None, None
