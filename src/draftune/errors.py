"""Errors that a user can fix, and how they become one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from textwrap import shorten
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")
LONGEST = 500
"""Maximum characters of an error's line; a message may quote a whole file of the user's."""


class DraftuneError(Exception):
    """An error that the user can fix: what is wrong, and what to do. The command line prints it and exits with 2.

    Several arguments are several problems; `str` joins them with semicolons.

    Attributes:
        gathered: The errors that `gather` joined to this one.
    """

    gathered: Sequence[DraftuneError] = ()

    def __str__(self) -> str:
        return "; ".join(map(one_line, self.args))


def one_line(text: object) -> str:
    """Return a text as one line without control characters, shortened in the middle to about `LONGEST` characters."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(text).split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}"


def unknown(kind: str, name: str, known: Iterable[str]) -> DraftuneError:
    """Return the error for an unknown name; it suggests the nearest known name, or lists all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    names = ", ".join(known)
    if len(names) > LONGEST // 2:
        names = f"{shorten(names, LONGEST // 2, placeholder=' …')} ({len(known)} names)"
    hint = f"did you mean {near[0]!r}?" if near else f"known: {names}"
    return DraftuneError(f"unknown {kind} {name!r}: {hint}")


def require(module: str, feature: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Raises:
        DraftuneError: it is not installed; the message names the extra of draftune that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DraftuneError(f"{feature} needs {package}: {pip_install(extra)} ({error})") from error


def pip_install(extra: str) -> str:
    """Return the commands that install an extra."""
    return f"pip install 'draftune[{extra}]', in a clone pip install '.[{extra}]'"


ALLOCATORS = (
    "out of memory",  # CUDA, ROCm, XPU and MPS
    "DefaultCPUAllocator:",  # "can't allocate memory", on Windows "not enough memory"
    "Cannot allocate memory",
    "Invalid buffer size",  # MPS, for one tensor larger than its largest buffer
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)
"""Parts of the messages of torch's allocators, which raise RuntimeError."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory did not suffice, on any device.

    Use it for every such decision: other errors may contain the word "memory" too.
    """
    # The class is recognized by name, since this module imports no torch.
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS)


def gather(*attempts: Callable[[], T]) -> list[T]:
    """Return the results of all attempts. Raises one DraftuneError with the problems of all that failed.

    If all problems have one class, so has the error.
    """
    results: list[T] = []
    errors: list[DraftuneError] = []
    for attempt in attempts:
        try:
            results.append(attempt())
        except DraftuneError as error:
            errors += error.gathered or (error,)
    if errors:
        kinds = {type(error) for error in errors}
        problems = dict.fromkeys(str(problem) for error in errors for problem in error.args)
        joined = (kinds.pop() if len(kinds) == 1 else DraftuneError)(*problems)
        joined.gathered = errors
        raise joined
    return results


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters, or its class name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
