"""Devices, precisions and memory formats of networks."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from draftune.errors import DraftuneError

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device(device: str = "auto") -> torch.device:
    """Return the torch device of a `device` setting: "auto", "cpu", "mps", "cuda" or "cuda:1".

    "auto" is the CUDA (or ROCm) GPU if there is one, else MPS, else the CPU.

    Raises:
        DraftuneError: this machine has no such device.
    """
    count, mps = cuda_devices(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if count else "mps" if mps else "cpu")
    chosen = torch.device(device)
    if {"cuda": (chosen.index or 0) < count, "mps": mps}.get(chosen.type, True):
        return chosen
    raise DraftuneError(f"device={device} is not available (CUDA devices: {count}, MPS: {mps}); use auto or cpu")


def cuda_devices() -> int:
    """Return the number of usable CUDA (or ROCm) GPUs: torch also counts GPUs whose driver is too old for it."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def fork_rng() -> AbstractContextManager[None]:
    """Restore torch's random generators of the CPU and all GPUs after the block."""
    return torch.random.fork_rng(list(range(cuda_devices())))


def layout_of(network: nn.Module) -> torch.memory_format:
    """Return the memory format of a network: channels last, or the usual one if it has 3-D convolutions.

    Convolutions are faster with channels last (docs/explanation/memory-and-time.md).
    """
    # PyTorch has this format for weights with four axes only.
    deep = any(parameter.ndim == 5 for parameter in network.parameters())
    return torch.contiguous_format if deep else torch.channels_last
