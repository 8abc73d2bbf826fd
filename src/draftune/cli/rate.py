"""The command `draftune rate`."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, add_drawing, add_number, check_numbers, filled, load_source
from draftune.errors import DraftuneError
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import check_writable, user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source",
        type=filled,
        nargs="?",
        metavar="RUN_OR_MODEL",
        help="run folder, LoRA file or its folder, or a model (not with --restore-images)",
    )
    parser.add_argument("--prompts", type=filled, metavar="FILE_OR_SET", help="prompt file or set of the images")
    parser.add_argument(
        "--output", type=filled, default="taste.csv", metavar="FILE", help="file of comparisons (default: taste.csv)"
    )
    add_number(parser, "--num-comparisons", 100, "N", "pairs to compare, 1 or more; answered ones count")
    add_number(parser, "--seed", 0, "S", "seed of the first image of each prompt")
    add_number(parser, "--port", 8643, "P", "port of 127.0.0.1, 0 for any")
    parser.add_argument(
        "--restore-images",
        type=filled,
        metavar="FILE",
        help="sample the missing images of a file of comparisons again, and exit",
    )
    add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    """Serve the page until all pairs have answers, or until Ctrl-C."""
    check_numbers(args, num_comparisons=1)
    if not 0 <= args.port < 65536:
        raise DraftuneError(f"--port must be from 0 to 65535, not {args.port}")
    if args.restore_images is not None:
        from draftune.evaluation.rating import restore_images

        print(restore_images(user_path(args.restore_images), args.device))
        return
    if args.source is None or args.prompts is None:
        raise DraftuneError("draftune rate needs RUN_OR_MODEL and --prompts, or --restore-images")
    path = user_path(args.output)
    if path.suffix.lower() != ".csv":
        raise DraftuneError(f"--output must be a .csv file, not {args.output!r}")
    check_writable(path)
    from draftune.evaluation.rating import pair_settings, pairs, sampler
    from draftune.prompts import load_prompts
    from draftune.report.rating import RatingServer, RatingSession
    from draftune.rewards.comparisons import comparison, read_comparisons

    asked = pairs(load_prompts(args.prompts), args.num_comparisons, args.seed)
    if path.is_file():
        read_comparisons(path)  # a wrong file is refused before the model is loaded
    with RatingServer(args.port, "Loading the model …") as server:
        print(f"{server.address}  (stop with Ctrl-C; the same command goes on)", flush=True)
        model, settings = load_source(args)
        known = pair_settings(
            settings,
            ModelOptions.of(args),
            base=args.model,
            lora_scale=args.lora_scale,
            precision=args.mixed_precision,
            skip_text_encoder=args.skip_text_encoder_lora,
            quantization=args.quantization,
        )
        session = RatingSession(
            path,
            asked,
            lambda pair, choice: comparison(pair.prompt, choice, args.source, None, pair.seeds, known),
            sampler(model, settings, [pair.prompt for pair in asked]),
            title=args.source,
        )
        server.session = session
        try:
            session.run()
        except KeyboardInterrupt:
            print()
    print(f"{path}  {session.done} of {len(asked)} pairs have answers; as a reward: \"taste(ratings='{path}')\"")


COMMAND = Command(
    "rate",
    "compare pairs of images in the browser, for the reward 'taste'",
    "Show pairs of images of one prompt to a browser on this machine, and write which one is preferred.",
    "draftune rate emoji --prompts emoji --output taste.csv",
    arguments,
    run,
)
