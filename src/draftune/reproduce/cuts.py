"""Experiments on where the gradient is cut: K, the copies of DRaFT-LV, the sampler's last level, rewards of layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from draftune.figures import color, figure
from draftune.reproduce.curves import averaged, deep, half, reached, rows_of
from draftune.reproduce.lab import DIVERSITY, NAMED, ONE, REWARD, Lab, Scale, Work
from draftune.reproduce.report import Claim, Experiment, Report, compared, spread

GRIDS = [("leading", False), ("leading", True), ("trailing", False), ("trailing", True)]


def depths(scale: Scale) -> list[int]:
    return [k for k in (1, 2, 5, 10, 20) if k < scale.num_inference_steps] + [scale.num_inference_steps]


def depth_method(k: int, scale: Scale) -> str:
    return "draft" if k == scale.num_inference_steps else f"draft_k(k={k})"


def depth_work(scale: Scale) -> list[Work]:
    return [Work(depth_method(k, scale), scale.steps, seed) for k in depths(scale) for seed in range(scale.seeds)]


def depth(lab: Lab) -> Report:
    scale, rows = lab.scale, []
    for k in depths(scale):
        method = depth_method(k, scale)
        records = [lab.run(Work(method, scale.steps, seed)) for seed in range(scale.seeds)]
        finals = [record.final[REWARD] for record in records]
        cost = lab.cost(method)
        norms = [row["grad_norm"] for record in records for row in record.metrics]
        rows.append(
            {
                "K": k,
                "reward": float(np.mean(finals)),
                "std of reward": spread(finals),
                "first gradient's norm": float(np.mean([record.metrics[0]["grad_norm"] for record in records])),
                "median gradient norm": float(np.median(norms)),
                "seconds an update": cost["seconds"],
                "peak MB": cost["megabytes"],
                "peak MB without checkpointing": cost["megabytes without"],
            }
        )
    drawn, axes = figure(1, 4, width=2.9)
    labels = ("reward", "median gradient norm", "seconds an update", "peak MB")
    for axis, key in zip(axes[0], labels, strict=True):
        axis.plot([row["K"] for row in rows], [row[key] for row in rows], marker="o", color=color("draft"))
        axis.set(xscale="log", xlabel="K", ylabel=f"{key} after {scale.steps} updates" if key == "reward" else key)
        axis.set_xticks([row["K"] for row in rows], [str(row["K"]) for row in rows])
    first, last = rows[0], rows[-1]
    best = max(rows, key=lambda row: row["reward"])
    growth = last["median gradient norm"] / first["median gradient norm"]
    times, memory = (last[key] / first[key] for key in ("seconds an update", "peak MB"))
    text = (
        f"From K = 1 to K = {last['K']} the gradient's norm changes {growth:.1f}-fold, an update takes {times:.1f} "
        f"times as long and {memory:.2f} times the memory, with checkpointing. The highest reward after {scale.steps} "
        f"updates is that of K = {best['K']}: {best['reward']:.3f}, against {last['reward']:.3f} of full "
        f"backpropagation and {first['reward']:.3f} of K = 1."
    )
    small = max(rows[:-1], key=lambda row: row["reward"])
    better = small["reward"] - last["reward"]
    noise = math.hypot(small["std of reward"], last["std of reward"])
    claims = [
        Claim(
            "a small K beats full backpropagation at equal updates",
            f"K = {small['K']}, the best of the small ones: {better:+.3f}; the difference's noise {noise:.3f}",
            compared(better, noise),
        ),
        Claim(
            "the gradient's norm grows with K",
            f"{growth:.1f} times from 1 to {last['K']}",
            "confirmed" if growth > 2 else "weaker" if growth > 1.1 else "not seen" if growth > 0.9 else "reversed",
        ),
    ]
    return Report(rows, rows, drawn, text, claims, scale.seeds)


def copies_method(n: int) -> str:
    return f"draft_lv(n={n})" if n else ONE


def copies_work(scale: Scale) -> list[Work]:
    return [Work(copies_method(n), scale.steps, seed) for n in scale.copies for seed in range(scale.seeds)]


def spread_of_gradients(lab: Lab) -> dict[str, list[float]]:
    """By n: the gradient's variance over seeds, the square of its mean's length, and both of one loss's average.

    The gradients of n copies are the first terms of those of the most, so that each seed is drawn once. The square of
    the mean is corrected for the variance that a finite number of seeds leaves in it.
    """
    most, seeds = lab.scale.copies[-1], lab.scale.gradient_seeds
    terms = [torch.stack(lab.gradients(f"draft_lv(n={most})", seed)) for seed in range(seeds)]
    found: dict[str, list[float]] = {"variance": [], "signal": []}
    for n in lab.scale.copies:
        gradients = torch.stack([t[: n + 1].sum(0) for t in terms]).double()
        variance = float(gradients.var(0).sum())
        found["variance"].append(variance)
        found["signal"].append(float(gradients.mean(0).square().sum()) - variance / seeds)
    return found


def copies(lab: Lab) -> Report:
    scale = lab.scale
    gradients = lab.measured("lv-gradients", lambda: spread_of_gradients(lab))
    evaluations = [row for work in copies_work(scale) for row in rows_of(work, lab.run(work))]
    drawn, axes = figure(1, 3, width=3.6)
    table, target = [], averaged(evaluations, ONE, "reward")[-1]
    for i, n in enumerate(lab.scale.copies):
        method = copies_method(n)
        updates, rewards = averaged(evaluations, method, "update"), averaged(evaluations, method, "reward")
        shade = (0.84, 0.15, 0.16, 0.25 + 0.75 * i / (len(lab.scale.copies) - 1))
        axes[0, 0].plot(updates, rewards, label=f"n = {n}", color=shade if n else color(ONE))
        cost, seeds = lab.cost(method), scale.gradient_seeds
        variance, signal = gradients["variance"][i], gradients["signal"][i]
        last = [row["reward"] for row in evaluations if row["method"] == method and row["update"] == scale.steps]
        table.append(
            {
                "n": n,
                "reward": rewards[-1],
                "std of reward": spread(last),
                "updates to DRaFT-1's last": reached(updates, rewards, target),
                "seconds an update": cost["seconds"],
                # Where the mean is not told from noise, neither is the ratio.
                "gradient's variance / mean squared": variance / signal if signal > variance / seeds else math.nan,
                "variance of the average": variance / (n + 1) ** 2,
            }
        )
    axes[0, 0].set(xlabel="updates", ylabel="training reward")
    axes[0, 0].legend(fontsize=8)
    for axis, key in zip(axes[0, 1:], ("gradient's variance / mean squared", "seconds an update"), strict=True):
        axis.plot(lab.scale.copies, [row[key] for row in table], marker="o", color=color("draft_lv"))
        axis.set(xlabel="n", ylabel=key, ylim=(0, None))
    at, most = scale.copies.index(2), scale.copies[-1]
    zero, two = table[0], table[at]
    needed = two["updates to DRaFT-1's last"]
    longer = two["seconds an update"] / zero["seconds an update"] - 1
    noisy = [row["gradient's variance / mean squared"] for row in table]
    averages = [row["variance of the average"] for row in table]
    text = (
        f"What DRaFT-1 has after {scale.steps} updates, n = 2 "
        + (f"has after {needed:.1f}" if needed is not None else "has not")
        + f". Its updates take {100 * longer:.0f} % longer. The variance of the gradient over "
        f"{scale.gradient_seeds} draws of the noise for the same prompts, relative to the square of its mean, is "
        f"{noisy[0]:.2f} for DRaFT-1, {noisy[at]:.2f} for n = 2 and {noisy[-1]:.2f} for n = {most}; that of the "
        f"average of the 1 + n terms is {averages[at] / averages[0]:.2f} times DRaFT-1's at n = 2 and "
        f"{averages[-1] / averages[0]:.2f} times at n = {most}."
    )
    better, noise = two["reward"] - zero["reward"], math.hypot(two["std of reward"], zero["std of reward"])
    word = compared(better, noise)
    ratio = noisy[at] / noisy[0]
    claims = [
        Claim(
            "with n = 2, half the updates do what DRaFT-1 does",
            f"reward {better:+.3f} after equal updates, the difference's noise {noise:.3f}",
            "weaker" if word == "confirmed" and (needed or scale.steps) > 0.6 * scale.steps else word,
        ),
        Claim(
            "n = 2 costs about 10 % more time",
            f"{100 * longer:.0f} % more",
            "confirmed" if longer < 0.15 else "weaker" if longer < 0.4 else "not seen",
        ),
        Claim(
            "the gradient of DRaFT-LV has a lower variance",
            f"relative to its mean {ratio:.2f} times DRaFT-1's at n = 2" if not math.isnan(ratio) else "not resolved",
            "not seen"
            if not abs(ratio - 1) > 0.05
            else "reversed"
            if ratio > 1
            else "confirmed"
            if ratio < 0.8
            else "weaker",
        ),
    ]
    return Report([*evaluations, *table], table, drawn, text, claims, scale.seeds)


def grid_work(scale: Scale) -> list[Work]:
    return [
        Work(ONE, scale.steps, 0, {"timestep_spacing": spacing, "set_alpha_to_one": clean}) for spacing, clean in GRIDS
    ]


def leverage(lab: Lab, spacing: str, clean: bool) -> float:
    """d x_0 / d v of the last step with the network's input held fixed, v being what the embedded model predicts."""
    model = lab.model()
    model.set_grid(spacing, clean)
    step = model.schedule(lab.scale.num_inference_steps).steps[-1]
    return step.sigma_next * step.alpha - step.alpha_next * step.sigma


