"""Draw the figure of docs/guard.png from a finished run: its evaluations, and images at the start, best and end.

draftune train --reward emoji_aesthetic --eval-rewards 'emoji_name_accuracy + emoji_style_probability(style="3d")' \\
    --validation-steps 10 --early-stopping-patience 3 --log-images-steps 10 --output runs/guarded
python benchmarks/guard.py runs/guarded docs/guard.png
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from draftune.evaluation.criterion import EVAL_PREFIX
from draftune.runs.logs import EVALUATIONS, SAMPLES, read_rows
from draftune.utils.images import grid, open_image, save_image
from draftune.utils.plotting import figure, save


def curves(rows: list[dict[str, float]], columns: dict[str, str], best: float) -> Image.Image:
    """Plot each column against the update, with a vertical line at the best update."""
    plot, axes = figure(1, len(columns), width=2.9, height=2.4)
    steps = [row["step"] for row in rows]
    for axis, (column, title) in zip(axes[0], columns.items(), strict=True):
        axis.plot(steps, [row[column] for row in rows], "o-", markersize=3)
        axis.axvline(best, color="#555555", linestyle="--", linewidth=0.9)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("update")
    file = BytesIO()
    save(plot, file)
    return Image.open(file).convert("RGB")


def sampled(folder: Path, step: int) -> Tensor:
    """Return the sample images [N, 3, H, W] of a run after an update."""
    return torch.cat([open_image(path) for path in sorted((folder / "samples" / f"step-{step:06d}").iterdir())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    rows = read_rows(args.run / EVALUATIONS)
    best = next(int(row["step"]) for row in reversed(rows) if row["best"])
    eval_rewards = {key: key.removeprefix(EVAL_PREFIX) for key in rows[0] if key.startswith(EVAL_PREFIX)}
    reward = list(rows[0])[3]
    above = curves(rows, {reward: f"{reward}, the training reward"} | eval_rewards, best)
    samples = {int(row["step"]): row for row in read_rows(args.run / SAMPLES)}
    shown = {0: "base", best: f"update {best}, best/", int(rows[-1]["step"]): f"update {int(rows[-1]['step'])}"}
    images = [sampled(args.run, step) for step in shown]
    captions = [[f"{score:.3g}" for score in samples[step]["scores"]] for step in shown]
    below = grid(images, list(shown.values()), samples[0]["prompts"], captions)
    above = above.resize((below.width, above.height * below.width // above.width), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (below.width, above.height + below.height), "white")
    sheet.paste(above, (0, 0))
    sheet.paste(below, (0, above.height))
    save_image(sheet, args.output)


if __name__ == "__main__":
    main()
