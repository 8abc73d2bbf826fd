"""Mistakes that a user can mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class DraftuneError(Exception):
    """What is wrong, where, and what to do, in one line. The command line prints it and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> DraftuneError:
    """The error for a name that is not known, with the nearest one that is."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return DraftuneError(f"unknown {kind} {name!r}: {hint}")


def gather(*attempts: Callable[[], T]) -> list[T]:
    """The results of all attempts. Raises one DraftuneError that says all that is wrong, not the first of it."""
    results: list[T] = []
    problems: dict[str, None] = {}
    for attempt in attempts:
        try:
            results.append(attempt())
        except DraftuneError as error:
            problems[str(error)] = None
    if problems:
        raise DraftuneError("; ".join(problems))
    return results
