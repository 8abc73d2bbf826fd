"""Train the embedded model on each reward and write docs/gallery.md, with an independent measurement for each.

    python benchmarks/gallery.py                # all rewards, about four minutes each on two CPU cores
    python benchmarks/gallery.py symmetry       # one reward

Each run is `draftune train` with the flags shown under its image, which has a row for every 40 updates. The independent
measurements use the saved images with 8 bits a channel, and no code of the reward.
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

from draftune.cli.main import build_parser
from draftune.cli.train import train_settings
from draftune.rewards.classify import Classify
from draftune.runs.logs import SAMPLES, read_rows
from draftune.training import train
from draftune.utils.images import from_pil, grid, save_image, to_pil
from guard import sampled

DOCS = Path(__file__).parent.parent / "docs"
RUNS = Path("runs/gallery")
NAMES = {
    "eval/emoji_name_accuracy": "judge: shows what the prompt names",
    "eval/emoji_style_probability": "judge: probability of the style",
    "eval/diversity": "diversity within a prompt",
}
"""Words of the columns of an evaluation."""
HEAD = """# What the rewards do

Each run is one command on the embedded model. It trains on the prompt set `emoji` and is evaluated on the 64 names of
`emoji-common`, which are not trained on, with the same seeds before and after. The rows of an image are updates; row 0
is the base model. The last rows of a table are measured on the saved images by code that the reward does not share.
Made by `python benchmarks/gallery.py` on 2 CPU cores with torch 2.13.0.
[Rewards](reference/rewards.md) describes each reward.
"""
Measure = Callable[[Sequence[Image.Image]], float]


def jpeg_bytes(images: Sequence[Image.Image]) -> float:
    """Return the mean size in bytes of the images as JPEG files of quality 75."""
    sizes = []
    for image in images:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=75)
        sizes.append(file.tell())
    return float(np.mean(sizes))


def difference(turn: Callable[[Image.Image], Image.Image]) -> Measure:
    """Return a measure: mean absolute difference between an image and its transformed copy, in levels of 255."""

    def measure(images: Sequence[Image.Image]) -> float:
        pairs = [(np.asarray(p, dtype=float), np.asarray(turn(p), dtype=float)) for p in images]
        return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))

    return measure


def share_of_hue(color: str) -> Measure:
    """Return a measure: fraction of saturated pixels whose hue is within 30 degrees of the color's."""
    hue = np.asarray(Image.new("RGB", (1, 1), ImageColor.getrgb(color)).convert("HSV"))[0, 0, 0].astype(float)

    def measure(images: Sequence[Image.Image]) -> float:
        hsv = np.stack([np.asarray(p.convert("HSV"), dtype=float) for p in images])
        away = np.abs((hsv[..., 0] - hue + 128) % 256 - 128) * 360 / 256
        return float(((away < 30) & (hsv[..., 1] > 64)).mean())

    return measure


def top1(target: int) -> Measure:
    """Return a measure: fraction of images that the classifier assigns to the target class."""

    def measure(images: Sequence[Image.Image]) -> float:
        judge = Classify(str(target), "efficientnet-lite0").load_weights()
        return float(np.mean([int(judge.logits(from_pil(p)).argmax()) == target for p in images]))  # type: ignore[operator]

    return measure


@dataclass
class Experiment:
    """One section of the page: a run, its independent measurements and a comment."""

    name: str
    flags: str
    measures: dict[str, Measure]
    text: str


