"""What counts as too little memory: what allocators say, and nothing that merely holds the word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from draftune.cli.main import main
from draftune.errors import DraftuneError, out_of_memory
from draftune.rewards import load_reward
from helpers.errors import mentions, raises

# The last line of what each of torch's allocators raises.
SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.07 GB, other allocations: 832.88 MB)"),
    RuntimeError("Invalid buffer size: 24.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,)"),
    MemoryError(),
]
OTHERS = [
    ValueError("bad memory layout"),
    RuntimeError("the memory bank is empty"),
    RuntimeError("expected memory format channels_last"),
    KeyError("memory"),
    OSError("Cannot allocate memory"),
]


class Raises:
    """A reward that raises what it is given."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", SAID, ids=str)
def test_memory_that_ran_out_is_not_the_rewards_fault(error: BaseException) -> None:
    assert out_of_memory(error)
    with pytest.raises(type(error)) as caught:
        load_reward(Raises(error))(torch.rand(1, 3, 8, 8), ["a cat"])
    assert caught.value is error


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_an_error_that_speaks_of_memory_is_one_line(error: BaseException) -> None:
    assert not out_of_memory(error)
    with raises(DraftuneError, type(error).__name__):
        load_reward(Raises(error))(torch.rand(1, 3, 8, 8), ["a cat"])


def test_the_allocator_of_this_machine_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


FILE = """
def full(images, prompts):
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [("MemoryError('8 GiB')", "out of memory"), ("ValueError('bad memory layout')", "bad memory layout")],
)
def test_both_are_one_line_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: str, said: str
) -> None:
    (tmp_path / "r.py").write_text(FILE.format(error=error))
    picture = tmp_path / "a.png"
    from PIL import Image

    Image.new("RGB", (8, 8)).save(picture)
    assert main(["score", str(picture), "--reward", f"{tmp_path}/r.py:full", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert mentions(line, said)
