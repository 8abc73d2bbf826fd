"""The command `draftune eval`."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from draftune.cli.common import (
    Command,
    add_drawing,
    add_evaluation,
    check_numbers,
    filled,
    table_output,
    with_drawing,
    writing_to,
)
from draftune.registry.expression import same_expression
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import folder_output

if TYPE_CHECKING:
    from draftune.evaluation.metrics import Comparison
    from draftune.runs.load import LoRASource


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "sources", type=filled, nargs="+", metavar="RUN", help="run folder, LoRA file, or folder of a LoRA file"
    )
    parser.add_argument(
        "--sort", type=filled, metavar="COLUMN", help="score by which several LoRAs are sorted (default: the reward)"
    )
    parser.add_argument("--output", type=filled, metavar="FILE", help="also write the table, as .csv or .json")
    parser.add_argument("--image-dir", type=filled, metavar="DIR", help="also write all images to this folder")
    add_evaluation(parser)
    add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table of scores, and write it and the images if requested."""
    check_numbers(args, num_images=1)
    output = table_output(args.output, args.prompts)
    image_dir = folder_output(args.image_dir, "--image-dir") if args.image_dir else None
    from draftune.evaluation.compare import compare, save_comparison
    from draftune.evaluation.eval_spec import resolve_eval_spec
    from draftune.runs.load import resolve_loras

    loras = resolve_loras(args.sources, args.model, args.skip_text_encoder_lora, ModelOptions.of(args))
    yardstick = resolve_eval_spec(
        loras, args.prompts, args.reward, args.eval_rewards, args.num_images, args.reward_precision
    )
    loras = [replace(tuned, settings=with_drawing(tuned.settings, args)) for tuned in loras]

    def write_images(tuned: LoRASource, comparison: Comparison) -> None:
        """Write the images of a LoRA, into a folder of its own if there are several."""
        if image_dir:
            words = re.sub(r"[^\w.]+", "-", tuned.source).strip("-")
            folder = image_dir if len(loras) == 1 else image_dir / f"{loras.index(tuned) + 1}-{words}"
            with writing_to(folder):
                save_comparison(comparison, yardstick, folder)

    for folder in filter(None, (output and output.parent, image_dir)):
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
    board = compare(loras, yardstick, args.sort, args.lora_scale, args.device, write_images)
    print(board.table())
    first, trained = loras[0].source, {tuned.source: tuned.settings.reward for tuned in loras if tuned.in_run}
    others = [source for source, reward in trained.items() if not same_expression(reward, trained.get(first, reward))]
    if others and not args.reward:
        print(f"\nscored by the reward of {first}; trained on another one: {', '.join(others)}")
    if output:
        with writing_to(output):
            board.write(output)


COMMAND = Command(
    "eval",
    "compare LoRAs with their base model and with each other",
    "Score images of the base model and of LoRAs, with the same prompts and seeds. Several LoRAs are sorted.",
    "draftune eval runs/a runs/b/best --prompts emoji-common --num-images 4 --output scores.csv",
    arguments,
    run,
)
