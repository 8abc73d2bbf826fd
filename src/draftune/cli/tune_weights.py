"""The command `draftune experimental tune-weights`."""

from __future__ import annotations

import argparse
import math
import shlex

from draftune.cli.common import (
    Command,
    add_drawing,
    add_number,
    add_reward_precision,
    check_numbers,
    filled,
    writing_to,
)
from draftune.errors import DraftuneError
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import check_writable, user_path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "loras",
        type=filled,
        nargs="*",
        metavar="LORA@WEIGHT",
        help="run folder, LoRA file or its folder, and its initial weight (default: 1); any number of them",
    )
    parser.add_argument("--reward", type=filled, required=True, metavar="EXPR", help="see 'draftune list rewards'")
    parser.add_argument(
        "--output", type=filled, required=True, metavar="DIR", help="new folder for weights.json and steps.csv"
    )
    parser.add_argument("--merge", action="store_true", help="also merge the LoRAs at the tuned weights, into DIR/lora")
    parser.add_argument(
        "--weight-bounds", default="0,1.5", metavar="A,B", help="bounds of the LoRA weights (default: 0,1.5)"
    )
    parser.add_argument(
        "--guidance-bounds", metavar="A,B", help="also tune the guidance scale between these bounds, at least 1"
    )
    parser.add_argument(
        "--prompts", type=filled, metavar="FILE_OR_SET", help="prompts (default: those of the first LoRA's run)"
    )
    add_number(parser, "--steps", 20, "N", "Adam steps, 1 or more")
    add_number(parser, "--batch-size", 4, "N", "images at each evaluated point, 1 or more")
    add_number(parser, "--num-parameters", 4, "N", "finite differences in a step, 1 or more, with 2 points each")
    add_number(parser, "--fd-step", 0.1, "A", "finite-difference step, as a fraction of the range, below 0.5")
    add_number(parser, "--learning-rate", 0.05, "A", "learning rate of Adam, as a fraction of the range, below 1")
    add_number(parser, "--num-images", 16, "N", "other images for the final comparison, 2 or more")
    add_number(parser, "--seed", 0, "S", "seed of prompts, noise and points")
    add_reward_precision(parser)
    add_drawing(parser, scale=False)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, steps=1, batch_size=1, num_parameters=1, fd_step=0, learning_rate=0, num_images=2)
    weights, guidance = bounds(args, "weight_bounds"), bounds(args, "guidance_bounds")
    folder = user_path(args.output)
    check_writable(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DraftuneError(f"the output {args.output!r} already exists; give a new folder (--output)")
    if args.merge and not args.loras:
        raise DraftuneError("--merge needs at least one LoRA")
    from draftune.experimental.tune_weights import GUIDANCE, tune_weights
    from draftune.runs.merge import merge_loras, weighted

    assert weights is not None
    search = tune_weights(
        [weighted(text) for text in args.loras],
        args.reward,
        args.prompts,
        model=args.model,
        weight_bounds=weights,
        guidance_bounds=guidance,
        steps=args.steps,
        batch_size=args.batch_size,
        num_parameters=args.num_parameters,
        fd_step=args.fd_step,
        learning_rate=args.learning_rate,
        num_images=args.num_images,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt,
        skip_text_encoder=args.skip_text_encoder_lora,
        options=ModelOptions.of(args),
        device=args.device,
        mixed_precision=args.mixed_precision,
        quantization=args.quantization,
        reward_precision=args.reward_precision,
        progress=True,
    )
    with writing_to(folder):
        search.write(folder)
        if args.merge:
            merge_loras(search.weights, folder / "lora", args.model, args.skip_text_encoder_lora, ModelOptions.of(args))
    width = max(len(parameter.name) for parameter in search.parameters)
    for parameter in search.parameters:
        print(f"{parameter.name:{width}}  {parameter.start:7.3f} → {search.values[parameter.name]:7.3f}")
    gain, low, high = search.difference
    print(
        f"\n{args.reward}  {float(search.before.mean()):.3f} → {float(search.after.mean()):.3f}: {gain:+.3f} "
        f"(95% CI {low:+.3f} to {high:+.3f}) on {args.num_images} other images; {search.queries} reward queries"
    )
    if low <= 0:
        print("no measurable improvement: raise --steps, --batch-size or --num-images")
    print(folder)
    scale = f" --guidance-scale {search.values[GUIDANCE]:.3g}" if guidance else ""
    loras = [shlex.quote(f"{source}@{weight:.3g}") for source, weight in search.weights]
    if loras and not args.merge:
        print(f"  draftune merge {' '.join(loras)} --output …")
    source = args.output if args.merge else "…" if loras else args.model
    print(f"  draftune sample {shlex.quote(source) if source != '…' else source}{scale} --prompt … --output …")


def bounds(args: argparse.Namespace, name: str) -> tuple[float, float] | None:
    """Parse two finite numbers separated by a comma, the lower first. Raise DraftuneError for anything else."""
    text = getattr(args, name)
    if text is None:
        return None
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not (low < high and math.isfinite(high - low)):
        raise DraftuneError(f"--{name.replace('_', '-')} must be two numbers such as 0,1.5, got {text!r}")
    return low, high


COMMAND = Command(
    "experimental tune-weights",
    "tune LoRA weights and the guidance scale on a reward",
    "Maximizes a reward over the weights of LoRAs and the guidance scale by finite differences, without a gradient.",
    "draftune experimental tune-weights runs/style@0.7 runs/orange@0.5 --reward emoji_aesthetic --output runs/weights",
    arguments,
    run,
)
