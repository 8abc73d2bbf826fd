"""Base against tuned, and LoRAs against each other."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from draftune.cli.common import (
    Command,
    add_drawing,
    check_numbers,
    drawing_flags,
    filled,
    table_output,
    writing_to,
)
from draftune.utils.paths import folder_output

if TYPE_CHECKING:
    from draftune.evaluation.metrics import Comparison
    from draftune.runs.load import Tuned


def add_yardstick(parser: argparse.ArgumentParser) -> None:
    """What `find_yardstick` wants."""
    parser.add_argument("--prompts", type=filled, metavar="FILE_OR_SET", help="as the run was evaluated on unless set")
    parser.add_argument(
        "--reward", type=filled, metavar="EXPR", help="as in the run unless set; see 'draftune list rewards'"
    )
    parser.add_argument("--held-out", metavar="EXPR", help="more rewards, as in the run unless set; '' for none")
    parser.add_argument("--num-images", type=int, default=2, metavar="N", help="pictures of each prompt (default: 2)")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", type=filled, nargs="+", metavar="RUN", help="a run's folder, a LoRA file or its folder"
    )
    add_yardstick(parser)
    parser.add_argument(
        "--sort", type=filled, metavar="SCORE", help="by which several are ranked (default: the reward)"
    )
    parser.add_argument("--output", type=filled, metavar="FILE", help="also writes the table there, as .csv or .json")
    parser.add_argument("--pictures", type=filled, metavar="DIR", help="also writes all pictures there")
    add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, num_images=1)
    output = table_output(args.output, args.prompts)
    pictures = folder_output(args.pictures, "--pictures") if args.pictures else None
    from draftune.evaluation.compare import compare, save_pictures
    from draftune.evaluation.eval_spec import find_yardstick
    from draftune.runs.load import find_all

    loras = find_all(args.sources, args.model, args.skip_text_encoder_lora)
    yardstick = find_yardstick(loras, args.prompts, args.reward, args.held_out, args.num_images)
    # Flags hold for all alike.
    loras = [replace(tuned, settings=replace(tuned.settings, **drawing_flags(args))) for tuned in loras]

    def keep(tuned: Tuned, comparison: Comparison) -> None:
        """In a folder for each, where there are several."""
        if pictures:
            words = re.sub(r"[^\w.]+", "-", tuned.source).strip("-")
            folder = pictures if len(loras) == 1 else pictures / f"{loras.index(tuned) + 1}-{words}"
            with writing_to(folder):
                save_pictures(comparison, yardstick, folder)

    for folder in filter(None, (output and output.parent, pictures)):
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
    board = compare(loras, yardstick, args.sort, args.lora_scale, args.device, args.mixed_precision, keep)
    print(board.table())
    if output:
        with writing_to(output):
            board.write(output)


COMMAND = Command(
    "eval",
    "compare LoRAs with their base model and with each other",
    "Scores the pictures of the base model and of LoRAs, for the same prompts and seeds. Several make a leaderboard.",
    "draftune eval runs/a runs/b/best --prompts emoji-common --num-images 4 --output scores.csv",
    arguments,
    run,
)
