"""Mistakes that a user can mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")
LONGEST = 500
"""Characters of what is said of one problem: a user's text in it may be a whole file."""


class DraftuneError(Exception):
    """What is wrong, where, and what to do, in one line. The command line prints it and exits with code 2."""

    def __str__(self) -> str:
        return "; ".join(map(one_line, self.args))


def one_line(text: object) -> str:
    """The text in one line that moves no cursor; of a long one the beginning and the end."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(text).split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}"


def unknown(kind: str, name: str, known: Iterable[str]) -> DraftuneError:
    """The error for a name that is not known, with the nearest one that is."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return DraftuneError(f"unknown {kind} {name!r}: {hint}")


ALLOCATORS = (
    "out of memory",  # CUDA, ROCm, XPU and MPS
    "DefaultCPUAllocator:",  # "can't allocate memory", on Windows "not enough memory"
    "Cannot allocate memory",
    "Invalid buffer size",  # MPS, for one tensor that is larger than any buffer may be
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)
"""What the allocators of torch's devices say, all of them by a RuntimeError."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was too little memory, on whatever device.

    The only test for it: user code may say "memory" of its own in any other error.
    """
    # By its name, since this module imports no torch.
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS)


def gather(*attempts: Callable[[], T]) -> list[T]:
    """The results of all attempts. Raises one DraftuneError that says all that is wrong, not the first of it."""
    results: list[T] = []
    problems: dict[str, None] = {}
    for attempt in attempts:
        try:
            results.append(attempt())
        except DraftuneError as error:
            problems |= dict.fromkeys(map(str, error.args))
    if problems:
        raise DraftuneError(*problems)
    return results
