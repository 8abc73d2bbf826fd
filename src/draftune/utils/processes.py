"""The processes that make one run together. Imports no torch, so that the command line can ask which of them it is."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from draftune.errors import DraftuneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T", bound="Sequence[Any] | Tensor")


def launched() -> tuple[int, int]:
    """Which of the processes that a launcher started this one is, and how many they are: (0, 1) without one."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    return int(os.environ.get("RANK") or 0) if count > 1 else 0, count


def tell(message: str) -> None:
    """Print a line for the user without disturbing progress bars, once where several processes would say it."""
    from tqdm.auto import tqdm

    if launched()[0] == 0:
        tqdm.write(f"draftune: {message}", file=sys.stderr)


class SaidByMainError(DraftuneError):
    """A mistake that the main process has too, and says."""


def leave() -> None:
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


def to_say(error: DraftuneError) -> str | None:
    """What this process prints of a mistake: the main one everything, the others what the main one can't know."""
    index, _ = launched()
    if index == 0:
        return str(error)
    distributed = sys.modules.get("torch.distributed")
    # Until the processes know each other, those of one machine have read the same arguments and files.
    alike = distributed is None or not distributed.is_initialized()
    if isinstance(error, SaidByMainError) or (alike and os.environ.get("LOCAL_RANK") != "0"):
        return None
    return f"process {index}: {error}"


def lost(error: RuntimeError) -> bool:
    """Whether it says that another process is no longer there."""
    from torch import distributed

    known = isinstance(error, distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
    return launched()[1] > 1 and known


@dataclass(frozen=True)
class Processes:
    """Which process this is and what it shares with the others; one alone has all of everything.

    Whatever makes the processes wait for each other is to be called by all of them, in the same order.
    """

    index: int = 0
    count: int = 1
    device: torch.device | str = "cpu"
    """On which tensors travel."""

    @property
    def main(self) -> bool:
        """Whether it is the one that writes files and speaks to the user."""
        return self.index == 0

    def share(self, values: T) -> T:
        """This process's part of what all of them have: equal parts in order, of a multiple of their number."""
        size = len(values) // self.count
        own: Any = values[self.index * size : (self.index + 1) * size]
        return own

    def padded_share(self, values: list[Any]) -> list[Any]:
        """As `share` for any number of values but none: the last one is repeated, and `gather` gives it too often."""
        return self.share(values + values[-1:] * (-len(values) % self.count))

    def gather(self, own: Tensor) -> Tensor:
        """Every process's tensor [N, …] of the same shape, one after the other [count * N, …]."""
        if self.count == 1:
            return own
        import torch
        from torch import distributed

        sent = own.detach().to(self.device).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.count)]
        distributed.all_gather(parts, sent)
        return torch.cat(parts).to(own.device)

    def mean_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Puts the mean over the processes in the place of each gradient; where none has one, there stays none."""
        if self.count == 1:
            return
        import torch
        from torch import distributed

        known = list(parameters)
        # One message: the gradients and, after them, who has one.
        whole = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in known]
            + [torch.tensor([p.grad is not None for p in known], device=known[0].device, dtype=known[0].dtype)]
        )
        distributed.all_reduce(whole)
        whole /= self.count
        *gradients, had = whole.split([*(p.numel() for p in known), len(known)])
        for parameter, gradient, some in zip(known, gradients, had.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).clone() if some else None

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of the processes."""
        if self.count == 1:
            return flag
        import torch

        return bool(self.gather(torch.tensor([int(flag)])).any())

    def of_main(self, value: Any) -> Any:
        """What the main process has, as JSON has it, where others may have measured something else."""
        if self.count == 1:
            return value
        return json.loads(self.texts(json.dumps(value) if self.main else "")[0])

    def texts(self, own: str) -> list[str]:
        """The text of every process."""
        import torch

        encoded = own.encode()
        sizes = self.gather(torch.tensor([len(encoded)])).tolist()
        if not any(sizes):
            return [""] * self.count
        padded = torch.tensor(list(encoded.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        rows = self.gather(padded[None]).tolist()
        return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A mistake that one process finds inside this block ends all of them at its end, with the same words.

        Nothing inside may wait for the other processes.
        """
        if self.count == 1:
            yield
            return
        mistake = None
        try:
            yield
        except DraftuneError as error:
            mistake = error
        said = self.texts("" if mistake is None else str(mistake))
        found = next((i for i, text in enumerate(said) if text), None)
        if found is None:
            return
        if self.main and mistake is not None:
            raise mistake
        message = said[found] if found == 0 else f"process {found}: {said[found]}"
        raise (DraftuneError if self.main else SaidByMainError)(message) from mistake


ALONE = Processes()