GENTLE = "--learning-rate 1e-3 --steps 80 --log-images-steps 20"
SHORT = "--steps 40 --log-images-steps 10"
"""Flags of rewards that the default settings break within 40 updates."""
SIZE: dict[str, Measure] = {"bytes as a JPEG of quality 75": jpeg_bytes}
EXPERIMENTS = [
    Experiment(
        "jpeg_compressibility",
        f"--reward jpeg_compressibility {GENTLE}",
        SIZE,
        "Smaller JPEG files: edges and texture cost bytes, plain areas do not.",
    ),
    Experiment(
        "jpeg_incompressibility",
        f"--reward jpeg_incompressibility {GENTLE}",
        SIZE,
        "Larger JPEG files: edges, texture and noise cost bytes.",
    ),
    Experiment(
        "symmetry",
        f"--reward symmetry {SHORT}",
        {"difference from the mirror image, levels of 255": difference(ImageOps.mirror)},
        "Images that equal their mirror images, which asks for another layout.",
    ),
    Experiment(
        "rotation",
        f"--reward rotation {SHORT}",
        {"difference from itself upside down, levels of 255": difference(lambda p: p.rotate(180))},
        "Images that look the same when rotated by 180 degrees.",
    ),
    Experiment(
        "color",
        f"--reward 'color(target=orange)' {SHORT}",
        {"share of orange pixels": share_of_hue("orange")},
        "Pixels near orange, whatever the prompt says.",
    ),
    Experiment(
        "classify",
        f"--reward 'classify(target=902)' {SHORT}",
        {"share that the classifier calls a whistle (902) first": top1(902)},
        "Images that EfficientNet-Lite0, with its published weights, takes for a whistle.",
    ),
    Experiment(
        "emoji_aesthetic",
        """--reward emoji_aesthetic --eval-rewards 'emoji_name_accuracy + emoji_style_probability(style="3d")'""",
        {},
        "Glossy 3D emoji. The judge that measures the style is not part of the reward.",
    ),
    Experiment(
        "emoji_clip", "--reward emoji_clip", {}, "The similarity of image and prompt, without a word for a style."
    ),
    Experiment(
        "sum",
        f"--reward 'emoji_aesthetic + 0.03*jpeg_compressibility' {GENTLE}",
        SIZE,
        "A sum of two rewards: glossy with less detail. Each term is logged separately.",
    ),
]


def run(experiment: Experiment) -> None:
    """Train, measure, and save the image and the numbers for the page."""
    command = f"{experiment.flags} --output {RUNS / experiment.name}"
    args = build_parser().parse_args(["train", *shlex.split(command)])
    done = train(settings=train_settings(args))
    both = done.comparison
    assert both is not None
    base, tuned = both.base.images, both.tuned.images
    saved = to_pil(base), to_pil(tuned)
    rows = [[NAMES.get(name, f"`{name}`"), *values] for name, values in both.scores.items()]
    rows += [[name, *map(measure, saved)] for name, measure in experiment.measures.items()]
    result = {"rows": rows, "images": len(both.prompts), "seconds": done.metrics[-1]["train_seconds"]}
    (RUNS / f"{experiment.name}.json").write_text(json.dumps(result, indent=1))
    samples = {int(row["step"]): row for row in read_rows(done.folder / SAMPLES)}
    images = [sampled(done.folder, step) for step in samples]
    sheet = grid(images, [str(step) for step in samples], samples[0]["prompts"])
    save_image(sheet.quantize(256), image_path(experiment.name))  # a third of the bytes


def image_path(name: str) -> Path:
    """Return the path of a reward's image."""
    return DOCS / "gallery" / f"{name}.png"


def section(experiment: Experiment) -> str:
    """Return the page's section of one reward."""
    result = json.loads((RUNS / f"{experiment.name}.json").read_text())
    rows = "\n".join(f"| {name} | {before:.3f} | {after:.3f} |" for name, before, after in result["rows"])
    return f"""## {experiment.name}

{experiment.text}

![{experiment.name}, by update](gallery/{experiment.name}.png)

```bash
draftune train {experiment.flags} --output runs/{experiment.name}
```

| {result["images"]} images | before | after |
|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rewards to train (default: all)")
    parser.add_argument("--page", action="store_true", help="only write the page, without training")
    args = parser.parse_args()
    for experiment in EXPERIMENTS:
        if not args.page and (not args.names or experiment.name in args.names):
            run(experiment)
    finished = [experiment for experiment in EXPERIMENTS if (RUNS / f"{experiment.name}.json").exists()]
    (DOCS / "gallery.md").write_text("\n".join([HEAD, *map(section, finished)]), encoding="utf-8")


if __name__ == "__main__":
    main()
