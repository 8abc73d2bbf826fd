"""The command `draftune sample`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from draftune.cli.common import (
    Command,
    add_drawing,
    add_number,
    add_reward_precision,
    check_numbers,
    filled,
    load_source,
    writing_to,
)
from draftune.errors import DraftuneError
from draftune.utils.paths import image_output

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE_METHOD = "pgdiff_dynamic"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=filled, metavar="RUN_OR_LORA", help="run folder, LoRA file or its folder, or a model"
    )
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="prompts of the images")
    parser.add_argument(
        "--output",
        type=filled,
        required=True,
        metavar="FILE_OR_DIR",
        help="a .png file (a grid for several images) or a folder",
    )
    add_number(parser, "--seed", 0, "S", "seed of the first image of each prompt")
    add_number(parser, "--num-images", 1, "N", "images of each prompt, 1 or more")
    parser.add_argument(
        "--guidance-reward",
        type=filled,
        metavar="EXPR",
        help="guide sampling by the gradient of this reward, without training; see 'draftune list rewards'",
    )
    parser.add_argument(
        "--guidance-method",
        type=filled,
        metavar="METHOD",
        help=f"guidance method with its settings, such as {GUIDANCE_METHOD}(strength=0.1) or "
        f"gradient_guidance(rounds=8) (default: {GUIDANCE_METHOD}; see 'draftune list guidance')",
    )
    add_reward_precision(parser)
    add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, num_images=1)
    output, one_file = image_output(args.output)
    from draftune.evaluation.reward_check import tell_truncated
    from draftune.utils.images import grid, save_image, to_pil

    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.num_images)]
    summary = ""
    if args.guidance_reward is None:
        if alone := [name for name in ("guidance_method", "reward_precision") if getattr(args, name) is not None]:
            raise DraftuneError(f"--{alone[0].replace('_', '-')} needs --guidance-reward")
        model, settings = load_source(args)
        tell_truncated(args.prompt, model, (), settings.negative_prompt)
        schedule = model.schedule(settings.num_inference_steps)
        guidance, negative = settings.guidance_scale, settings.negative_prompt
        images = model.sample_tensors(prompts, seeds, schedule, guidance, negative, settings.batch_size, progress=True)
    else:
        images, summary = guided(args, prompts, seeds)

    with writing_to(output):
        if one_file and len(images) == 1:
            save_image(to_pil(images)[0], output)
        elif one_file:
            rows = list(images.split(args.num_images))
            seed_labels = [f"seed {seed}" for seed in seeds[: args.num_images]]
            save_image(grid(rows, args.prompt, seed_labels), output)
        else:
            for i, (image, seed) in enumerate(zip(to_pil(images), seeds, strict=True)):
                words = "".join(c if c.isalnum() else "-" for c in prompts[i])[:60]
                save_image(image, output / f"{i:03d}-{words}-seed{seed}.png")
    print(f"{summary}{output}")


def guided(args: argparse.Namespace, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, str]:
    """Sample with reward guidance.

    Returns:
        Images [B, 3, H, W] and a line with the mean reward of each round.
    """
    from draftune.evaluation.reward_check import tell_truncated
    from draftune.guidance.methods import load_guide
    from draftune.guidance.sample import sample_guided
    from draftune.rewards import load_reward, parse_reward

    # Before the model is loaded, so that a wrong method or a missing reward fails early.
    method = args.guidance_method or GUIDANCE_METHOD
    load_guide(method)
    reward = parse_reward(args.guidance_reward)
    model, settings = load_source(args)
    tell_truncated(args.prompt, model, [load_reward(reward, args.reward_precision)], settings.negative_prompt)
    result = sample_guided(
        model,
        reward,
        prompts,
        method,
        seeds=seeds,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        batch_size=settings.batch_size,
        progress=True,
    )
    means = " → ".join(f"{mean:.3f}" for mean in result.rewards.mean(1).tolist())
    return result.images, f"{args.guidance_reward}  {means}; {result.queries} reward queries\n"


COMMAND = Command(
    "sample",
    "sample images with a LoRA or a model",
    "Samples images with a run's LoRA, a LoRA file, or a model without a LoRA.",
    'draftune sample runs/first --prompt "cat face" "pizza" --lora-scale 0.7 --output cats.png',
    arguments,
    run,
)
