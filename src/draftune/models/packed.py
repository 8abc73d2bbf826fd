"""Linear layers with the sizes of quantized ones, to count memory without a backend and without arithmetic."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

BLOCK, SCALES = 64, 256
"""bitsandbytes' NF4 has one scale for each 64 weights, in 8 bits, and one float32 scale for each 256 of these."""
TABLES = 4 * (16 + 256 + 1)
"""The bytes of a layer's tables in bitsandbytes' NF4: the values of weights, those of scales, and an offset."""


def packed_bytes(quantization: str, rows: int, columns: int) -> int:
    """Return the bytes that a backend stores a weight matrix in: its numbers and their scales."""
    count = rows * columns
    if quantization == "bnb_4bit":
        blocks = -(-count // BLOCK)
        return -(-count // 2) + blocks + 4 * -(-blocks // SCALES) + TABLES
    # One float32 scale for each row, and with torchao's integers one zero point.
    return count + rows * (5 if quantization == "torchao_int8" else 4)


class PackedLinear(nn.Linear):
    """A linear layer whose weight has the size of a quantized one, and no values.

    Each call makes a weight matrix in the precision of the computation, as the backends do for a matrix product in the
    forward and in the backward pass. bitsandbytes makes it anew in the backward pass; torchao's is kept until then.
    """

    keeps = False
    dtype = torch.float32

    def unpacked(self) -> Tensor:
        """Return a weight matrix without values."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if self.keeps:
            return linear(x, self.unpacked(), self.bias)
        output: Tensor = Product.apply(x.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return output.to(x.dtype)


class Product(torch.autograd.Function):
    """The product with a weight matrix that is unpacked in each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.unpacked(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked().to(gradient.dtype), None


def pack(network: nn.Module, quantization: str, dtype: torch.dtype, left_out: Collection[nn.Module] = ()) -> None:
    """Replace the linear layers of a network with fake tensors by packed ones, except those that stay in float32."""
    whole = getattr(network, "_keep_in_fp32_modules", None) or ()
    for name, layer in network.named_modules():
        if type(layer) is not nn.Linear or layer in left_out or any(part in name.split(".") for part in whole):
            continue
        size = packed_bytes(quantization, layer.out_features, layer.in_features)
        layer.weight = nn.Parameter(layer.weight.new_empty(size, dtype=torch.uint8), requires_grad=False)
        layer.__class__ = PackedLinear
        assert isinstance(layer, PackedLinear)
        layer.keeps, layer.dtype = quantization.startswith("torchao"), dtype
