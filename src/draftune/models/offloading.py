"""Store a frozen network's linear layers in main memory, and move each to the device for its calls."""

from __future__ import annotations

import torch
from torch import nn

from draftune.errors import DraftuneError


def offload_layers(network: nn.Module, device: torch.device) -> None:
    """Apply diffusers' group offloading to each linear layer, and move everything else to the device.

    Call it before a LoRA is added, whose layers then stay on the device. Autograd keeps a layer's copy on the device as
    long as a graph holds it. With gradient checkpointing of blocks, that is one block at a time: when the backward pass
    repeats a block, its layers are moved again.

    Other layers are not offloaded: autograd saves the parameter itself of a norm, and would find it in main memory.

    Args:
        network: A network on the CPU.
        device: Where its layers compute.

    Raises:
        DraftuneError: The device shares the main memory.
    """
    from diffusers.hooks import apply_group_offloading

    if device.type == "mps":
        raise DraftuneError("offload has no use on MPS, which computes in main memory: leave it out")
    for module in network.modules():
        if isinstance(module, nn.Linear):
            apply_group_offloading(module, device, offload_device=torch.device("cpu"), offload_type="leaf_level")
            continue
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    tensor.data = tensor.data.to(device)
