"""Trains the embedded model on one reward after another and writes docs/gallery.md, with a measure apart for each.

    python benchmarks/gallery.py                # all of them: about 25 minutes on two CPU cores
    python benchmarks/gallery.py symmetry       # one

Each is what `draftune train` does with the flags that stand under its picture; what is measured besides is taken from
the pictures as they are saved, 8 bits a channel, by code that the reward does not share.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import io
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps
from safetensors.torch import load_file, save_file

from draftune.cli.main import build_parser
from draftune.cli.train import train_settings
from draftune.rewards.classify import Classify
from draftune.training import train
from draftune.utils.images import from_pil, grid, save_image, to_pil

DOCS = Path(__file__).parent.parent / "docs"
RUNS = Path("runs/gallery")
NAMES = {
    "held-out/emoji_name_accuracy": "judge: shows what the prompt names",
    "held-out/emoji_style_probability": "judge: probability of the 3D style",
    "held-out/diversity": "diversity within a prompt",
}
OVERVIEW = ("emoji_aesthetic", "color", "symmetry", "jpeg_compressibility", "jpeg_incompressibility", "classify")
HEAD = """# What the rewards do

Each is one command on the embedded model: prompts of the set `emoji`, pictures of the 64 names of `emoji-common`, none
of which was trained on, the same seeds before and after. The last rows are measured on the pictures as they are saved,
by code that the reward does not share. Made by `python benchmarks/gallery.py` on 2 CPU cores with torch 2.13.0. What
each reward is: [rewards.md](rewards.md).
"""
Measure = Callable[[Sequence[Image.Image]], float]


def jpeg_bytes(pictures: Sequence[Image.Image]) -> float:
    sizes = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=75)
        sizes.append(file.tell())
    return float(np.mean(sizes))


def difference(turn: Callable[[Image.Image], Image.Image]) -> Measure:
    """The mean difference of a picture's pixels from the turned picture's, in levels of 255."""

    def measure(pictures: Sequence[Image.Image]) -> float:
        pairs = [(np.asarray(p, dtype=float), np.asarray(turn(p), dtype=float)) for p in pictures]
        return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))

    return measure


def share_of_hue(color: str) -> Measure:
    """The share of pixels with a clear colour whose hue is within 30 degrees of the colour's."""
    hue = Image.new("RGB", (1, 1), ImageColor.getrgb(color)).convert("HSV").getpixel((0, 0))[0]

    def measure(pictures: Sequence[Image.Image]) -> float:
        hsv = np.stack([np.asarray(p.convert("HSV"), dtype=float) for p in pictures])
        away = np.abs((hsv[..., 0] - hue + 128) % 256 - 128) * 360 / 256
        return float(((away < 30) & (hsv[..., 1] > 64)).mean())

    return measure


def top1(target: int) -> Measure:
    """How often the target is the classifier's first choice."""

    def measure(pictures: Sequence[Image.Image]) -> float:
        judge = Classify(str(target), "efficientnet-lite0").ready()
        return float(np.mean([int(judge.logits(from_pil(p)).argmax()) == target for p in pictures]))  # type: ignore[operator]

    return measure


@dataclass
class Experiment:
    name: str
    flags: str
    measures: dict[str, Measure]
    text: str


