"""Which level should "t = 1" be? DRaFT-1 on the embedded model over the sampler's grids.

    python benchmarks/grid.py [--steps 60] [--seeds 2] [--output docs/grid.csv]

For every grid: the leverage of the last step (d x_0 / d output with the network's input held fixed), the norm of the
first gradient, and after equal updates, on held-out prompts: the training reward, the judge, and how often the judge
reads the right name. The base of each grid is its own, since the grid changes the pictures too.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

import draftune
from draftune.models import load_model

GRIDS = [("leading", False), ("leading", True), ("trailing", False), ("trailing", True)]


def leverage(spacing: str, to_one: bool) -> float:
    """d x_0 / d v of the last step, v being what the embedded model predicts."""
    model = load_model("emoji")
    model.set_grid(spacing, to_one)
    step = model.schedule(20).steps[-1]
    return step.sigma_next * step.alpha - step.alpha_next * step.sigma


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/grid.csv"))
    args = parser.parse_args()
    rows = []
    for spacing, to_one in tqdm(GRIDS, desc="grids"):
        for seed in range(args.seeds):
            with TemporaryDirectory() as folder:
                run = draftune.train(
                    load_model("emoji"),
                    "emoji-aesthetic",
                    method="draft-k(k=1)",
                    timestep_spacing=spacing,
                    set_alpha_to_one=to_one,
                    steps=args.steps,
                    seed=seed,
                    sample_every=0,
                    eval_images=1,
                    output=f"{folder}/run",
                )
            assert run.comparison is not None
            rows.append(
                {
                    "timestep_spacing": spacing,
                    "set_alpha_to_one": to_one,
                    "seed": seed,
                    "leverage": round(leverage(spacing, to_one), 4),
                    "first_grad_norm": round(run.metrics[0]["grad_norm"], 3),
                    **{
                        f"{name}_{when}": round(value, 3)
                        for name, pair in run.comparison.scores.items()
                        for when, value in zip(("base", "tuned"), pair, strict=True)
                    },
                }
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
