"""The command line: parse, call, print. Imports torch only once a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn

from draftune.cli import COMMANDS
from draftune.errors import DraftuneError, out_of_memory, unknown
from draftune.prompt_files import is_text
from draftune.utils.logging import log_to_terminal
from draftune.utils.processes import launched, lost, to_say

EXPRESSIONS = ("--reward", "--guidance-reward", "--held-out", "--best-by", "--scales", "--weight-bounds")
"""Flags whose values may begin with a minus."""
GROUPS = {"experimental": "commands that may change or be removed without notice"}


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise DraftuneError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="draftune", description="Fine-tunes diffusion and flow image models on a reward.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")
    groups = {"": commands}

    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            description = GROUPS[group]
            of_group = commands.add_parser(group, help=description, description=description, allow_abbrev=False)
            groups[group] = of_group.add_subparsers(parser_class=Parser, metavar="COMMAND", required=True)
        chosen = groups[group].add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=f"example: {command.example}",
            allow_abbrev=False,
        )
        command.arguments(chosen)
        chosen.set_defaults(run=command.run, command=command.name, parser=chosen)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 where it worked, 2 for a mistake of the user's, with one line that says which."""
    argv = expressions_joined(sys.argv[1:] if argv is None else list(argv))
    parser = build_parser()
    if isinstance(sys.stdout, TextIOWrapper):
        # An arrow that the terminal doesn't know, or a file's name that is no text, is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for argument in argv:
            if not is_text(argument):
                raise DraftuneError(f"the argument {argument!r} is not text in UTF-8")
        args, extra = parser.parse_known_args(argv)
        if extra:
            raise unrecognized(getattr(args, "parser", parser), extra[0])
        if args.version:
            from draftune import __version__

            print(__version__)
            return 0
        if args.command is None:
            parser.print_help()
            return 0
        if launched()[1] > 1 and args.command != "train":
            raise DraftuneError(f"'draftune {args.command}' is the work of one process: start it without a launcher")
        # Torch's and tokenizers' advice about their own innards is not for the user's screen.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        # OpenMP reads it when torch is imported. Threads that wait must not spin: on cores that another process uses
        # too, they take the time that the threads they wait for need.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        with log_to_terminal():
            return args.run(args) or 0
    except DraftuneError as error:
        if (said := to_say(error)) is not None:
            print(f"draftune: {said}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and lost(error):
            print("draftune: another process of this run has ended before it began", file=sys.stderr)
            return 2
        if not out_of_memory(error):
            raise
        advice = "'draftune preflight' with the flags of training says what fits; elsewhere draw fewer pictures at once"
        print(f"draftune: out of memory: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if launched()[0] == 0:
            print(f"draftune: interrupted {error}".rstrip(), file=sys.stderr)
        return 130


def expressions_joined(argv: Sequence[str]) -> list[str]:
    """The arguments with an expression that starts with a minus joined to its flag: argparse would take it for one."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in EXPRESSIONS and argument[:1] == "-" and argument[:2] != "--":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def unrecognized(parser: argparse.ArgumentParser, argument: str) -> DraftuneError:
    if not argument.startswith("--"):
        return DraftuneError(f"unexpected argument {argument!r} (see {parser.prog} --help)")
    return unknown("flag", argument.partition("=")[0], parser._option_string_actions)
