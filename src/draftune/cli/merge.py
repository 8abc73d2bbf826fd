"""The command `draftune merge`."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, add_base_model, add_weighted_loras, filled, writing_to
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_weighted_loras(parser, nargs="+")
    parser.add_argument("--output", type=filled, required=True, metavar="DIR", help="folder for the merged LoRA")
    add_base_model(parser)


def run(args: argparse.Namespace) -> None:
    """Merge the LoRAs and print the folder."""
    from draftune.runs.merge import merge_loras, weighted

    loras = [weighted(text) for text in args.loras]
    with writing_to(user_path(args.output)):
        path = merge_loras(loras, args.output, args.model, args.skip_text_encoder_lora, ModelOptions.of(args))
    print(path.parent)


COMMAND = Command(
    "merge",
    "merge LoRAs of one base model into one LoRA",
    "Write the weighted sum of LoRAs as one LoRA. It samples the same images as all LoRAs active at these weights.",
    "draftune merge runs/style@0.7 runs/orange@0.5 --output runs/merged",
    arguments,
    run,
)
