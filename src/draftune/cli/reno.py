"""One picture made better by its noise, without training."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, add_drawing, check_numbers, filled, load_source, writing_to
from draftune.utils.paths import image_output


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=filled, metavar="MODEL_OR_RUN", help="a model, a run's folder, a LoRA file or its folder"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    parser.add_argument("--reward", required=True, metavar="EXPR", help="see 'draftune list rewards'")
    parser.add_argument(
        "--output",
        type=filled,
        required=True,
        metavar="FILE_OR_DIR",
        help="a .png (both pictures, small) or a folder (before.png and after.png)",
    )
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of the noise (default: 50)")
    parser.add_argument("--learning-rate", type=float, default=5.0, metavar="A", help="of the noise (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise it starts from (default: 0)")
    add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, steps=1, learning_rate=0)
    output, one_file = image_output(args.output)
    import torch

    from draftune.guidance.noise_optimization import optimize_noise
    from draftune.rewards import find_reward
    from draftune.training.checks import tell_truncated
    from draftune.utils.images import grid, save_image, to_pil

    # What is missing of the reward is said before the model is read.
    reward = find_reward(args.reward)
    model, settings = load_source(args)
    tell_truncated([args.prompt], model, [reward.ready()], settings.negative_prompt)
    found = optimize_noise(
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
    before, after = found.rewards[0], found.rewards[found.best_step]
    pictures = torch.cat([found.first, found.best])
    names = ["before", "after"]
    with writing_to(output):
        if one_file:
            save_image(grid([pictures], [args.prompt], names, [[f"{before:.3g}", f"{after:.3g}"]]), output)
        else:
            for name, picture in zip(names, to_pil(pictures), strict=True):
                save_image(picture, output / f"{name}.png")
    where = f"at step {found.best_step} of {args.steps}; {found.queries} scored pictures"
    print(f"{args.reward}  {before:.3f} → {after:.3f}  {where}\n{output}")


COMMAND = Command(
    "reno",
    "make one picture better by its noise, without training",
    "Climbs a reward by the noise that one picture starts from; no weight changes (ReNO).",
    'draftune reno emoji --prompt "cat face" --reward emoji_aesthetic --steps 15 --output cat.png',
    arguments,
    run,
)
