"""FSDP 2: each process stores a part of the frozen networks; a block is gathered when it is called."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from draftune.errors import DraftuneError

if TYPE_CHECKING:
    from draftune.models import DiffusionModel


def fsdp_requested() -> bool:
    """Return whether accelerate's launcher requested FSDP. Raises DraftuneError for options that are not supported."""

    def option(name: str, default: str) -> str:
        return os.environ.get(name, default).lower()

    if option("ACCELERATE_USE_FSDP", "false") != "true":
        return False
    if option("FSDP_VERSION", "1") != "2":
        raise DraftuneError("FSDP 1 is not supported: give accelerate --fsdp_version 2")
    if tuple(map(int, version("torch").split(".")[:2])) < (2, 7):
        raise DraftuneError(f"FSDP 2 needs torch 2.7 or later, not {version('torch')}")
    if option("FSDP_OFFLOAD_PARAMS", "false") == "true":
        raise DraftuneError("offloading by FSDP is not supported: leave out accelerate's --fsdp_offload_params")
    return True


def shard(model: DiffusionModel, device: torch.device, count: int) -> None:
    """Shard the denoiser and the text encoders over the processes, in place, and move the rest to the device.

    The trainable LoRA stays whole in every process. So does the decoder, which is small and is not called as a module.
    Text encoders whose prompts are cached stay where they are.

    Args:
        model: The model, on the CPU.
        device: This process's device.
        count: Number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import PreTrainedModel

    mesh = init_device_mesh(device.type, (count,))
    for part in model.all_modules:
        if model.embeddings is not None and model.embeddings.holds(part):
            continue
        if part is model.denoiser or isinstance(part, PreTrainedModel):
            trained = {parameter for parameter in part.parameters() if parameter.requires_grad}
            for parameter in part.parameters():
                parameter.data = parameter.data.to(device) if parameter in trained else parameter.data.contiguous()
            kind = type(part)
            for module in [*blocks(part), part]:
                # By default, FSDP 2 does not reshard the root after a forward pass (see `reshard`).
                fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
                module.register_forward_pre_hook(contiguous, with_kwargs=True)
            if part is not model.denoiser:
                part.__class__ = kind  # transformers recognizes by its class which hidden states it can return
        else:
            part.to(device)


def reshard(model: DiffusionModel) -> None:
    """Reshard the blocks that a backward pass prefetched and did not use.

    Otherwise a process that reads its weights to save them would reshard them without the others, and then wait for
    the others in the next call.
    """
    for module in model.denoiser.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def contiguous(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return a module's inputs with contiguous tensors.

    FSDP 2 changes the strides of inputs that need a gradient, but not when checkpointing recomputes the call. A linear
    layer may then save other tensors in the recomputation, and the backward pass fails.
    """

    def one(value: Any) -> Any:
        return value.contiguous() if isinstance(value, torch.Tensor) else value

    return tree_map(one, args), tree_map(one, kwargs)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the modules that are gathered as a unit, inner ones first: those in the class's `_no_split_modules`."""
    names = getattr(network, "_no_split_modules", None) or ()
    return [module for module in network.modules() if type(module).__name__ in names and module is not network][::-1]
