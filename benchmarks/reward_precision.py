"""Compare rewards whose linear layers are stored in bfloat16 with the same rewards in float32, on 50 images.

    python benchmarks/reward_precision.py
    python benchmarks/reward_precision.py emoji_clip clip

`emoji_clip` and `emoji_aesthetic` have trained weights. The others are the small random networks of
`benchmarks/official.py` whose official code is installed. The images and prompts are those of that script. Errors are
relative to the standard deviation of the scores over the images. The cosine is the smallest one of an image's gradient.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from draftune.rewards import Reward, load_reward
from draftune.utils.images import from_pil
from official import PAIRS, PROMPTS, test_images

TRAINED = ("emoji_clip", "emoji_aesthetic")


def score(reward: Reward, image: Image.Image, prompt: str) -> tuple[Tensor, Tensor]:
    """Return the score and the gradient of one image."""
    pixels = from_pil(image).requires_grad_()
    value = reward(pixels, [prompt])
    (gradient,) = torch.autograd.grad(value.sum(), pixels)
    return value.detach()[0], gradient.flatten()


def row(name: str, folder: Path) -> str:
    """Return the table row of one reward."""
    try:
        rewards = [load_reward(name if name in TRAINED else PAIRS[name](folder)[0], p) for p in ("no", "bf16")]
    except (ImportError, FileNotFoundError) as error:
        return f"| {name} | not installed ({str(error).splitlines()[0]}) | | | |"
    pairs = [(image, prompt or "a") for image, prompt in zip(test_images(), PROMPTS.split("|"), strict=True)]
    sizes, results = [], []
    for reward in rewards:
        sizes.append(sum(p.nbytes for p in reward.parameters()))
        results.append([score(reward, *pair) for pair in pairs])
    plain, rounded = (torch.stack([value for value, _ in result]) for result in results)
    cosines = [torch.cosine_similarity(a[1], b[1], dim=0) for a, b in zip(*results, strict=True)]
    largest = float((plain - rounded).abs().max() / plain.std())
    return f"| {name} | {sizes[1] / sizes[0]:.2f} | {plain.std():.3g} | {largest:.1e} | {float(min(cosines)):.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="*", default=[*TRAINED, *PAIRS], metavar="REWARD")
    print("| reward | memory | std of scores | largest error / std | smallest cosine of gradients |")
    print("|---|---|---|---|---|")
    for name in parser.parse_args().rewards:
        with TemporaryDirectory() as folder:
            print(row(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
