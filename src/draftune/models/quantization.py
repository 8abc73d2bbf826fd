"""Move networks whose weights are quantized."""

from __future__ import annotations

import torch
from torch import nn

from draftune.utils.tensors import is_quantized_weight


def is_quantized(network: nn.Module) -> bool:
    """Return whether diffusers or transformers loaded a network with quantized weights."""
    return bool(getattr(network, "is_quantized", False))


def move(network: nn.Module, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Move a network to a device and cast its weights; quantized weights are moved only, and keep their layout."""
    if not is_quantized(network):
        network.to(device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
        return
    if next(network.parameters()).device != device:
        network.to(device=device)
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point() and not is_quantized_weight(tensor):
                    tensor.data = tensor.data.to(dtype)
