"""The processes of a distributed run, with plain torch.distributed. Importing this module does not import torch."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from draftune.errors import DraftuneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T", bound="Sequence[Any] | Tensor")


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes of its launcher: (0, 1) without a launcher."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    return int(os.environ.get("RANK") or 0) if count > 1 else 0, count


class SaidByMainError(DraftuneError):
    """An error that process 0 raises and prints too."""


def shutdown() -> None:
    """End the process group of a launcher. Call it last: the process will exit with code 0.

    A thread of gloo that frees a tensor while Python shuts down aborts the process with "terminate called without an
    active exception", and the launcher then kills the other processes. So the process exits before Python shuts down.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        atexit.register(exit_at_once)


def exit_at_once() -> None:
    """Exit without the shutdown of Python, with all output written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def message_for_rank(error: DraftuneError) -> str | None:
    """Return what this process prints of an error: process 0 all, the others what process 0 cannot know."""
    index, _ = rank_and_world_size()
    if index == 0:
        return str(error)
    distributed = sys.modules.get("torch.distributed")
    # Before the process group exists, all processes of a machine fail alike, since they read the same files.
    alike = distributed is None or not distributed.is_initialized()
    if isinstance(error, SaidByMainError) or (alike and os.environ.get("LOCAL_RANK") != "0"):
        return None
    return f"process {index}: {error}"


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether an error was raised because another process of the run has ended."""
    from torch import distributed

    known = isinstance(error, distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
    return rank_and_world_size()[1] > 1 and known


@dataclass(frozen=True)
class Processes:
    """This process and the collectives that it shares with the others. A single process holds everything.

    All processes must call the same collectives (`gather`, `mean_`, `any`, `broadcast`, `gather_strings`,
    `raise_on_all_ranks`) in the same order. A collective inside a block of `raise_on_all_ranks` raises RuntimeError,
    with one process too: it would hang if another process had left the block with an error.

    Attributes:
        index: Rank of this process; process 0 is the main process.
        count: Number of processes.
        device: Device on which collectives run.
    """

    index: int = 0
    count: int = 1
    device: torch.device | str = "cpu"
    blocks: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """An item while this process is inside a block of `raise_on_all_ranks`."""

    @property
    def main(self) -> bool:
        """Return whether this process writes files and prints."""
        return self.index == 0

    def shard(self, values: T) -> T:
        """Return this process's part of values that all processes hold; their number is a multiple of `count`."""
        size = len(values) // self.count
        own: Any = values[self.index * size : (self.index + 1) * size]
        return own

    def shard_padded(self, values: list[Any]) -> list[Any]:
        """Return this process's part of any number of values, at least 1; the last one is repeated as padding."""
        return self.shard(values + values[-1:] * (-len(values) % self.count))

    def gather(self, own: Tensor) -> Tensor:
        """Concatenate the tensors [N, …] of all processes, which have the same shape, to [count * N, …]."""
        self.check_outside_block()
        if self.count == 1:
            return own
        import torch
        from torch import distributed

        part = own.detach().to(self.device).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.count)]
        distributed.all_gather(parts, part)
        return torch.cat(parts).to(own.device)

    def mean_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over the processes, in place. A gradient that is None in all processes stays None."""
        self.check_outside_block()
        if self.count == 1:
            return
        import torch
        from torch import distributed

        known = list(parameters)
        # One message: all gradients, then a flag for each that tells whether this process has one.
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in known]
            + [torch.tensor([p.grad is not None for p in known], device=known[0].device, dtype=known[0].dtype)]
        )
        distributed.all_reduce(flat)
        flat /= self.count
        *gradients, flags = flat.split([*(p.numel() for p in known), len(known)])
        for parameter, gradient, flag in zip(known, gradients, flags.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).clone() if flag else None

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        import torch

        return bool(self.gather(torch.tensor([flag], dtype=torch.uint8)).any())

    def broadcast(self, value: Any) -> Any:
        """Broadcast a JSON value from process 0, such as a measurement whose last digits differ between processes."""
        self.check_outside_block()
        return json.loads(self.gather_strings(json.dumps(value))[0]) if self.count > 1 else value

    def gather_strings(self, own: str) -> list[str]:
        """Return the texts of all processes. They are sent as bytes, since unpickling could run code."""
        import torch

        encoded = own.encode()
        sizes = self.gather(torch.tensor([len(encoded)])).tolist()
        # With one byte more, since NCCL does not send empty tensors.
        padded = torch.tensor(list(encoded.ljust(max(sizes) + 1, b"\0")), dtype=torch.uint8)
        rows = self.gather(padded[None]).tolist()
        return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise a DraftuneError of one process in all processes, at the end of the block, with the same message.

        No process leaves the block alone, so that none waits forever for one that has failed.
        """
        self.check_outside_block()
        self.blocks.append("raise_on_all_ranks")
        failure = None
        try:
            yield
        except DraftuneError as error:
            failure = error
        finally:
            self.blocks.pop()
        if self.count == 1:
            if failure is not None:
                raise failure
            return
        messages = self.gather_strings("" if failure is None else str(failure))
        first = next((i for i, text in enumerate(messages) if text), None)
        if first is None:
            return
        if self.main and failure is not None:
            raise failure
        message = messages[first] if first == 0 else f"process {first}: {messages[first]}"
        raise (DraftuneError if self.main else SaidByMainError)(message) from failure

    def check_outside_block(self) -> None:
        """Raise RuntimeError if this process is inside a block of `raise_on_all_ranks`."""
        if self.blocks:
            raise RuntimeError(
                "a collective inside Processes.raise_on_all_ranks() hangs if another process fails: move it out"
            )


SINGLE_PROCESS = Processes()
