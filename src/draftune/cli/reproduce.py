"""The paper's claims measured again."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, filled, writing_to
from draftune.errors import DraftuneError
from draftune.utils.paths import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiments", nargs="*", metavar="NAME", help="see 'draftune list experiments'; all if none")
    parser.add_argument(
        "--output", type=filled, default="reproduction", metavar="DIR", help="of RESULTS.md (default: reproduction)"
    )
    parser.add_argument("--quick", action="store_true", help="minutes, to see that it works; the numbers mean nothing")
    parser.add_argument("--seeds", type=int, metavar="N", help="of the runs that are repeated (default: 2 or 3)")
    parser.add_argument("--examples", type=filled, metavar="DIR", help="real pictures, NAME.png, for what wants them")
    parser.add_argument("--part", metavar="I/N", help="make only this part of the training runs and write nothing yet")


def run(args: argparse.Namespace) -> None:
    part = None
    if args.part is not None:
        numbers = args.part.split("/")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise DraftuneError(f"--part takes I/N, such as 1/2, not {args.part!r}")
        part = int(numbers[0]), int(numbers[1])
    from draftune.reproduce import reproduce

    with writing_to(user_path(args.output)):
        made = reproduce(
            args.experiments,
            output=args.output,
            quick=args.quick,
            seeds=args.seeds,
            part=part,
            examples=args.examples,
        )
    for path in made:
        print(path)


COMMAND = Command(
    "reproduce",
    "measure the paper's claims again on the embedded model",
    "Runs experiments on the embedded model and writes tables, figures and RESULTS.md.",
    "draftune reproduce grid --output reproduction; interrupted, the same command goes on",
    arguments,
    run,
)