SIZE: dict[str, Measure] = {"bytes as a JPEG of quality 75": jpeg_bytes}
LAYOUT = "--method 'draft_k(k=10)' --learning-rate 2e-3"
EXPERIMENTS = [
    Experiment(
        "jpeg_compressibility",
        "--reward jpeg_compressibility",
        SIZE,
        "Smooth pictures: spots, toppings and faces go first. Trained on, the background and then the subject follow.",
    ),
    Experiment(
        "jpeg_incompressibility",
        "--reward jpeg_incompressibility",
        SIZE,
        "Busy pictures: outlines, gaps, specks. It ends in noise.",
    ),
    Experiment(
        "symmetry",
        f"--reward symmetry {LAYOUT}",
        {"difference from the mirror image, levels of 255": difference(ImageOps.mirror)},
        "Left and right alike: what has a front turns to show it, and what is only drawn from the side loses its "
        "shape. The reward is about layout, so the gradient runs through ten steps. With `--method 'draft_k(k=1)'` it "
        "rises as well, to 0.907, but by blurring what is not alike: the judge names 0.594; with `'drtune(k=5, m=5)'` "
        "0.874 and 0.758.",
    ),
    Experiment(
        "rotation",
        f"--reward rotation {LAYOUT}",
        {"difference from itself upside down, levels of 255": difference(lambda p: p.rotate(180))},
        "Alike when turned by 180 degrees: rounder shapes of one colour, on the way to a blot.",
    ),
    Experiment(
        "color",
        "--reward 'color(target=orange)'",
        {"share of orange pixels": share_of_hue("orange")},
        "Everything orange, and soon nothing but orange.",
    ),
    Experiment(
        "classify",
        "--reward 'classify(target=902)' --learning-rate 2e-3 --steps 120",
        {"share that the classifier calls a whistle (902) first": top1(902)},
        "Adversarial examples: EfficientNet-Lite0, with its real weights, takes half of the pictures for a whistle, "
        "and there is none in them.",
    ),
    Experiment(
        "emoji_aesthetic",
        "--reward emoji_aesthetic",
        {},
        "The run of `make demo`: glossy 3D emoji. The judge that says so was not trained against.",
    ),
    Experiment(
        "emoji_clip",
        "--reward emoji_clip --guidance-scale 1 --steps 120 --eval-prompts emoji --eval-images 1",
        {},
        "Without guidance the base model misses most of the rare names. Trained on the cosine of picture and prompt, "
        "it draws more of them so that the judge can name them; to the eye they stay rough. (Here the pictures are of "
        "the training's own 635 prompts, of which 480 came up once.)",
    ),
    Experiment(
        "sum",
        "--reward 'emoji_aesthetic + 0.03*jpeg_compressibility'",
        SIZE,
        "A sum of two: the gloss without the detail. Each part is logged apart.",
    ),
]


def run(experiment: Experiment) -> None:
    """Trains, measures, and leaves the picture and the numbers for the page."""
    command = f"{experiment.flags} --output {RUNS / experiment.name}"
    args = build_parser().parse_args(["train", *shlex.split(command)])
    done = train(settings=train_settings(args))
    both = done.comparison
    assert both is not None
    base, tuned = both.base.images, both.tuned.images
    saved = to_pil(base), to_pil(tuned)
    rows = [[NAMES.get(name, f"`{name}`"), *values] for name, values in both.scores.items()]
    rows += [[name, *map(measure, saved)] for name, measure in experiment.measures.items()]
    result = {"rows": rows, "pictures": len(both.prompts), "seconds": done.metrics[-1]["seconds"]}
    (RUNS / f"{experiment.name}.json").write_text(json.dumps(result, indent=1))
    shown = slice(0, None, len(both.prompts) // 8)
    before, after = base[shown].contiguous(), tuned[shown].contiguous()
    save_image(grid([before, after], ["before", "after"], both.prompts[shown]), picture(experiment.name))
    save_file({"before": before, "after": after}, RUNS / f"{experiment.name}.safetensors")


def picture(name: str) -> Path:
    return DOCS / "gallery" / f"{name}.png"


def overview() -> None:
    """One picture of several rewards: a row each, under the base model's."""
    rows = {name: load_file(RUNS / f"{name}.safetensors") for name in OVERVIEW}
    pictures = [rows[OVERVIEW[0]]["before"], *(row["after"] for row in rows.values())]
    save_image(grid(pictures, ["base", *rows]), DOCS / "rewards.png")


def section(experiment: Experiment) -> str:
    result = json.loads((RUNS / f"{experiment.name}.json").read_text())
    rows = "\n".join(f"| {name} | {before:.3f} | {after:.3f} |" for name, before, after in result["rows"])
    return f"""## {experiment.name}

{experiment.text}

![{experiment.name}, before and after](gallery/{experiment.name}.png)

```bash
draftune train {experiment.flags} --output runs/{experiment.name}
```

| {result["pictures"]} pictures | before | after |
|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which to train; all unless said")
    parser.add_argument("--page", action="store_true", help="train nothing, only write the page anew")
    args = parser.parse_args()
    for experiment in EXPERIMENTS:
        if not args.page and (not args.names or experiment.name in args.names):
            run(experiment)
    finished = [experiment for experiment in EXPERIMENTS if (RUNS / f"{experiment.name}.json").exists()]
    (DOCS / "gallery.md").write_text("\n".join([HEAD, *map(section, finished)]), encoding="utf-8")
    if finished == EXPERIMENTS:
        overview()


if __name__ == "__main__":
    main()
