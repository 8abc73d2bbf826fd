"""Build the object that an expression names: from a registry, or from a user's own file."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from draftune.errors import DraftuneError, out_of_memory, unknown
from draftune.registry.expression import Call, Sum, Value, parse, underscore_hint
from draftune.utils.paths import user_path

T = TypeVar("T")
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def add_factory(table: dict[str, Any], name: str, factory: Callable[..., Any], kind: str) -> None:
    """Add a factory to a registry. The same definition, as of a notebook cell that runs again, replaces itself.

    Args:
        table: The registry.
        name: The name in expressions.
        factory: The class or function.
        kind: What it makes, for error messages.

    Raises:
        DraftuneError: the name is no Python identifier, or that of another factory.
    """
    if not name.isidentifier():
        raise DraftuneError(f"a {kind}'s name must be a Python identifier, such as my_{kind}, not {name!r}")
    old = table.get(name)
    if old is not None and (old.__module__, old.__qualname__) != (factory.__module__, factory.__qualname__):
        raise DraftuneError(f"the {kind} {name!r} is registered already")
    table[name] = factory


def parse_call(text: str, kind: str, example: str) -> Call:
    """Parse an expression that must be one call. Raises DraftuneError for a sum."""
    tree = parse(text)
    if isinstance(tree, Sum):
        hint = underscore_hint(text)
        raise DraftuneError(f"a {kind} is one name with its settings, such as {example}, not {text!r}{hint}")
    return tree


def build(call: Call, kind: str, table: Mapping[str, Callable[..., Any]], base: type[T], *given: Any) -> T:
    """Build the object that a call names, and the one of the same kind that it wraps.

    Args:
        call: The name, the settings and the wrapped call.
        kind: What the factories make, for error messages.
        table: The factories by name; a name such as `my/file.py:name` is looked up in that file.
        base: The class of the result; a factory whose first parameter has this type wraps another object.
        given: Positional arguments of a factory that wraps nothing.

    Raises:
        DraftuneError: for an unknown name, a setting that does not fit, and a factory that fails.
    """
    factory = find_factory(call.name, kind, table)
    if wraps_another(factory, base):
        if not isinstance(call.inner, Call):
            raise DraftuneError(f"{call.name} needs one {kind} inside it: {call.name}({next(iter(table))})")
        given = (build(call.inner, kind, table, base, *given),)
    elif call.inner is not None:
        raise DraftuneError(f"{call.name} takes settings such as key=value, not {str(call.inner)!r}")
    return make(call, kind, factory, base, *given)


def make(call: Call, kind: str, factory: Callable[..., Any], base: type[T], *given: Any) -> T:
    """Call a factory with `given` and the call's settings. Raises DraftuneError if it fails or returns no `base`."""
    settings = bind(call, kind, factory, len(given))
    try:
        result = factory(*given, **settings)
    except DraftuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the {kind} {call.name!r} can't be made: {error_text(error)}") from error
    if not isinstance(result, base):
        raise DraftuneError(f"{call.name!r} makes a {type(result).__name__}, not a {base.__name__}")
    return result


def find_factory(name: str, kind: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the factory of that name. Raises DraftuneError for a name that neither the table nor a file has."""
    if is_in_file(name):
        return load_from_file(name, kind)
    if name.endswith(".py"):
        raise DraftuneError(f"which function or class of {name}? Give it as {name}:NAME")
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]


def bind(call: Call, kind: str, function: Callable[..., Any], num_given: int = 0) -> dict[str, Value]:
    """Check a call's settings against a function's signature, and return them with the signature's types.

    Args:
        call: The name, for error messages, and the settings.
        kind: What the function makes, for error messages.
        function: The function or class; the types of its parameters are checked where they are in TYPE_NAMES.
        num_given: How many of its first parameters are no settings.

    Raises:
        DraftuneError: for a setting that is unknown, missing or of another type.
    """
    parameters = dict(list(signature_of(function).parameters.items())[num_given:])
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    settings = dict(call.settings)
    for key, value in call.settings.items():
        if key not in parameters:
            if open_ended:
                continue
            raise unknown(f"setting of {kind} {call.name}:", key, parameters)
        wanted = parameters[key].annotation
        if wanted is float and type(value) is int:
            settings[key] = float(value)
        elif wanted in TYPE_NAMES and type(value) is not wanted:
            raise DraftuneError(f"{key} of {kind} {call.name} must be {TYPE_NAMES[wanted]}, not {value!r}")
    for key, parameter in parameters.items():
        optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not optional and key not in settings:
            raise DraftuneError(f"{kind} {call.name} needs {key}: {call.name}({key}=…)")
    return settings


def check_range(owner: str, **numbers: tuple[float, float, float]) -> None:
    """Check that numbers, each given with its lowest and highest value, are finite and in their ranges.

    Raises:
        DraftuneError: with the number's name, its owner such as "reward clip", the range and the value.
    """
    for name, (value, low, high) in numbers.items():
        if not (low <= value <= high and math.isfinite(value)):
            allowed = f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g} and finite"
            raise DraftuneError(f"{name} of {owner} must be {allowed}, not {value}")


def wraps_another(factory: Callable[..., Any], base: type) -> bool:
    """Return whether a factory's first parameter is an object of the kind that it makes."""
    parameters = list(signature_of(factory).parameters.values())
    return bool(parameters) and parameters[0].annotation in (base, base.__name__)


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature with evaluated types, or as it is written where a type is known to type checkers only."""
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:
        return inspect.signature(function)


def is_in_file(name: str) -> bool:
    """Return whether a name is one in a user's file, as `my/file.py:name`."""
    return name.rpartition(":")[0].endswith(".py")


def load_from_file(name: str, kind: str) -> Any:
    """Run the file of `my/file.py:name` once and return the function or class.

    Raises:
        DraftuneError: for a file that is missing or fails, and a name that it does not define.
    """
    file, _, key = name.rpartition(":")
    module = run_file(user_path(file), kind)
    value = getattr(module, key, None)
    if not callable(value):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise unknown(f"{kind} in {file!r}:", key, own)
    return value


def run_file(path: Path, kind: str) -> ModuleType:
    """Import a user's file once, by its path. As for a script, its folder is added to the module search path."""
    if not path.is_file():
        raise DraftuneError(f"no file {str(path)!r} with a {kind} in it")
    path = path.resolve()
    name = f"draftune.registry.files:{path}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the file {str(path)!r} can't be run: {error_text(error)}") from error
    return module


def first_sentence(docstring: str | None) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def error_text(error: BaseException) -> str:
    """Return an error in one line, with the last line of code outside of libraries that it came through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"SyntaxError: {error}"  # it names the file and the line
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith("<")]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
