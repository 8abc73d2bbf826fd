"""Trains the embedded model on one reward after another and writes docs/gallery.md, with a measure apart for each.

    python benchmarks/gallery.py                # all of them: about 25 minutes on two CPU cores
    python benchmarks/gallery.py symmetry       # one

Each is what `draftune train` does with the flags that stand under its picture; what is measured besides is taken from
the pictures as they are saved, 8 bits a channel, by code that the reward does not share.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps

from draftune.cli import build_parser, train_settings
from draftune.images import from_pil, grid, save_image, to_pil
from draftune.rewards.classify import Classify
from draftune.training import train

DOCS = Path(__file__).parent.parent / "docs"
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
    text: str = ""


SIZE = {"bytes as a JPEG of quality 75": jpeg_bytes}
EXPERIMENTS = [
    Experiment("jpeg-compressibility", "--reward jpeg-compressibility", SIZE),
    Experiment("jpeg-incompressibility", "--reward jpeg-incompressibility", SIZE),
    Experiment(
        "symmetry",
        "--reward symmetry --method draft",
        {"difference from the mirror image, levels of 255": difference(ImageOps.mirror)},
    ),
    Experiment(
        "rotation",
        "--reward rotation --method draft",
        {"difference from itself upside down, levels of 255": difference(lambda p: p.rotate(180))},
    ),
    Experiment("color", "--reward 'color(target=orange)'", {"share of orange pixels": share_of_hue("orange")}),
    Experiment("classify", "--reward 'classify(target=963)'", {"first choice is pizza (963)": top1(963)}),
    Experiment("emoji-aesthetic", "--reward emoji-aesthetic", {}),
    Experiment("emoji-clip", "--reward emoji-clip --guidance-scale 1", {}),
    Experiment("sum", "--reward 'emoji-aesthetic + 0.2*jpeg-compressibility'", SIZE),
]


def run(experiment: Experiment, root: Path) -> None:
    """Trains, measures, and leaves the picture and the numbers for the page."""
    command = f"{experiment.flags} --output {root / experiment.name}"
    args = build_parser().parse_args(["train", *shlex.split(command)])
    done = train(settings=train_settings(args))
    both = done.comparison
    assert both is not None
    rows = [[name, *values] for name, values in both.scores.items()]
    saved = to_pil(both.base), to_pil(both.tuned)
    rows += [[name, *map(measure, saved)] for name, measure in experiment.measures.items()]
    (root / f"{experiment.name}.json").write_text(json.dumps({"flags": experiment.flags, "rows": rows}, indent=1))
    every = len(both.prompts) // 8
    shown = slice(0, len(both.prompts), every)
    sheet = grid([both.base[shown], both.tuned[shown]], ["before", "after"], both.prompts[shown])
    save_image(sheet, root / f"{experiment.name}.png")
    for row in rows:
        print(f"  {row[0]:50} {row[1]:9.3f} → {row[2]:9.3f}")


def main() -> None:
    chosen = sys.argv[1:]
    root = Path("runs/gallery")
    for experiment in EXPERIMENTS:
        if not chosen or experiment.name in chosen:
            run(experiment, root)


if __name__ == "__main__":
    main()
