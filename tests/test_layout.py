"""The layout of the package: few modules in its root, and no circle of imports."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import draftune

ROOT = Path(draftune.__file__).parent
MOST_IN_ROOT = 10
LAYERS = [
    *("errors", "utils", "registry", "published", "prompts", "sampling", "recommended", "settings"),
    *("presets", "lora", "models", "rewards", "methods", "runs", "evaluation", "training", "guidance", "experimental"),
    *("report", "ui", "cli"),
]
OUTSIDE = {"", "__main__", "assets"}
"""The package itself, which imports nothing at first, its entry, and data."""


def module_names() -> dict[str, Path]:
    """Return the file of each module of draftune by its dotted name."""
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def imports_at_the_top(body: Sequence[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when the module is imported: none under TYPE_CHECKING, none inside a function."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_at_the_top(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from imports_at_the_top(getattr(node, field, []))


def imported(source: str, names: Container[str]) -> set[str]:
    """Return the modules of draftune that a module's source imports at its top."""
    found: set[str] = set()
    for node in imports_at_the_top(ast.parse(source).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in names}
        elif node.module in names:
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in names else node.module for name in inside.values()}
    return found


def packages_of(name: str) -> set[str]:
    """Return the packages that Python imports before a module: `a` and `a.b` before `a.b.c`."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return what each module imports, the packages around it included where the module itself is not inside them."""
    graph = {}
    for name, source in sources.items():
        found = imported(source, sources)
        around = {package for one in found for package in packages_of(one)} & sources.keys()
        graph[name] = (found | around - packages_of(name)) - {name}
    return graph


def own_graph() -> dict[str, set[str]]:
    return import_graph({name: path.read_text(encoding="utf-8") for name, path in module_names().items()})


def test_few_modules_are_in_the_root() -> None:
    root = [path.name for path in ROOT.glob("*.py") if not path.name.startswith("__")]
    assert len(root) <= MOST_IN_ROOT, sorted(root)


def test_each_folder_of_modules_is_a_package_with_a_docstring() -> None:
    for folder in {path.parent for path in module_names().values()}:
        init = folder / "__init__.py"
        assert init.is_file(), folder
        assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), init


def test_modules_import_each_other_without_a_circle() -> None:
    graph = own_graph()
    assert "draftune.sampling.schedule" in graph["draftune.sampling.sampler"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def layer(name: str) -> str:
    """Return the folder of the package, or the module of its root, that a module belongs to."""
    return [*name.split("."), ""][1]


def test_imports_run_one_way() -> None:
    """A module imports only from its own folder and from those before it in LAYERS."""
    graph = own_graph()
    unknown = {layer(name) for name in graph} - {*LAYERS, *OUTSIDE}
    assert not unknown, f"add to LAYERS: {unknown}"
    upward = [
        f"{name} imports {used}"
        for name, uses in graph.items()
        for used in uses
        if {layer(name), layer(used)} <= set(LAYERS) and LAYERS.index(layer(used)) > LAYERS.index(layer(name))
    ]
    assert not upward, upward


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from draftune.errors import DraftuneError", {"draftune.errors"}),
        ("from draftune.sampling import schedule", {"draftune.sampling.schedule"}),
        ("import draftune.rewards", {"draftune.rewards"}),
        (
            "try:\n    import draftune.errors\nexcept ImportError:\n    import draftune.prompts",
            {"draftune.errors", "draftune.prompts"},
        ),
        ("if TYPE_CHECKING:\n    import draftune.errors\nelse:\n    import draftune.prompts", {"draftune.prompts"}),
        ("def f():\n    import draftune.errors", set()),
        (
            "class C:\n    from draftune.errors import unknown\n    def f(self):\n        import draftune.prompts",
            {"draftune.errors"},
        ),
        ("import torch", set()),
    ],
)
def test_imports_are_read_where_they_run(source: str, expected: set[str]) -> None:
    assert imported(source, module_names()) == expected


@pytest.mark.parametrize(
    "sources",
    [
        {"a": "import b", "b": "import c", "c": "import a"},
        # Python runs p/__init__.py before p.base, and it imports q again.
        {"p": "from p import one", "p.one": "import q", "p.base": "", "q": "from p.base import x"},
    ],
)
def test_a_circle_is_found(sources: dict[str, str]) -> None:
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(sources)).prepare()


def test_a_package_may_import_its_modules() -> None:
    TopologicalSorter(import_graph({"p": "from p import one", "p.one": "import p.two", "p.two": ""})).prepare()
