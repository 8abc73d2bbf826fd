"""Read names and docstrings of rewards, methods and the like from the source files, without importing torch."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parent.parent


class Source(NamedTuple):
    """A class or function that a name stands for.

    Attributes:
        module: Module that defines it.
        name: Its name in the module.
        doc: Its docstring, as written.
    """

    module: str
    name: str
    doc: str

    def load(self) -> Callable[..., Any]:
        """Import the module and return the class or function."""
        loaded: Callable[..., Any] = getattr(import_module(self.module), self.name)
        return loaded


def registered(registry: str) -> dict[str, Source]:
    """Return by name what `@register("name")` decorates, where `register` is imported from the module `registry`."""

    def order(path: Path) -> tuple[bool, bool, Path]:
        return "experimental" in path.parts, path.stem != "draft", path  # the paper's methods come first

    found = {}
    for path in sorted(PACKAGE.rglob("*.py"), key=order):
        text = path.read_text(encoding="utf-8")
        if "\n@register(" not in text or f"from {registry} import " not in text:
            continue
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if "register" in imported(module).get(registry, ()):
            for definition in definitions(module):
                for decorator in definition.decorator_list:
                    match decorator:
                        case ast.Call(ast.Name("register"), [ast.Constant(str(name))]):
                            found[name] = source(module, definition.name)
    return found


def in_table(module: str, table: str) -> dict[str, Source]:
    """Return by name what the dictionary `table` of a module holds: classes and functions, its own or imported."""
    for node in parsed(module).body:
        match node:
            case ast.AnnAssign(ast.Name(name), value=ast.Dict(keys, values)) if name == table:
                return {
                    str(key.value): source(module, value.id)
                    for key, value in zip(keys, values, strict=True)
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
                }
    raise LookupError(f"{module} has no dictionary {table} with an annotation")


@cache
def parsed(module: str) -> ast.Module:
    """Return the syntax tree of a module of this package."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def definitions(module: str) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Yield the classes and functions of a module."""
    return (node for node in parsed(module).body if isinstance(node, ast.ClassDef | ast.FunctionDef))


def imported(module: str) -> dict[str, list[str]]:
    """Return the names that a module imports from each other module."""
    imports: dict[str, list[str]] = {}
    for node in parsed(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            imports.setdefault(node.module, []).extend(alias.name for alias in node.names)
    return imports


def source(module: str, name: str) -> Source:
    """Return the class or function of this name that a module defines or imports."""
    for definition in definitions(module):
        if definition.name == name:
            return Source(module, name, ast.get_docstring(definition) or "")
    return source(next(other for other, names in imported(module).items() if name in names), name)
