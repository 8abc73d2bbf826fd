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
    "held-out/emoji-judge-name": "judge: shows what the prompt names",
    "held-out/emoji-judge-style": "judge: probability of the 3D style",
    "held-out/diversity": "diversity within a prompt",
}
OVERVIEW = ("emoji-aesthetic", "color", "symmetry", "jpeg-compressibility", "jpeg-incompressibility", "classify")
HEAD = """# What each reward does

Each section is one command on the embedded model. Training uses the prompts of the set `emoji`. Images show the 64
names of `emoji-common`, which are not trained on, with the same seeds before and after. The last rows measure the saved
images by code that the reward does not share. Made by `python benchmarks/gallery.py` on 2 CPU cores with torch 2.13.0.
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
LAYOUT = "--method 'draft-k(k=10)' --learning-rate 2e-3"
EXPERIMENTS = [
    Experiment(
        "jpeg-compressibility",
        "--reward jpeg-compressibility",
        SIZE,
        "Smooth images: spots, toppings and faces disappear first, with longer training the background and the "
        "subject.",
    ),
    Experiment(
        "jpeg-incompressibility",
        "--reward jpeg-incompressibility",
        SIZE,
        "Detailed images: outlines, gaps, specks. With longer training, noise.",
    ),
    Experiment(
        "symmetry",
        f"--reward symmetry {LAYOUT}",
        {"difference from the mirror image, levels of 255": difference(ImageOps.mirror)},
        "Objects turn to the front, and objects shown from the side lose their shape. The reward is about layout, so "
        "the gradient flows through ten steps. With `--method 'draft-k(k=1)'` the reward rises to 0.907, but through "
        "blurring: the judge recognizes 0.594 of the images. With `'drtune(k=5, m=5)'` the values are 0.874 and "
        "0.758.",
    ),
    Experiment(
        "rotation",
        f"--reward rotation {LAYOUT}",
        {"difference from itself upside down, levels of 255": difference(lambda p: p.rotate(180))},
        "Rounder shapes of one color.",
    ),
    Experiment(
        "color",
        "--reward 'color(target=orange)'",
        {"share of orange pixels": share_of_hue("orange")},
        "Everything becomes orange, and objects disappear.",
    ),
    Experiment(
        "classify",
        "--reward 'classify(target=902)' --learning-rate 2e-3 --steps 120",
        {"share that the classifier calls a whistle (902) first": top1(902)},
        "Adversarial examples: EfficientNet-Lite0, with its published weights, classifies half of the images as a "
        "whistle, although none shows one.",
    ),
    Experiment(
        "emoji-aesthetic",
        "--reward emoji-aesthetic",
        {},
        "Glossy 3D emoji, according to a judge that is not trained against.",
    ),
    Experiment(
        "emoji-clip",
        "--reward emoji-clip --guidance-scale 1 --steps 120 --eval-prompts emoji --eval-images 1",
        {},
        "Without guidance the judge recognizes few of the base model's images of rare names. Training on the cosine "
        "of image and prompt raises that share; the images remain rough. (These images show the 635 training prompts, "
        "of which 480 were used once.)",
    ),
    Experiment(
        "sum",
        "--reward 'emoji-aesthetic + 0.03*jpeg-compressibility'",
        SIZE,
        "A sum of two rewards: gloss without detail. Each part is logged separately.",
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

| {result["pictures"]} images | before | after |
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
