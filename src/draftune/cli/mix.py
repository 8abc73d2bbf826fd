"""LoRAs added to one."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, add_skip_text_encoder, filled, writing_to
from draftune.utils.paths import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "loras",
        type=filled,
        nargs="+",
        metavar="LORA@WEIGHT",
        help="a run's folder, a LoRA file or its folder, and how much of it; any number, 1 unless given",
    )
    parser.add_argument(
        "--output", type=filled, required=True, metavar="DIR", help="the folder of the LoRA that they become"
    )
    parser.add_argument(
        "--model", type=filled, metavar="NAME", help="the base model, where the LoRAs name it differently or not"
    )
    add_skip_text_encoder(parser)


def run(args: argparse.Namespace) -> None:
    from draftune.runs.merge import mix_loras, weighted

    with writing_to(user_path(args.output)):
        path = mix_loras([weighted(text) for text in args.loras], args.output, args.model, args.skip_text_encoder_lora)
    print(path.parent)


COMMAND = Command(
    "mix",
    "add LoRAs of one base model to one LoRA",
    "Adds LoRAs, each at its weight: the pictures are those of all of them active at once.",
    "draftune mix runs/style@0.7 runs/orange@0.5 --output runs/mixed",
    arguments,
    run,
)
