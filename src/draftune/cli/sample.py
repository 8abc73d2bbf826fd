"""Drawing pictures with a trained LoRA."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from draftune.cli.common import Command, add_drawing, check_numbers, filled, load_source, writing_to
from draftune.errors import DraftuneError
from draftune.utils.paths import image_output

if TYPE_CHECKING:
    from torch import Tensor


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=filled, metavar="RUN_OR_LORA", help="a run's folder, a LoRA file or its folder, or a model"
    )
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="what to draw")
    parser.add_argument(
        "--output", type=filled, required=True, metavar="FILE_OR_DIR", help="a .png (a grid if several) or a folder"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture of each prompt")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt")
    parser.add_argument(
        "--guide",
        type=filled,
        metavar="EXPR",
        help="a reward that leads the drawing, without training; see 'draftune list rewards'",
    )
    parser.add_argument(
        "--guide-method",
        type=filled,
        metavar="METHOD",
        help="how: ratio(strength=0.1), look-ahead(rounds=8), … (default: ratio; see 'draftune list guidance')",
    )
    add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, num_images=1)
    output, one_file = image_output(args.output)
    from draftune.evaluation.reward_check import tell_truncated
    from draftune.utils.images import grid, save_image, to_pil

    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.num_images)]
    said = ""
    if args.guide is None and args.guide_method is not None:
        raise DraftuneError("--guide-method says how to follow the reward of --guide, which is not given")
    if args.guide is None:
        model, settings = load_source(args)
        tell_truncated(args.prompt, model, (), settings.negative_prompt)
        schedule = model.schedule(settings.num_inference_steps)
        pictures = model.generate(
            prompts, seeds, schedule, settings.guidance_scale, settings.negative_prompt, progress=True
        )
    else:
        pictures, said = guided(args, prompts, seeds)

    with writing_to(output):
        if one_file and len(pictures) == 1:
            save_image(to_pil(pictures)[0], output)
        elif one_file:
            rows = list(pictures.split(args.num_images))
            seed_labels = [f"seed {seed}" for seed in seeds[: args.num_images]]
            save_image(grid(rows, args.prompt, seed_labels), output)
        else:
            for i, (picture, seed) in enumerate(zip(to_pil(pictures), seeds, strict=True)):
                words = "".join(c if c.isalnum() else "-" for c in prompts[i])[:60]
                save_image(picture, output / f"{i:03d}-{words}-seed{seed}.png")
    print(f"{said}{output}")


def guided(args: argparse.Namespace, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, str]:
    """The pictures [B, 3, H, W], and a line about their reward."""
    from draftune.evaluation.reward_check import tell_truncated
    from draftune.guidance.methods import load_guide, sample_guided
    from draftune.rewards import find_reward

    # What is missing of the reward or wrong with the method is said before the model is read.
    method = args.guide_method or "ratio"
    load_guide(method)
    reward = find_reward(args.guide)
    model, settings = load_source(args)
    tell_truncated(args.prompt, model, [reward.ready()], settings.negative_prompt)
    found = sample_guided(
        model,
        reward,
        prompts,
        method,
        seeds=seeds,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        progress=True,
    )
    means = " → ".join(f"{mean:.3f}" for mean in found.rewards.mean(1).tolist())
    return found.pictures, f"{args.guide}  {means}; {found.queries} scored pictures\n"


COMMAND = Command(
    "sample",
    "draw pictures with a trained LoRA",
    "Draws pictures with a run's LoRA, a LoRA file, or a model as it is.",
    'draftune sample runs/first --prompt "cat face" "pizza" --lora-scale 0.7 --output cats.png',
    arguments,
    run,
)
