"""The command `draftune experimental distill`."""

from __future__ import annotations

import argparse

from draftune.cli.common import (
    Command,
    add_base_model,
    add_device,
    add_number,
    check_numbers,
    filled,
    writing_to,
)
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=filled, metavar="RUN_OR_LORA", help="run folder, LoRA file or its folder")
    add_number(parser, "--rank", 8, "R", "rank of the new LoRA, below that of the source")
    parser.add_argument(
        "--prompts",
        type=filled,
        nargs="+",
        required=True,
        metavar="PROMPTS",
        help="training prompts: named sets or files, each a group that is weighted by its size",
    )
    add_number(parser, "--group-balance", 0.97, "B", "0 weights prompts equally, near 1 groups equally; below 1")
    add_number(parser, "--num-trajectories", 20, "N", "batches of images to train on, 1 or more")
    add_number(parser, "--steps-per-trajectory", 5, "K", "random sampling steps of each batch to train on, 1 or more")
    add_number(parser, "--batch-size", 4, "N", "images in a batch, 1 or more")
    add_number(parser, "--learning-rate", 3e-4, "LR", "learning rate of AdamW, 0 or more and below 1")
    add_number(parser, "--seed", 0, "S", "seed of the prompts' order and the noise")
    parser.add_argument("--output", type=filled, required=True, metavar="DIR", help="folder of the new LoRA")
    add_base_model(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, rank=1, num_trajectories=1, steps_per_trajectory=1, batch_size=1, learning_rate=0)
    from draftune.experimental.distill import distill_lora

    with writing_to(user_path(args.output)):
        distilled = distill_lora(
            args.source,
            args.prompts,
            args.output,
            args.rank,
            num_trajectories=args.num_trajectories,
            steps_per_trajectory=args.steps_per_trajectory,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            group_balance=args.group_balance,
            seed=args.seed,
            model=args.model,
            skip_text_encoder=args.skip_text_encoder_lora,
            options=ModelOptions.of(args),
            device=args.device,
            precision=args.mixed_precision,
            quantization=args.quantization,
        )
    print(f"mean squared difference of the network's outputs from those of {args.source}")
    for name, value in distilled.differences.items():
        print(f"  {name:9}  {value:.3g}  {value / distilled.differences['no LoRA']:.1%}")
    print(distilled.file.parent)


COMMAND = Command(
    "experimental distill",
    "distill a LoRA into one of a lower rank",
    "Trains a LoRA of a lower rank to predict what another LoRA predicts, on the sampling trajectories of the latter.",
    "draftune experimental distill runs/second --rank 8 --prompts emoji --output runs/small",
    arguments,
    run,
)