def grid(lab: Lab) -> Report:
    rows: list[dict[str, Any]] = []
    for (spacing, clean), work in zip(GRIDS, grid_work(lab.scale), strict=True):
        record = lab.run(work)
        base, tuned = (rows_of(work, record)[i] for i in (0, -1))
        rows.append(
            {
                "timestep_spacing": spacing,
                "set_alpha_to_one": clean,
                "leverage": leverage(lab, spacing, clean),
                "first gradient's norm": record.metrics[0]["grad_norm"],
                "base reward": base["reward"],
                "reward": tuned["reward"],
                "gain": tuned["reward"] - base["reward"],
                "P(3D)": tuned["judge_3d"],
                "right name": tuned["judge_name"],
            }
        )
    drawn, axes = figure(1, 2)
    labels = [f"{spacing}{', to clean' if clean else ''}" for spacing, clean in GRIDS]
    for axis, key in zip(axes[0], ("first gradient's norm", "gain"), strict=True):
        axis.bar(labels, [row[key] for row in rows], color=color("draft_k(k=1)"))
        axis.set_ylabel(f"{key} of the reward after {lab.scale.steps} updates" if key == "gain" else key)
        axis.tick_params(axis="x", labelsize=7)
    leading, trailing = (
        np.mean([row["gain"] for row in rows if row["timestep_spacing"] == s]) for s in ("leading", "trailing")
    )
    norms = [row["first gradient's norm"] for row in rows]
    text = (
        f"The first gradient of DRaFT-1 is {norms[-1] / norms[0]:.0f} times larger on the trailing grid that ends at "
        f"the clean latent than on the leading one that does not. After {lab.scale.steps} updates of AdamW, whose "
        f"steps do not depend on the gradient's scale, the reward has grown by {leading:.3f} on the leading grids and "
        f"by {trailing:.3f} on the trailing ones."
    )
    return Report(rows, rows, drawn, text, [], 1)


