"""Drawing pictures with a trained LoRA."""

from __future__ import annotations

import argparse

from draftune.commands.base import Command, add_drawing, check_numbers, filled, load_source, picture_output, writing_to


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
    add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    check_numbers(args, num_images=1)
    output, one_file = picture_output(args.output)
    from draftune.images import grid, save_image, to_pil

    model, settings = load_source(args)
    schedule = model.schedule(settings.num_inference_steps)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.num_images)]
    pictures = model.generate(
        prompts, seeds, schedule, settings.guidance_scale, settings.negative_prompt, progress=True
    )

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
    print(output)


COMMAND = Command(
    "sample",
    "draw pictures with a trained LoRA",
    "Draws pictures with a run's LoRA, a LoRA file, or a model as it is.",
    'draftune sample runs/first --prompt "cat face" "pizza" --lora-scale 0.7 --output cats.png',
    arguments,
    run,
)
