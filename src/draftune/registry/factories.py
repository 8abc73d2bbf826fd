"""From an expression to the object that it names: from a table of factories, or a user's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from draftune.errors import DraftuneError, out_of_memory, unknown
from draftune.registry.custom import defined, is_custom, where
from draftune.registry.expression import Call, wraps_another

T = TypeVar("T")


def found(name: str, kind: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The factory of that name, or that FILE.py:NAME names. Raises DraftuneError where there is none."""
    if is_custom(name):
        return defined(name, kind)
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]


def inner_call(call: Call, factory: Callable[..., Any], base: type, kind: str, example: str) -> Call | None:
    """What stands inside the call, where its factory wraps another `base`. Raises DraftuneError where it can't."""
    if wraps_another(factory, base):
        if not isinstance(call.inner, Call):
            raise DraftuneError(f"{call.name} wants one {kind} inside it: {call.name}({example})")
        return call.inner
    if call.inner is not None:
        raise DraftuneError(f"{call.name} takes settings such as key=value, not {str(call.inner)!r}")
    return None


def made(call: Call, factory: Callable[..., Any], base: type[T], kind: str, wanted: str, *given: Any) -> T:
    """What the factory makes of `given` and the call's settings. Raises DraftuneError where that is no `base`."""
    try:
        result = call.apply(factory, kind, *given)
    except DraftuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the {kind} {call.name!r} can't be made: {where(error)}") from error
    if not isinstance(result, base):
        raise DraftuneError(f"{call.name!r} makes a {type(result).__name__}, not a {wanted}")
    return result
