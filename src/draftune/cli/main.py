"""The command line: parse the arguments, run a command, print errors. Imports torch only when a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn

from draftune.cli import COMMANDS
from draftune.errors import DraftuneError, out_of_memory, unknown
from draftune.prompts.files import is_text
from draftune.utils.logging import log_to_terminal
from draftune.utils.processes import is_peer_failure, message_for_rank, rank_and_world_size

EXPRESSIONS = (
    "--reward",
    "--guidance-reward",
    "--eval-rewards",
    "--metric-for-best-model",
    "--scales",
    "--weight-bounds",
)
"""Options whose values may begin with a minus."""
MOST_IN_USAGE = 30
"""Options of a command above which its usage line does not list them; the help does."""
IMPORT_WARNINGS = ("torchao", "bitsandbytes", "torch.utils._pytree", "diffusers.quantizers.torchao")
"""Loggers of installed libraries that warn when they are imported, about kernels for other devices."""
GROUPS = {"experimental": "commands that may change or be removed without notice"}


class Parser(argparse.ArgumentParser):
    """Parser that raises DraftuneError instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise DraftuneError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(prog="draftune", description="Fine-tune diffusion and flow image models on a reward.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
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
        if len(chosen._actions) > MOST_IN_USAGE:
            chosen.usage = "%(prog)s [options]"
        chosen.set_defaults(run=command.run, command=command.name, parser=chosen)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code: 0, 2 after an error in the input, 130 after Ctrl-C, or the command's own.
    """
    argv = expressions_joined(sys.argv[1:] if argv is None else list(argv))
    parser = build_parser()
    if isinstance(sys.stdout, TextIOWrapper):
        # Characters that the terminal's encoding lacks are escaped instead of raising an error.
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
        if rank_and_world_size()[1] > 1 and args.command != "train":
            raise DraftuneError(f"'draftune {args.command}' runs in one process: start it without a launcher")
        # Silences warnings of tokenizers about forked processes.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        # Read by OpenMP when torch is imported. Idle threads that busy-wait would slow working threads on shared cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        for name in IMPORT_WARNINGS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with log_to_terminal():
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has ended. What is still buffered is discarded, or Python's exit fails.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DraftuneError as error:
        if (message := message_for_rank(error)) is not None:
            print(f"draftune: {message}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and is_peer_failure(error):
            print("draftune: another process of this run ended before training began", file=sys.stderr)
            return 2
        if not out_of_memory(error):
            raise
        advice = "run 'draftune preflight' with the options of 'train' to see what fits; elsewhere use fewer images"
        print(f"draftune: out of memory: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if rank_and_world_size()[0] == 0:
            print(f"draftune: interrupted {error}".rstrip(), file=sys.stderr)
        return 130


def expressions_joined(argv: Sequence[str]) -> list[str]:
    """Join expressions that begin with a minus to their option, since argparse would take them for options."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in EXPRESSIONS and argument[:1] == "-" and argument[:2] != "--":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def unrecognized(parser: argparse.ArgumentParser, argument: str) -> DraftuneError:
    """Return the error of an unknown argument, with the most similar option."""
    if not argument.startswith("--"):
        return DraftuneError(f"unexpected argument {argument!r} (see {parser.prog} --help)")
    return unknown("flag", argument.partition("=")[0], parser._option_string_actions)
