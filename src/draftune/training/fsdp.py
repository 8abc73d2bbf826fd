"""FSDP2: each process holds its part of the frozen networks, whose layers are put together where they are called."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from draftune.errors import DraftuneError

if TYPE_CHECKING:
    from draftune.models import Model


def wants_shards() -> bool:
    """Whether accelerate was told to use FSDP. Raises DraftuneError for what of it is not supported."""

    def said(name: str, default: str) -> str:
        return os.environ.get(name, default).lower()

    if said("ACCELERATE_USE_FSDP", "false") != "true":
        return False
    if said("FSDP_VERSION", "1") != "2":
        raise DraftuneError("FSDP 1 is not supported: give accelerate --fsdp_version 2")
    if tuple(map(int, version("torch").split(".")[:2])) < (2, 7):
        raise DraftuneError(f"FSDP 2 wants torch 2.7 or later, and this is {version('torch')}")
    if said("FSDP_OFFLOAD_PARAMS", "false") == "true":
        raise DraftuneError("offloading by FSDP is not supported: leave out accelerate's --fsdp_offload_params")
    return True


def shard(model: Model, device: torch.device, count: int) -> None:
    """Spreads the denoiser and the text encoders over the processes, in place; all else is moved to the device.

    What carries a gradient, the LoRA, stays whole in each. The decoder does as well: it is small, and not called as a
    module.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import PreTrainedModel

    mesh = init_device_mesh(device.type, (count,))
    for part in model.networks:
        if part is model.denoiser or isinstance(part, PreTrainedModel):
            kept = {parameter for parameter in part.parameters() if parameter.requires_grad}
            for parameter in part.parameters():
                parameter.data = parameter.data.to(device) if parameter in kept else parameter.data.contiguous()
            kind = type(part)
            for module in [*blocks(part), part]:
                # The root too frees its layers after each call, which FSDP2 does not by default (see `put_back`).
                fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
                module.register_forward_pre_hook(contiguous, with_kwargs=True)
            if part is not model.denoiser:
                part.__class__ = kind  # by which transformers knows whose hidden states can be asked for
        else:
            part.to(device)


def put_back(model: Model) -> None:
    """Frees the layers that a backward pass gathered ahead of their use and then did not use.

    Else a process that looks at its weights, to save them, would put them back alone, and be alone in gathering them
    when they are called next.
    """
    for module in model.denoiser.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def contiguous(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The same inputs in one layout.

    FSDP2 passes them on with other strides where it waits for their gradient, and does not where they are computed
    again: a linear layer may then keep other tensors, and the backward pass fails.
    """

    def one(value: Any) -> Any:
        return value.contiguous() if isinstance(value, torch.Tensor) else value

    return tree_map(one, args), tree_map(one, kwargs)


def blocks(network: nn.Module) -> list[nn.Module]:
    """What is put together at once, inner ones first: what its class says not to split, or else the whole network."""
    names = getattr(network, "_no_split_modules", None) or ()
    return [module for module in network.modules() if type(module).__name__ in names and module is not network][::-1]
