"""A LoRA made one of a lower rank."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, add_device, add_skip_text_encoder, check_numbers, filled, writing_to
from draftune.utils.paths import user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=filled, metavar="RUN_OR_LORA", help="a run's folder, a LoRA file or its folder")
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="of the new LoRA (default: 8)")
    parser.add_argument(
        "--prompts",
        type=filled,
        nargs="+",
        required=True,
        metavar="PROMPTS",
        help="on which it learns: named sets or files, each a group that is weighed by how many prompts it has",
    )
    parser.add_argument(
        "--beta",
        type=float,
        default=0.97,
        metavar="B",
        help="at 0 every prompt counts alike, near 1 every group does (default: 0.97)",
    )
    parser.add_argument(
        "--paths", type=int, default=20, metavar="N", help="batches of pictures that it learns from (default: 20)"
    )
    parser.add_argument(
        "--calls", type=int, default=5, metavar="K", help="sampling steps of each, drawn at random (default: 5)"
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="pictures in a batch (default: 4)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, metavar="LR", help="of AdamW (default: 0.0003)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the prompts' order and the noise")
    parser.add_argument("--output", type=filled, required=True, metavar="DIR", help="the new LoRA's folder")
    parser.add_argument(
        "--model",
        type=filled,
        metavar="NAME",
        help="the base model, where the LoRA does not say it or it lies elsewhere",
    )
    add_skip_text_encoder(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, rank=1, paths=1, calls=1, batch_size=1, learning_rate=0)
    from draftune.experimental.distill import distill_lora

    with writing_to(user_path(args.output)):
        made = distill_lora(
            args.source,
            args.prompts,
            args.output,
            args.rank,
            paths=args.paths,
            calls=args.calls,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            beta=args.beta,
            seed=args.seed,
            model=args.model,
            skip_text_encoder=args.skip_text_encoder_lora,
            device=args.device,
            precision=args.mixed_precision,
        )
    print(f"mean squared difference of the predictions from those of {args.source}")
    for name, value in made.differences.items():
        print(f"  {name:9}  {value:.3g}  {value / made.differences['no LoRA']:.1%}")
    print(made.file.parent)


COMMAND = Command(
    "distill",
    "a LoRA made one of a lower rank",
    "Trains a LoRA of a lower rank to predict what another one does, along the paths on which that one draws.",
    "draftune distill runs/second --rank 8 --prompts emoji --output runs/small",
    arguments,
    run,
)
