"""The command `draftune optimize-noise`."""

from __future__ import annotations

import argparse

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
from draftune.utils.paths import image_output


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=filled, metavar="MODEL_OR_RUN", help="model, run folder, LoRA file or its folder"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="prompt of the image")
    parser.add_argument(
        "--reward", required=True, metavar="EXPR", help="differentiable reward; see 'draftune list rewards'"
    )
    parser.add_argument(
        "--output",
        type=filled,
        required=True,
        metavar="FILE_OR_DIR",
        help="a .png file (both images side by side) or a folder (before.png and after.png)",
    )
    add_number(parser, "--steps", 50, "N", "updates of the noise, 1 or more")
    add_number(parser, "--learning-rate", 5.0, "A", "learning rate of SGD with Nesterov momentum, 0 or more")
    add_number(parser, "--seed", 0, "S", "seed of the initial noise")
    add_reward_precision(parser)
    add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, steps=1, learning_rate=0)
    output, one_file = image_output(args.output)
    import torch

    from draftune.evaluation.reward_check import tell_truncated
    from draftune.guidance.noise_optimization import optimize_noise
    from draftune.rewards import load_reward, parse_reward
    from draftune.utils.images import grid, save_image, to_pil

    # Before the model is loaded, so that a missing reward fails early.
    reward = parse_reward(args.reward)
    model, settings = load_source(args)
    tell_truncated([args.prompt], model, [load_reward(reward, args.reward_precision)], settings.negative_prompt)
    search = optimize_noise(
        model,
        reward,
        args.prompt,
        seed=args.seed,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        steps=args.steps,
        learning_rate=args.learning_rate,
        progress=True,
    )
    before, after = search.rewards[0], search.rewards[search.best_step]
    images = torch.cat([search.first, search.best])
    names = ["before", "after"]
    with writing_to(output):
        if one_file:
            save_image(grid([images], [args.prompt], names, [[f"{before:.3g}", f"{after:.3g}"]]), output)
        else:
            for name, image in zip(names, to_pil(images), strict=True):
                save_image(image, output / f"{name}.png")
    where = f"at step {search.best_step} of {args.steps}; {search.queries} reward queries"
    print(f"{args.reward}  {before:.3f} → {after:.3f}  {where}\n{output}")


COMMAND = Command(
    "optimize-noise",
    "optimize the initial noise of one image on a reward, without training",
    "Maximizes a reward over the initial noise of one image; no weight changes (ReNO, arXiv:2406.04312).",
    'draftune optimize-noise emoji --prompt "cat face" --reward emoji_aesthetic --steps 15 --output cat.png',
    arguments,
    run,
)
