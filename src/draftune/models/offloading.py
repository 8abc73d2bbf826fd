"""Store a frozen network's linear layers in main memory, and move each weight to the device for its products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.utils.converted_linear import ConvertedLinear
from draftune.utils.weightless import main_memory


def offload_layers(network: nn.Module, device: torch.device) -> None:
    """Keep the weights of a network's linear layers in main memory, and move everything else to the device.

    Call it before a LoRA is added, whose layers then stay on the device. Hooks that move a layer's parameters, such as
    diffusers' group offloading, save less: autograd holds the copy on the device until the backward pass.

    Args:
        network: A network on the CPU. Its trainable layers, of a LoRA, move to the device.
        device: Where its layers compute.

    Raises:
        DraftuneError: The device shares the main memory.
    """
    if device.type == "mps":
        raise DraftuneError("offload has no use on MPS, which computes in main memory: leave it out")
    for module in network.modules():
        # Subclasses may use their weight in other ways, so it moves to the device.
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = OffloadedLinear
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if isinstance(module, OffloadedLinear) and name == "weight":
                    weight = module.weight.data.to(main_memory())
                    # From page-locked memory, a copy to a GPU does not make the CPU wait.
                    weight = weight.pin_memory() if device.type == "cuda" else weight
                    module.weight = nn.Parameter(weight, requires_grad=False)
                elif tensor is not None:
                    tensor.data = tensor.data.to(device)


class OffloadedLinear(nn.Linear):
    """A linear layer whose weight is in main memory; both passes copy it to the device, and no graph holds the copy."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b on the device and, as autocast does, in the precision of autocast."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        output: Tensor = ConvertedLinear.apply(x.to(dtype), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output
