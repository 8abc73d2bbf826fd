"""Measure what the demo reaches, beside the base model, the base model asked for the style by its word, and real emoji.

    draftune train --output runs/demo
    python recipes/emoji/demo.py --data build/emoji --run runs/demo --output recipes/emoji/demo.json

For each of them: mean scores of the rewards and the judge, edge energy over that of the real images of the style, the
squared maximum mean discrepancy to them on the judge's features, and the diversity within a name. The edges that the
autoencoder loses are out of reach for training, so the real images are also measured encoded and decoded. A test holds
the numbers in demo.json to the limits below, and the weights in the package to those that were measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common import edge_energy
from data import COMMON, Emoji
from draftune import load_lora
from draftune.assets import EMBEDDED
from draftune.evaluation.metrics import diversity, score_batches
from draftune.models import load_model
from draftune.recommended import EMOJI
from measure import Measure, reconstructed

STYLE = EMOJI["eval_prompt_template"].split()[0]
TUNED, BASE, ASKED = "fine-tuned", "base", f'base, asked for "{STYLE} …"'
REAL, DECODED = f"real, {STYLE}", f"real, {STYLE}, encoded and decoded"
NAMES = "emoji_name_accuracy"
Rows = Mapping[str, Mapping[str, float]]


def limits(rows: Rows) -> dict[str, tuple[float, float]]:
    """Return what the demo must reach: each ratio with its limit, which it must be above (names, edges) or below."""
    tuned, base, asked, decoded = rows[TUNED], rows[BASE], rows[ASKED], rows[DECODED]
    return {
        "recognized names, of the base model's": (tuned[NAMES] / base[NAMES], 0.97),
        "edge energy, of the decoded real images'": (tuned["edge_energy"] / decoded["edge_energy"], 0.9),
        "distance to the real images, of that of the base model": (tuned["mmd"] / base["mmd"], 0.5),
        "distance to the real images, of that of the model asked by the word": (
            tuned["mmd"] / asked["mmd"],
            1.2,
        ),
    }


def met(name: str, value: float, limit: float) -> bool:
    """Return whether a value is on the right side of its limit."""
    return value <= limit if name.startswith("distance") else value >= limit


def digest() -> str:
    """Return a digest of the weights in the package."""
    files = sorted(path for folder in EMBEDDED.values() for path in folder.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def squared_mmd(first: Tensor, second: Tensor) -> float:
    """Compute the squared maximum mean discrepancy with KID's kernel, over all pairs of features [N, D] and [M, D].

    mean_{i, j} k(x_i, x_j) + mean_{i, j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),  k(x, y) = (x · y / D + 1)^3

    Gretton et al., 2012, Eq. 5. It is never negative, unlike the unbiased estimate, so that ratios have a meaning.
    """

    def mean(a: Tensor, b: Tensor) -> float:
        return float((a.double() @ b.double().T / a.shape[1] + 1).pow(3).mean())

    return mean(first, first) + mean(second, second) - 2 * mean(first, second)


class Demo(Measure):
    """Measures the images of one model against the real ones of the style."""

    @torch.no_grad()
    def row(self, images: Tensor, per_name: int) -> dict[str, float]:
        """Return the numbers of images, `per_name` for each common name, those of one name side by side."""
        names, real = [name for name in COMMON for _ in range(per_name)], self.real[STYLE]
        scores = score_batches(self.judges, images, names)[1]
        row = {name: float(values.mean()) for name, values in scores.items()}
        row["edge_energy"] = edge_energy(images) / edge_energy(real)
        row["mmd"] = squared_mmd(self.features(images), self.features(real))
        spread = diversity(self.judges, images, per_name)
        return row if spread is None else row | {"diversity": float(spread.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--run", type=Path, required=True, help="run of the demo")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path, help="file for the numbers")
    args = parser.parse_args()

    demo, model = Demo(Emoji.load(args.data), STYLE), load_model("emoji")
    schedule, seeds = model.schedule(EMOJI["num_inference_steps"]), [seed for _ in COMMON for seed in range(args.seeds)]

    def sampled(template: str) -> dict[str, float]:
        prompts = [template.format(name) for name in COMMON for _ in range(args.seeds)]
        images = model.sample_tensors(prompts, seeds, schedule, EMOJI["guidance_scale"], batch_size=32, progress=True)
        return demo.row(images, args.seeds)

    rows = {BASE: sampled("{}"), ASKED: sampled(f"{STYLE} {{}}"), REAL: demo.row(demo.real[STYLE], 1)}
    rows[DECODED] = demo.row(reconstructed(model.pipeline.vae, demo.real[STYLE]), 1)
    load_lora(model, args.run / "lora")
    rows[TUNED] = sampled("{}")
    for name, row in rows.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    for name, (value, limit) in limits(rows).items():
        print(f"{'met   ' if met(name, value, limit) else 'MISSED'} {name}: {value:.3f}, limit {limit:g}")
    if args.output:
        args.output.write_text(json.dumps({"weights": digest(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
