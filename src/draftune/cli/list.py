"""The command `draftune list`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from draftune.cli.common import Command
from draftune.errors import unknown


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "what",
        nargs="?",
        help="models, rewards, methods, guidance, optimizers, filters, caches, prompts, presets, or a name",
    )


def run(args: argparse.Namespace) -> None:
    """Print the lists, one list, or the documentation of one name."""
    from draftune.guidance.methods import GUIDES
    from draftune.methods import all_methods
    from draftune.models import MODELS
    from draftune.presets import PRESETS, first_comment
    from draftune.prompts import PROMPT_SETS
    from draftune.rewards import REWARDS
    from draftune.rewards.catalog import facts_of, in_groups
    from draftune.sampling.call_cache import CALL_CACHES
    from draftune.training.optim import gradient_filters, optimizers

    methods, named_optimizers, filters = all_methods(), optimizers(), gradient_filters()
    described: dict[str, Callable[..., Any]] = {**REWARDS, **methods, **GUIDES, **named_optimizers, **filters}
    described |= CALL_CACHES
    tables: dict[str, Mapping[str, str]] = {
        "models": MODELS,
        "rewards": {name: first_sentence(factory.__doc__) for name, factory in REWARDS.items()},
        "methods": {name: first_sentence(method.__doc__) + experimental(method) for name, method in methods.items()},
        "guidance": {name: first_sentence(guide.__doc__) for name, guide in GUIDES.items()},
        "optimizers": {name: first_sentence(made.__doc__) for name, made in named_optimizers.items()},
        "filters": {name: first_sentence(made.__doc__) for name, made in filters.items()},
        "caches": {name: first_sentence(made.__doc__) for name, made in CALL_CACHES.items()},
        "prompts": {name: text for name, (text, _) in PROMPT_SETS.items()},
        "presets": {name: first_comment(preset) for name, preset in PRESETS.items()},
    }
    if args.what in described:
        facts = facts_of(args.what) if args.what in REWARDS else ""
        print("\n\n".join(filter(None, (description(args.what, described[args.what]), facts))))
        return
    if args.what in PRESETS:
        print(PRESETS[args.what].read_text(encoding="utf-8"), end="")
        return
    if args.what is not None and args.what not in tables:
        raise unknown("list or name", args.what, [*tables, *described, *PRESETS])
    for what in [args.what] if args.what else tables:
        print(what)
        if what == "rewards":
            for group, names in in_groups(REWARDS).items():
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


def experimental(described: Callable[..., Any]) -> str:
    """Return a mark for what may change or be removed without notice, else an empty string."""
    return " (experimental)" if described.__module__.startswith("draftune.experimental.") else ""


def first_sentence(text: str | None) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((text or "").split("\n\n")[0].split())


COMMAND = Command(
    "list",
    "list models, rewards, methods, optimizers, prompts, presets",
    "List all names, or show the documentation of one reward, method, optimizer or preset.",
    "draftune list rewards; draftune list hpsv2",
    arguments,
    run,
)
