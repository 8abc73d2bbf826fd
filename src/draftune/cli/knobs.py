"""LoRAs' weights and the guidance, tuned by a reward."""

from __future__ import annotations

import argparse
import math
import shlex

from draftune.cli.common import Command, add_drawing, check_numbers, filled, writing_to
from draftune.errors import DraftuneError
from draftune.utils.paths import check_writable, user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "loras",
        type=filled,
        nargs="*",
        metavar="LORA@WEIGHT",
        help="a run's folder, a LoRA file or its folder, and the weight it starts at; any number, 1 unless given",
    )
    parser.add_argument("--reward", type=filled, required=True, metavar="EXPR", help="see 'draftune list rewards'")
    parser.add_argument(
        "--output", type=filled, required=True, metavar="DIR", help="a new folder, of knobs.json and steps.csv"
    )
    parser.add_argument("--mix", action="store_true", help="also writes the LoRAs, at the weights found, as one there")
    parser.add_argument(
        "--weight-bounds", default="0,1.5", metavar="A,B", help="of the LoRAs' weights (default: 0,1.5)"
    )
    parser.add_argument("--guidance-bounds", metavar="A,B", help="tunes the guidance scale too, between these")
    parser.add_argument("--prompts", type=filled, metavar="FILE_OR_SET", help="as the run was trained on unless set")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="uphill (default: 20)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="pictures at each point (default: 4)")
    parser.add_argument(
        "--coordinates",
        type=int,
        default=4,
        metavar="N",
        help="knobs asked about in a step, 2 points each (default: 4)",
    )
    parser.add_argument(
        "--step", type=float, default=0.1, metavar="A", help="to each point, as a share of the range (default: 0.1)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=0.05, metavar="A", help="as a share of the range (default: 0.05)"
    )
    parser.add_argument(
        "--num-images", type=int, default=16, metavar="N", help="other pictures to check on in the end (default: 16)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts, noise and points (default: 0)")
    add_drawing(parser, scale=False)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, steps=1, batch_size=1, coordinates=1, step=0, learning_rate=0, num_images=2)
    weights, guidance = bounds(args, "weight_bounds"), bounds(args, "guidance_bounds")
    folder = user_path(args.output)
    check_writable(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DraftuneError(f"the output {args.output!r} is there already; give a new folder (--output)")
    if args.mix and not args.loras:
        raise DraftuneError("--mix wants LoRAs")
    from draftune.experimental.tune_weights import GUIDANCE, tune_knobs
    from draftune.runs.merge import weighted

    assert weights is not None
    found = tune_knobs(
        [weighted(text) for text in args.loras],
        args.reward,
        args.prompts,
        model=args.model,
        weight_bounds=weights,
        guidance_bounds=guidance,
        steps=args.steps,
        batch_size=args.batch_size,
        coordinates=args.coordinates,
        step=args.step,
        learning_rate=args.learning_rate,
        checked=args.num_images,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt,
        skip_text_encoder=args.skip_text_encoder_lora,
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        progress=True,
    )
    with writing_to(folder):
        found.write(folder)
        if args.mix:
            found.mix(folder / "lora")
    width = max(len(knob.name) for knob in found.knobs)
    for knob in found.knobs:
        print(f"{knob.name:{width}}  {knob.start:7.3f} → {found.found[knob.name]:7.3f}")
    gained, low, high = found.difference
    print(
        f"\n{args.reward}  {float(found.before.mean()):.3f} → {float(found.after.mean()):.3f}: {gained:+.3f}, "
        f"95 % {low:+.3f} to {high:+.3f}, on {args.num_images} other pictures; {found.queries} scored pictures"
    )
    if low <= 0:
        print("nothing was found that chance does not explain: --steps, --batch-size and --num-images tell more")
    print(folder)
    drawn = f" --guidance-scale {found.found[GUIDANCE]:.3g}" if guidance else ""
    loras = [shlex.quote(f"{source}@{weight:.3g}") for source, weight in found.weights]
    if loras and not args.mix:
        print(f"  draftune mix {' '.join(loras)} --output …")
    source = args.output if args.mix else "…" if loras else args.model
    print(f"  draftune sample {shlex.quote(source) if source != '…' else source}{drawn} --prompt … --output …")


def bounds(args: argparse.Namespace, name: str) -> tuple[float, float] | None:
    """Raises DraftuneError for anything but two finite numbers with a comma between them, the lower first."""
    text = getattr(args, name)
    if text is None:
        return None
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not (low < high and math.isfinite(high - low)):
        raise DraftuneError(f"--{name.replace('_', '-')} takes two numbers such as 0,1.5, not {text!r}")
    return low, high


COMMAND = Command(
    "knobs",
    "tune LoRAs' weights and the guidance by a reward",
    "Climbs a reward, with a gradient or without, by a few numbers: the weights of LoRAs and the guidance scale.",
    "draftune knobs runs/style@0.7 runs/orange@0.5 --reward 'emoji_aesthetic + 2*jpeg_file_size' --output runs/knobs",
    arguments,
    run,
)
