"""The command `draftune list`."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from draftune.cli.common import Command
from draftune.errors import unknown
from draftune.registry.factories import first_sentence
from draftune.registry.sources import Source, in_table, registered


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "what",
        nargs="?",
        help="models, rewards, methods, guidance, optimizers, filters, caches, prompts, presets, or a name",
    )


REWARDS, METHODS = ("draftune.rewards.base", "REWARDS"), ("draftune.methods.base", "METHODS")
GUIDES, OPTIMIZERS = ("draftune.guidance.methods", "GUIDES"), ("draftune.training.optim", "OPTIMIZERS")
EXPERIMENTAL = "draftune.experimental.optimizers"


def described() -> dict[str, dict[str, Source]]:
    """Return by list and name what the package's source files register. Only `Source.load` imports torch."""
    return {
        "rewards": registered(REWARDS[0]),
        "methods": registered(METHODS[0]),
        "guidance": in_table(*GUIDES),
        "optimizers": in_table(*OPTIMIZERS) | in_table(EXPERIMENTAL, "OPTIMIZERS"),
        "filters": in_table(EXPERIMENTAL, "FILTERS"),
        "caches": in_table("draftune.sampling.call_cache", "CALL_CACHES"),
    }


def loaded(module: str, table: str) -> Mapping[str, Callable[..., Any]]:
    """Return a registry, with what the code of this process has added to it; empty if it was not imported."""
    return getattr(sys.modules.get(module), table, {})


def run(args: argparse.Namespace) -> None:
    """Print the lists, one list, or the documentation of one name."""
    from draftune.presets import PRESETS, first_comment
    from draftune.prompts import PROMPT_SETS
    from draftune.published import MODELS
    from draftune.registry.catalog import facts_of, in_groups

    sources, process = described(), {"rewards": loaded(*REWARDS), "methods": loaded(*METHODS)}
    tables: dict[str, Mapping[str, str]] = {"models": MODELS}
    for what, found in sources.items():
        sentences = {name: first_sentence(source.doc) + experimental(what, source) for name, source in found.items()}
        added = {name: first_sentence(made.__doc__) for name, made in process.get(what, {}).items()}
        tables[what] = sentences | {name: text for name, text in added.items() if name not in sentences}
    tables["prompts"] = {name: text for name, (text, _) in PROMPT_SETS.items()}
    tables["presets"] = {name: first_comment(preset) for name, preset in PRESETS.items()}

    for what, found in sources.items():
        if args.what in tables[what]:
            made = found[args.what].load() if args.what in found else process[what][args.what]
            facts = facts_of(args.what) if what == "rewards" else ""
            print("\n\n".join(filter(None, (description(args.what, made), facts))))
            return
    if args.what in PRESETS:
        print(PRESETS[args.what].read_text(encoding="utf-8"), end="")
        return
    if args.what is not None and args.what not in tables:
        raise unknown("list or name", args.what, [*tables, *(n for what in sources for n in tables[what]), *PRESETS])
    for what in [args.what] if args.what else tables:
        print(what)
        if what == "rewards":
            for group, names in in_groups(tables[what]).items():
                print(f"\n  {group}")
                print_table({name: tables[what][name] for name in names}, "    ", facts_of if args.what else None)
        else:
            print_table(tables[what])


def print_table(table: Mapping[str, str], indent: str = "  ", more: Callable[[str], str] | None = None) -> None:
    """Print names with their texts, and below each text what `more` returns for the name."""
    width = max(map(len, table))
    for name, text in table.items():
        print(f"{indent}{name:{width}}  {text}")
        if more is not None and (line := more(name)):
            print(f"{indent}{'':{width}}  {line}")


def description(name: str, described: Callable[..., Any]) -> str:
    """Return the signature and the docstring of a reward, a method, or the like."""
    signature = inspect.signature(described, eval_str=True)
    not_settings = ("params", "lr", "gradient")
    settings = ", ".join(str(parameter) for key, parameter in signature.parameters.items() if key not in not_settings)
    return f"{name}({settings})\n\n{inspect.getdoc(described)}"


def experimental(what: str, source: Source) -> str:
    """Return a mark for a method that may change or be removed without notice, else an empty string."""
    return " (experimental)" if what == "methods" and source.module.startswith("draftune.experimental.") else ""


COMMAND = Command(
    "list",
    "list models, rewards, methods, optimizers, prompts, presets",
    "List all names, or show the documentation of one reward, method, optimizer or preset.",
    "draftune list rewards; draftune list hpsv2",
    arguments,
    run,
)
