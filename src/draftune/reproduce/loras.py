"""Experiments on what is trained: the LoRA's scale as a dial, and two LoRAs added."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from draftune.figures import figure
from draftune.lora import set_lora_scales
from draftune.reproduce.curves import rows_of
from draftune.reproduce.lab import LV, NAMED, REWARD, Lab, Scale, Work, tidy
from draftune.reproduce.report import Claim, Experiment, Report, compared
from draftune.rewards import load_reward

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
BETAS = (1.0, 10.0)
MARGIN = 0.005
"""Of diversity: what is less is taken for chance."""
ORANGE = "color(target=orange)"


def scale_work(scale: Scale) -> list[Work]:
    return [Work(LV, scale.long), *(Work(f"kl({LV}, beta={beta})", scale.long) for beta in BETAS)]


def scale_sweep(lab: Lab) -> list[dict[str, float]]:
    model = lab.tuned({"lora": lab.lora(Work(LV, lab.scale.long))})
    found = []
    for scale in SCALES:
        set_lora_scales(model, {"lora": scale})
        found.append({"scale": scale, **tidy(lab.scores(model))})
    return found


def at_reward(points: list[dict[str, Any]], reward: float, key: str) -> float:
    """What a dial gives where it has this reward, straight between its points, its best where there are several.

    Not a number where none of its points reach it.
    """
    values = []
    for a, b in pairwise(points):
        low, high = sorted((a["reward"], b["reward"]))
        if low <= reward <= high and high > low:
            values.append(a[key] + (b[key] - a[key]) * (reward - a["reward"]) / (b["reward"] - a["reward"]))
    return max(values, default=math.nan)


def lora_scale(lab: Lab) -> Report:
    works = scale_work(lab.scale)
    swept = lab.measured("lora-scale", lambda: scale_sweep(lab))
    stopped = rows_of(works[0], lab.run(works[0]))
    held = [{"beta": beta, **tidy(lab.run(work).final)} for beta, work in zip((0.0, *BETAS), works, strict=True)]
    rows = [{"dial": "LoRA scale", "value": row.pop("scale"), **row} for row in [dict(row) for row in swept]]
    rows += [
        {"dial": "early stopping", "value": row["update"], **{k: row[k] for k in list(swept[0])[1:]}} for row in stopped
    ]
    rows += [{"dial": "KL", "value": row.pop("beta"), **row} for row in held]

    drawn, axes = figure(1, 3, width=3.6)
    for key, label in (("reward", "reward"), ("judge_3d", "judge: P(3D)"), ("diversity", "diversity")):
        values = [row[key] for row in swept]
        spread = max(values) - min(values) or 1.0
        axes[0, 0].plot(SCALES, [(value - min(values)) / spread for value in values], marker=".", label=label)
    axes[0, 0].set(xlabel="LoRA scale", ylabel="share of its range")
    axes[0, 0].legend(fontsize=8)
    dials = {name: [row for row in rows if row["dial"] == name] for name in ("LoRA scale", "early stopping", "KL")}
    for axis, key in zip(axes[0, 1:], ("diversity", "judge_3d"), strict=True):
        for (name, points), style in zip(dials.items(), ("o-", "s--", "^:"), strict=True):
            points = sorted(points, key=lambda row: row["value"])
            axis.plot([p["reward"] for p in points], [p[key] for p in points], style, label=name, markersize=4)
        axis.set(xlabel="training reward", ylabel={"judge_3d": "judge: P(3D)"}.get(key, key))
    axes[0, 1].legend(fontsize=8)

    rises = all(a["reward"] < b["reward"] for a, b in pairwise(swept[:5]))
    low, high = swept[0]["reward"], swept[4]["reward"]
    text = (
        f"The LoRA of {lab.scale.long} updates, drawn at scales 0 to 1.5: the reward goes from {low:.3f} to "
        f"{high:.3f} at 1 and {swept[-1]['reward']:.3f} at 1.5, diversity from {swept[0]['diversity']:.3f} to "
        f"{swept[4]['diversity']:.3f} and {swept[-1]['diversity']:.3f}."
    )
    claims = [
        Claim(
            "the scale interpolates smoothly between the base and the tuned model",
            f"the reward {'rises' if rises else 'does not rise'} with every step of the scale from 0 to 1",
            "confirmed" if rises else "not seen",
        )
    ]
    for name in ("early stopping", "KL"):
        inside = [row for row in dials[name] if low < row["reward"] < high and row["value"]]
        gains = {
            key: [at_reward(swept, row["reward"], key) - row[key] for row in inside]
            for key in ("diversity", "judge_3d")
        }
        mean = {key: float(np.mean(values)) if values else 0.0 for key, values in gains.items()}
        won = sum(value > MARGIN for value in gains["diversity"])
        text += (
            f" At equal reward it differs from {name} by {mean['diversity']:+.3f} in diversity and "
            f"{mean['judge_3d']:+.3f} in P(3D), the means over {len(inside)} points."
        )
        word = compared(mean["diversity"], MARGIN)
        if word == "confirmed" and won < 0.8 * len(inside):
            word = "weaker"
        told = f"{mean['diversity']:+.3f} in diversity at equal reward, "
        told += f"more by over {MARGIN} at {won} of {len(inside)} points"
        claims.append(Claim(f"it is a better dial than {name}", told, word))
    return Report(rows, rows, drawn, text, claims, 1)


def mixing_work(scale: Scale) -> list[Work]:
    # Of seeds whose runs no other experiment makes longer: the LoRA is that of the last update.
    return [Work(LV, scale.steps, 1), Work(LV, scale.steps, 0, {"reward": ORANGE})]


def mixture(lab: Lab) -> list[dict[str, float]]:
    first, second = (lab.lora(work) for work in mixing_work(lab.scale))
    model = lab.tuned({"style": first, "orange": second})
    orange, found = load_reward(ORANGE), []
    weights = [float(w) for w in np.linspace(0, 1, lab.scale.grid)]
    for a in weights:
        for b in weights:
            set_lora_scales(model, {"style": a, "orange": b})
            scores = lab.scores(model, lab.reward + orange)
            found.append(
                {
                    "style": a,
                    "orange": b,
                    REWARD: scores[REWARD],
                    "color": next(value for key, value in scores.items() if key.startswith("color")),
                    "right name": scores[NAMED],
                }
            )
    return found


def mixing(lab: Lab) -> Report:
    rows = lab.measured("mixing", lambda: mixture(lab))
    size = lab.scale.grid
    ticks = [f"{w:.2g}" for w in np.linspace(0, 1, size)]
    drawn, axes = figure(1, 3, width=3.4, height=3.0)
    for axis, key in zip(axes[0], (REWARD, "color", "right name"), strict=True):
        values = np.array([row[key] for row in rows]).reshape(size, size)
        image = axis.imshow(values, origin="lower", cmap="viridis")
        drawn.colorbar(image, ax=axis, shrink=0.8)
        axis.set(title=key, xlabel="weight of the orange LoRA", ylabel="weight of the style LoRA")
        axis.set_xticks(range(size), ticks)
        axis.set_yticks(range(size), ticks)
        axis.grid(False)
    corner = {(a, b): rows[(size - 1) * size * a + (size - 1) * b] for a in (0, 1) for b in (0, 1)}
    shares = {}
    for key, alone in ((REWARD, (1, 0)), ("color", (0, 1))):
        base, one, both = (corner[at][key] for at in ((0, 0), alone, (1, 1)))
        shares[key] = (both - base) / (one - base) if one != base else 0.0
    text = (
        f"One LoRA was trained on {REWARD}, one on {ORANGE}. Added in full, they keep {100 * shares[REWARD]:.0f} % of "
        f"what the first gains alone and {100 * shares['color']:.0f} % of what the second does; the judge reads the "
        f"right name in {100 * corner[1, 1]['right name']:.0f} % of these pictures."
    )
    least = min(shares.values())
    claims = [
        Claim(
            "LoRAs trained on different rewards can be added",
            f"the sum keeps {100 * shares[REWARD]:.0f} % and {100 * shares['color']:.0f} % of each one's gain",
            "confirmed" if least > 0.5 else "weaker" if least > 0.1 else "not seen",
        )
    ]
    return Report(rows, rows, drawn, text, claims, 1)


LORA_SCALE = Experiment("LoRA scale", "Is the LoRA's scale a good dial?", scale_work, lora_scale)
MIXING = Experiment("Mixing", "Do two LoRAs add up?", mixing_work, mixing)