LAYOUT = {"reward": "symmetry", "learning_rate": 2e-3}


def layout_work(scale: Scale) -> list[Work]:
    return [Work(name, scale.steps, 0, LAYOUT) for name in (ONE, half(scale), deep(scale))]


def layout(lab: Lab) -> Report:
    rows: list[dict[str, Any]] = []
    for work in layout_work(lab.scale):
        base, tuned = (lab.run(work).evaluations[i] for i in (0, -1))
        rows.append(
            {
                "method": work.method,
                "base symmetry": base["symmetry"],
                "base right name": base[NAMED],
                "symmetry": tuned["symmetry"],
                "right name": tuned[NAMED],
                "diversity": tuned[DIVERSITY],
            }
        )
    drawn, axes = figure(1, 1)
    for row in rows:
        axes[0, 0].plot(row["symmetry"], row["right name"], "o", label=row["method"], color=color(row["method"]))
    axes[0, 0].plot(rows[0]["base symmetry"], rows[0]["base right name"], "x", color="black", label="base")
    axes[0, 0].set(xlabel=f"symmetry after {lab.scale.steps} updates", ylabel="judge: right name")
    axes[0, 0].legend(fontsize=8)
    one, deep = rows[0], rows[-1]
    text = (
        f"From a symmetry of {one['base symmetry']:.3f}, DRaFT-1 gets to {one['symmetry']:.3f} with the right name in "
        f"{100 * one['right name']:.0f} % of the pictures and DRTune to {deep['symmetry']:.3f} with "
        f"{100 * deep['right name']:.0f} %."
    )
    gains = [row["symmetry"] - row["base symmetry"] for row in (one, deep)]
    fails = gains[1] > 0 and gains[0] < 0.25 * gains[1]
    better = deep["right name"] > one["right name"] + 0.05
    measured = f"symmetry {one['symmetry']:.3f} and {deep['symmetry']:.3f}, right name "
    measured += f"{one['right name']:.2f} and {deep['right name']:.2f}"
    verdict = "confirmed" if fails else "weaker" if better else "not seen"
    claims = [Claim("(DRTune) deep steps succeed on symmetry where the last step alone fails", measured, verdict)]
    return Report(rows, rows, drawn, text, claims, 1)


DEPTH = Experiment("K", "How far back should the gradient flow?", depth_work, depth)
COPIES_OF_LV = Experiment("DRaFT-LV", "What do re-noised copies bring, and cost?", copies_work, copies)
GRID = Experiment("The sampler's last level", "Where should the last step be?", grid_work, grid)
LAYOUT_REWARD = Experiment("A reward of layout", "Can the last step alone learn symmetry?", layout_work, layout)
