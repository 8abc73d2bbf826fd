"""Write safetensors files, and look into quantized tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

LENGTH = 8
"""Bytes at the start of a safetensors file with the length of its JSON header, which is padded to a multiple of it."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Equal tensors and metadata give equal bytes.

    Raises:
        OSError: the file cannot be written.
    """
    # safetensors' own function writes files that only the owner can read.
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    header, end = sorted_header(data)
    with path.open("wb") as file:
        file.write(header)
        file.write(memoryview(data)[end:])


def sorted_header(data: bytes) -> tuple[bytes, int]:
    """Return the header with sorted metadata, which the library writes in random order, and its end in `data`."""
    end = LENGTH + int.from_bytes(data[:LENGTH], "little")
    header = json.loads(data[LENGTH:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text, end


def is_quantized_weight(weight: Any) -> bool:
    """Return whether a parameter holds quantized numbers: every backend stores them in a class of its own."""
    return isinstance(weight, nn.Parameter) and type(weight) is not nn.Parameter
