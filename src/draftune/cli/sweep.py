"""The LoRA's scale as a dial."""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import replace

from draftune.cli.common import Command, add_drawing, check_numbers, drawing_flags, filled, writing_to
from draftune.cli.evaluate import add_yardstick
from draftune.errors import DraftuneError
from draftune.utils.paths import folder_output, user_path

DEFAULT = "0,0.25,0.5,0.75,1,1.25,1.5"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=filled, metavar="RUN", help="a run's folder, a LoRA file or its folder")
    parser.add_argument(
        "--scales", default=DEFAULT, metavar="A,B,…", help=f"0, the base model, is always one (default: {DEFAULT})"
    )
    add_yardstick(parser)
    parser.add_argument(
        "--best-by", metavar="RULE", help="what is to be highest, as in the run unless set: a sum of scores"
    )
    parser.add_argument(
        "--output", type=filled, metavar="DIR", help="of pictures, curves and tables (default: RUN/sweep)"
    )
    add_drawing(parser, scale=False)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, num_images=1)
    scales = numbers(args.scales)
    from draftune.evaluation.criterion import weights_of
    from draftune.evaluation.eval_spec import find_yardstick
    from draftune.evaluation.lora_scale import sweep
    from draftune.runs.load import find_tuned

    if args.best_by:
        weights_of(args.best_by)
    tuned = find_tuned(args.source, args.model, args.skip_text_encoder_lora)
    source = user_path(args.source)
    output = folder_output(args.output or str((source if source.is_dir() else source.parent) / "sweep"), "--output")
    yardstick = find_yardstick([tuned], args.prompts, args.reward, args.held_out, args.num_images)
    tuned = replace(tuned, settings=replace(tuned.settings, **drawing_flags(args)))
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
    found = sweep(tuned, yardstick, scales, args.best_by, args.cpu, args.mixed_precision)
    with writing_to(output):
        found.write(output)
    prompts, each = len(yardstick.prompts), yardstick.num_images
    print(f"{prompts * each} pictures of {prompts} prompts at each scale, the same seeds\n{found.table()}")
    print(f"\npictures  {output / 'sweep.png'}\ncurves    {output / 'curve.png'}\n\n{found.advice}")
    if found.recommended:
        chosen = f"{shlex.quote(args.source)} --lora-scale {found.recommended:g}"
        print(f"  draftune sample {chosen} --prompt … --output …")
        print(f"  draftune export {chosen} --format diffusers --output …")


def numbers(text: str) -> list[float]:
    """Raises DraftuneError for anything but finite numbers with commas between them."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise DraftuneError(f"--scales takes numbers such as 0,0.5,1, not {text!r}")
    return found


COMMAND = Command(
    "sweep",
    "try a LoRA at several scales and recommend one",
    "Draws the same prompts and seeds at several scales of a LoRA, and recommends one by the held-out rewards.",
    "draftune sweep runs/a --scales 0,0.5,0.75,1 --num-images 4",
    arguments,
    run,
)
