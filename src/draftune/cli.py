"""The command line: parse, call, print. Imports torch only once a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from draftune.commands import run_list, run_reno, run_reproduce, run_sample, run_score, run_train
from draftune.errors import DraftuneError, unknown
from draftune.recommended import PAPER
from draftune.settings import PRECISIONS, Settings, kind


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise DraftuneError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="draftune", description="Fine-tunes diffusion and flow image models on a reward.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="fine-tune a LoRA on a reward",
        description="Fine-tunes a LoRA on a reward. Without flags the embedded model learns to draw glossy 3D emoji.",
        epilog="example: draftune train --model emoji --reward emoji-aesthetic --output runs/first",
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="FILE", help="a YAML file of these settings, key: value; flags win over it")
    for f in fields(Settings):
        flag = "--" + f.name.replace("_", "-")
        default = f.default if f.default is not None else "as fits the model" if f.name in PAPER else ""
        text = f.metadata["help"] + (f" (default: {default})" if default != "" else "")
        if kind(f) is bool:
            train.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else None
            train.add_argument(flag, type=kind(f), metavar=choices or kind(f).__name__.upper(), help=text)
    train.set_defaults(run=run_train)

    sample = commands.add_parser(
        "sample",
        help="draw pictures with a trained LoRA",
        description="Draws pictures with a run's LoRA, a LoRA file, or a model as it is.",
        epilog='example: draftune sample runs/first --prompt "cat face" "pizza" --lora-scale 0.7 --output cats.png',
        allow_abbrev=False,
    )
    sample.add_argument("source", metavar="RUN_OR_LORA", help="a run's folder, a LoRA file or its folder, or a model")
    sample.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="what to draw")
    sample.add_argument("--output", required=True, metavar="FILE_OR_DIR", help="a .png (a grid if several) or a folder")
    sample.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture of each prompt")
    sample.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt")
    add_drawing(sample)
    sample.set_defaults(run=run_sample)

    reno = commands.add_parser(
        "reno",
        help="make one picture better by its noise, without training",
        description="Climbs a reward by the noise that one picture starts from; no weight changes (ReNO).",
        epilog='example: draftune reno emoji --prompt "cat face" --reward emoji-aesthetic --steps 15 --output cat.png',
        allow_abbrev=False,
    )
    reno.add_argument("source", metavar="MODEL_OR_RUN", help="a model, a run's folder, a LoRA file or its folder")
    reno.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    reno.add_argument("--reward", required=True, metavar="EXPR", help="see 'draftune list rewards'")
    reno.add_argument(
        "--output",
        required=True,
        metavar="FILE_OR_DIR",
        help="a .png (both pictures, small) or a folder (before.png and after.png)",
    )
    reno.add_argument("--steps", type=int, default=50, metavar="N", help="of the noise (default: 50)")
    reno.add_argument("--learning-rate", type=float, default=5.0, metavar="A", help="of the noise (default: 5)")
    reno.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise it starts from (default: 0)")
    add_drawing(reno)
    reno.set_defaults(run=run_reno)

    score = commands.add_parser(
        "score",
        help="score pictures",
        description="Scores picture files with a reward. Exit code 1: some could not be read and were skipped.",
        epilog="example: draftune score out/ 'more/*.jpg' --reward 'emoji-clip + 0.1*emoji-aesthetic' --prompt cat",
        allow_abbrev=False,
    )
    score.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, folders of them, or patterns")
    score.add_argument("--reward", required=True, metavar="EXPR", help="see 'draftune list rewards'")
    prompt = score.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="what all the pictures should show")
    prompt.add_argument("--prompts", metavar="FILE", help="a .csv or .jsonl with an image and its prompt in each row")
    score.add_argument("--output", metavar="FILE", help="also writes the table there, as .csv or .json")
    add_device(score, precision=False)
    score.set_defaults(run=run_score)

    again = commands.add_parser(
        "reproduce",
        help="measure the paper's claims again on the embedded model",
        description="Runs experiments on the embedded model and writes tables, figures and RESULTS.md.",
        epilog="example: draftune reproduce grid --output reproduction; interrupted, the same command goes on",
        allow_abbrev=False,
    )
    again.add_argument("experiments", nargs="*", metavar="NAME", help="see 'draftune list experiments'; all if none")
    again.add_argument("--output", default="reproduction", metavar="DIR", help="for RESULTS.md (default: reproduction)")
    again.add_argument("--quick", action="store_true", help="minutes, to see that it works; the numbers mean nothing")
    again.add_argument("--seeds", type=int, metavar="N", help="of the runs that are repeated (default: 2 or 3)")
    again.add_argument("--part", metavar="I/N", help="make only this part of the training runs and write nothing yet")
    again.set_defaults(run=run_reproduce)

    listing = commands.add_parser(
        "list",
        help="what there is: models, rewards, methods, prompts, experiments",
        description="Lists what there is, or says everything about one reward or method.",
        epilog="example: draftune list rewards; draftune list hpsv2",
    )
    listing.add_argument("what", nargs="?", help="models, rewards, methods, prompts, experiments, or a name")
    listing.set_defaults(run=run_list)
    return parser


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """What `load_source` reads."""
    parser.add_argument("--model", help="the base model, where the LoRA does not say it or it lies elsewhere")
    parser.add_argument("--lora-scale", type=float, default=1.0, metavar="A", help="0: base model, 1: as trained")
    parser.add_argument("--num-inference-steps", type=int, metavar="T", help="sampling steps; as in the run unless set")
    parser.add_argument("--guidance-scale", type=float, metavar="W", help="as in the run unless set")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="as in the run unless set")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser, precision: bool = True) -> None:
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    if precision:
        parser.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="of the model (default: no)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 where it worked, 2 for a mistake of the user's, with one line that says which."""
    argv = expressions_joined(sys.argv[1:] if argv is None else list(argv))
    parser = build_parser()
    try:
        args, extra = parser.parse_known_args(argv)
        if extra:
            raise unrecognized(parser, args, extra[0])
        if args.version:
            from draftune import __version__

            print(__version__)
            return 0
        if args.command is None:
            parser.print_help()
            return 0
        # Torch's and tokenizers' advice about their own innards is not for the user's screen.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        return args.run(args) or 0
    except DraftuneError as error:
        print(f"draftune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        advice = "try smaller pictures; in training --mixed-precision bf16, and a smaller --batch-size (with "
        advice += "--gradient-accumulation-steps) and --reward-batch-size"
        print(f"draftune: out of memory: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"draftune: interrupted {error}".rstrip(), file=sys.stderr)
        return 130


def expressions_joined(argv: Sequence[str]) -> list[str]:
    """The arguments with an expression that starts with a minus joined to its flag: argparse would take it for one."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--reward", "--held-out") and argument[:1] == "-" and argument[:2] != "--":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def unrecognized(parser: argparse.ArgumentParser, args: argparse.Namespace, argument: str) -> DraftuneError:
    if not argument.startswith("--"):
        return DraftuneError(f"unexpected argument {argument!r} (see {parser.prog} --help)")
    commands = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    chosen = commands[args.command] if args.command else parser  # type: ignore[index]
    return unknown("flag", argument.partition("=")[0], chosen._option_string_actions)
