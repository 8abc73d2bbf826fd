"""Measure the numbers of the model cards: scores of the judge and the rewards on generated and on real emoji.

python recipes/emoji/measure.py --data build/emoji [--model build/emoji/model] [--grid grid.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from common import to_float
from data import COMMON, STYLES, Emoji
from draftune.evaluation.metrics import diversity, score_batches
from draftune.models import load_model
from draftune.recommended import recommended
from draftune.rewards import load_reward
from draftune.utils.images import grid, save_image

JUDGES = "emoji_name_accuracy + emoji_style_probability(style='3d') + emoji_aesthetic + emoji_clip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=recommended("emoji")["guidance_scale"])
    parser.add_argument("--num-inference-steps", type=int, default=recommended("emoji")["num_inference_steps"])
    parser.add_argument("--grid", type=Path, help="file for an image grid of all 64 names")
    args = parser.parse_args()

    judges = load_reward(JUDGES)
    emoji = Emoji.load(args.data)
    images = (to_float(emoji.images) + 1) / 2
    for style in STYLES:
        index = [
            i for i, (n, s) in enumerate(zip(emoji.names, emoji.styles, strict=True)) if n in COMMON and s == style
        ]
        show(f"real, {style}", score_batches(judges, images[index], [emoji.names[i] for i in index]))

    model = load_model(args.model)
    schedule = model.schedule(args.num_inference_steps)
    prompts = [name for name in COMMON for _ in range(args.seeds)]
    seeds = [seed for _ in COMMON for seed in range(args.seeds)]
    samples = model.generate(prompts, seeds, schedule, args.guidance_scale, batch_size=32, progress=True)
    show(f"generated, {args.seeds} seeds", score_batches(judges, samples, prompts))
    print(f"diversity within a name {diversity(judges, samples, args.seeds).mean():.3f}")
    for style in STYLES:
        styled = [f"{style} {name}" for name in COMMON]
        styled_samples = model.generate(styled, [0] * len(COMMON), schedule, args.guidance_scale, batch_size=32)
        show(f'generated as "{style} …"', score_batches(judges, styled_samples, styled))
    if args.grid:
        # Eight names a row, two seeds of each.
        shown = samples.reshape(len(COMMON), args.seeds, *samples.shape[1:])[:, :2].flatten(0, 1)
        captions = [name for name in COMMON for _ in range(2)]
        save_image(grid(list(shown.split(16)), captions=[captions[i : i + 16] for i in range(0, 128, 16)]), args.grid)


def show(what: str, scores: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    """Print the mean of each score."""
    means = ", ".join(f"{name} {float(values.mean()):.3f}" for name, values in scores[1].items())
    print(f"{what}: {means}", flush=True)


if __name__ == "__main__":
    main()
