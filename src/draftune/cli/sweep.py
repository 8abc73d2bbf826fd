"""The command `draftune sweep`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

from draftune.cli.common import (
    Command,
    add_drawing,
    add_evaluation,
    add_lora,
    check_numbers,
    filled,
    with_drawing,
    writing_to,
)
from draftune.errors import DraftuneError
from draftune.utils.logging import logger
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import folder_output, user_path
from draftune.utils.scales import parse_scales

DEFAULT = "0,0.25,0.5,0.75,1,1.25,1.5"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_lora(parser)
    parser.add_argument(
        "--scales",
        default=DEFAULT,
        metavar="A,B,…",
        help=f"LoRA scales, any numbers; 0, the base model, is always added (default: {DEFAULT})",
    )
    parser.add_argument(
        "--metric-for-best-model",
        metavar="CRITERION",
        help="weighted sum of columns by which a scale is recommended (default: that of the run)",
    )
    parser.add_argument(
        "--output", type=filled, metavar="DIR", help="folder for images, curves and tables (default: RUN/sweep)"
    )
    add_evaluation(parser)
    add_drawing(parser, scale=False)


def run(args: argparse.Namespace) -> None:
    """Evaluate the scales, write the results and print the recommendation."""
    check_numbers(args, num_images=1)
    scales = parse_scales(args.scales)
    from draftune.evaluation.criterion import parse_criterion
    from draftune.evaluation.eval_spec import resolve_eval_spec
    from draftune.evaluation.lora_scale import sweep
    from draftune.runs.load import resolve_lora

    if args.metric_for_best_model:
        parse_criterion(args.metric_for_best_model)
    tuned = resolve_lora(args.source, args.model, args.skip_text_encoder_lora, ModelOptions.of(args))
    source = user_path(args.source)
    output = folder_output(args.output or str((source if source.is_dir() else source.parent) / "sweep"), "--output")
    yardstick = resolve_eval_spec(
        [tuned], args.prompts, args.reward, args.eval_rewards, args.num_images, args.reward_precision
    )
    tuned = replace(tuned, settings=with_drawing(tuned.settings, args))
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
    result = sweep(tuned, yardstick, scales, args.metric_for_best_model, args.device)
    with writing_to(output):
        result.write(output)
    prompts, each = len(yardstick.prompts), yardstick.num_images
    print(f"{prompts * each} images of {prompts} prompts at each scale, the same seeds\n{result.table()}")
    print(f"\nimages  {output / 'sweep.png'}")
    with writing_to(output):
        try:
            result.write_curves(output)
            print(f"curves  {output / 'curve.png'}")
        except DraftuneError as error:
            logger.warning(str(error))  # without matplotlib, the scores and the images are there
    print(f"\n{result.advice}")
    if result.recommended:
        chosen = f"{shlex.quote(args.source)} --lora-scale {result.recommended:g}"
        print(f"  draftune sample {chosen} --prompt … --output …")
        print(f"  draftune export {chosen} --format diffusers --output …")


COMMAND = Command(
    "sweep",
    "evaluate a LoRA at several scales and recommend one",
    "Score images of a LoRA at several scales, with the same prompts and seeds, and recommend a scale.",
    "draftune sweep runs/a --scales 0,0.5,0.75,1 --num-images 4",
    arguments,
    run,
)
