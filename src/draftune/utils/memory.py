"""Measure the peak memory of a function."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Count the memory of CPU tensors that are created in a block.

    Attributes:
        live: Bytes of the storages that were created and still exist.
        peak: Maximum of `live`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view of an existing storage, such as a transposed weight, takes no memory.
        existing = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if tensor.device.type == "cpu" and storage._cdata not in existing:
                self.add(storage)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key: int, size: int) -> None:
        """Stop counting a storage that was freed."""
        self.seen.discard(key)
        self.live -= size


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in an operation's arguments or results."""
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Return the peak memory of tensors created in `function` in bytes; on CUDA as the allocator counts them."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        function()
    return memory.peak
