"""Tensors in files: safetensors and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

LENGTH = 8
"""Bytes at the start of a safetensors file that hold the length of its JSON header; headers end at multiples of it."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file: equal tensors and metadata give equal bytes.

    Raises:
        OSError: it can't be written, such as on a full disk.
    """
    # The library's own way to write a file lets nobody but its owner read it.
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    header, end = sorted_header(data)
    with path.open("wb") as file:
        file.write(header)
        file.write(memoryview(data)[end:])


def sorted_header(data: bytes) -> tuple[bytes, int]:
    """Return the header of a safetensors file with its metadata sorted, and where the tensors begin in `data`.

    The library writes the metadata in a random order.
    """
    end = LENGTH + int.from_bytes(data[:LENGTH], "little")
    header = json.loads(data[LENGTH:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text, end
