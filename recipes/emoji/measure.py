"""Measure the numbers of the model card: scores, edge energy and kernel distance of generated and of real emoji.

    python recipes/emoji/measure.py --data build/emoji [--model build/emoji/model] [--grid grid.png]

Each line is one set of images of the 64 common names:

- mean scores of the judge and the rewards, which resize images to their own input size,
- edge energy, the mean squared difference of neighboring pixels, over that of the real images of the same styles,
- KID (Bińkowski et al., 2018, arXiv:1801.01401) times 1,000 on the judge's features to the real images of these styles.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from common import edge_energy, to_float
from data import COMMON, STYLES, Emoji
from draftune.evaluation.kid import kid
from draftune.evaluation.metrics import diversity, score_batches
from draftune.models import load_model
from draftune.rewards import load_reward
from draftune.utils.images import grid, save_image

JUDGES = "emoji_name_accuracy + emoji_style_probability(style='{style}') + emoji_aesthetic + emoji_clip"


class Measure:
    """Prints one line for each set of images, with the real images to compare it with."""

    def __init__(self, emoji: Emoji, style: str = "3d") -> None:
        self.judges = load_reward(JUDGES.format(style=style))
        self.judge = load_reward("emoji_style_probability")
        images = (to_float(emoji.images) + 1) / 2
        number = {pair: i for i, pair in enumerate(zip(emoji.names, emoji.styles, strict=True))}
        self.real = {style: images[[number[name, style] for name in COMMON]] for style in STYLES}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the judge's unit features times sqrt(D), whose KID kernel is (cosine + 1)^3."""
        unit = torch.cat([self.judge.features(batch) for batch in images.split(64)])
        return unit * unit.shape[1] ** 0.5

    def show(self, what: str, images: Tensor, prompts: list[str], styles: tuple[str, ...] = STYLES) -> None:
        """Print mean scores, and edge energy and KID against the real images of these styles."""
        scores = score_batches(self.judges, images, prompts)[1]
        means = ", ".join(f"{name} {float(values.mean()):.3f}" for name, values in scores.items())
        real = torch.cat([self.real[style] for style in styles])
        edge = edge_energy(images) / edge_energy(real)
        distance = 1000 * kid(self.features(images), self.features(real))
        print(f"{what}: {means}, edge energy {edge:.3f}, KID {distance:.1f}", flush=True)


@torch.no_grad()
def reconstructed(vae: torch.nn.Module, images: Tensor) -> Tensor:
    """Encode and decode images in [0, 1]."""
    batches = images.to(vae.device).mul(2).sub(1).split(32)
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample.cpu() for x in batches])
    return decoded.add(1).div(2).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--grid", type=Path, help="file for an image grid of all 64 names")
    args = parser.parse_args()

    model = load_model(args.model)
    measure = Measure(Emoji.load(args.data))
    names = list(COMMON)
    for style in STYLES:
        measure.show(f"real, {style}", measure.real[style], names, (style,))
        decoded = reconstructed(model.pipeline.vae, measure.real[style])
        measure.show(f"encoded and decoded, {style}", decoded, names, (style,))

    schedule = model.schedule(args.num_inference_steps)
    prompts = [name for name in COMMON for _ in range(args.seeds)]
    seeds = [seed for _ in COMMON for seed in range(args.seeds)]
    samples = model.sample_tensors(prompts, seeds, schedule, args.guidance_scale, batch_size=32, progress=True)
    measure.show(f"generated, {args.seeds} seeds", samples, prompts)
    print(f"diversity within a name {diversity(measure.judges, samples, args.seeds).mean():.3f}")
    for style in STYLES:
        styled = [f"{style} {name}" for name in COMMON]
        images = model.sample_tensors(styled, [0] * len(COMMON), schedule, args.guidance_scale, batch_size=32)
        measure.show(f'generated as "{style} …"', images, styled, (style,))
    if args.grid:
        # Eight names a row, two seeds of each.
        shown = samples.reshape(len(COMMON), args.seeds, *samples.shape[1:])[:, :2].flatten(0, 1)
        captions = [name for name in COMMON for _ in range(2)]
        save_image(grid(list(shown.split(16)), captions=[captions[i : i + 16] for i in range(0, 128, 16)]), args.grid)


if __name__ == "__main__":
    main()
