"""Load rewards with linear layers in bfloat16 or 4 bits. Scores are computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.quantization import LEAST_SHARE, check_quantization, quantize_linear, quantized_share
from draftune.rewards.base import Reward, sub_rewards
from draftune.rewards.online import OnlineReward
from draftune.utils.converted_linear import ConvertedLinear


def load_in_precision(reward: Reward, precision: str | None) -> Reward:
    """Load the weights of a reward and store those of its linear layers in a precision.

    Each layer converts its weight to the precision of its input in every call, so that only the weights are rounded.
    Biases, norms, convolutions and embeddings keep their precision, and so do rewards that learn. Rewards that are
    published in half precision convert their network themselves, and compute in bfloat16 too.

    Args:
        reward: A reward whose weights are not loaded yet.
        precision: "no" (float32), "bf16" or "bnb_4bit" (see `models.quantization`); None for that of each reward.

    Returns:
        The reward.

    Raises:
        DraftuneError: The backend of quantized weights is missing, or a reward has too few linear layers for it.
    """
    if precision is None:
        return reward.load_weights()
    if quantized := precision not in ("no", "bf16"):
        check_quantization(precision, "no", name="reward_precision")
    for part in sub_rewards(reward).values():
        part.precision = precision
    reward.load_weights()
    plain = [part for part in sub_rewards(reward).values() if not part.converts_itself]
    learning = {m for part in plain if isinstance(part, OnlineReward) for m in part.modules()}
    others = {m for part in sub_rewards(reward).values() if part.converts_itself for m in part.modules()}
    if precision == "bf16":
        store_in_bf16(reward, learning | others)
    elif quantized:
        quantize_linear(reward, precision, torch.float32, learning | others)
        for part in sub_rewards(reward).values():
            check_quantized(part, precision, learning)
    return reward


def store_in_bf16(reward: Reward, left_out: set[nn.Module]) -> None:
    """Round the weights of linear layers to bfloat16, in place."""
    for module in reward.modules():
        # Subclasses compute in ways of their own: torch's attention reads the weight of its output layer.
        if type(module) is nn.Linear and module not in left_out:
            module.weight.data = module.weight.data.to(torch.bfloat16)
            module.__class__ = Bf16Linear


def check_quantized(reward: Reward, precision: str, learning: set[nn.Module]) -> None:
    """Raise DraftuneError for a single reward with weights, too few of which are quantized."""
    single = len(sub_rewards(reward)) == 1 and reward not in learning
    if single and any(True for _ in reward.parameters()) and (share := quantized_share(reward)) < LEAST_SHARE:
        raise DraftuneError(
            f"reward_precision={precision} is for linear layers, and only {share:.0%} of the weights of the reward "
            f"{reward.label!r} belong to some: use no or bf16"
        )


class Bf16Linear(nn.Linear):
    """A linear layer whose frozen weight is stored in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b in the precision of x."""
        output: Tensor = ConvertedLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output
