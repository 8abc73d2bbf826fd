"""The experiment on guidance: a reward followed while drawing, against the best of several seeds and a LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from draftune.figures import figure
from draftune.reproduce.guided import (
    AHEAD,
    ALONE,
    LORA,
    STILL,
    STRENGTH,
    TUNED,
    Row,
    aheads,
    calls,
    counts,
    guided_work,
    measured,
    pictures,
    ratios,
    sheets,
    training_calls,
    wholes,
)
from draftune.reproduce.lab import ONE, Lab
from draftune.reproduce.loras import at_reward
from draftune.reproduce.report import Claim, Experiment, Report, compared, spread
from draftune.utils.images import grid


def averages(rows: Sequence[Row]) -> list[Row]:
    """The means over the seeds of each way, and the reward's standard deviation."""
    keys = ("calls", "scored", "seconds", "reward", "judge_3d", "judge_name", "diversity")
    table = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        row: Row = {"way": way, **{key: float(np.mean([r[key] for r in own])) for key in keys if key in own[0]}}
        row |= {key: int(row[key]) for key in ("calls", "scored")}
        table.append(row | {"std of reward": spread([r["reward"] for r in own])})
    return table


def differences(rows: Sequence[Row], one: str, other: str) -> tuple[float, float]:
    """The reward of a way above another's, seed by seed: the mean and the standard deviation."""
    by_way = {way: [row["reward"] for row in rows if row["way"] == way] for way in (one, other)}
    found = [a - b for a, b in zip(by_way[one], by_way[other], strict=True)]
    return float(np.mean(found)), spread(found)


def guidance(lab: Lab) -> Report:
    rows, folder, scale = measured(lab), lab.folder / "guidance-pictures", lab.scale
    distances = lab.measured("guidance-pictures", lambda: pictures(lab, folder))
    table = averages(rows)
    ways = {row["way"]: row for row in table}
    t, once = scale.num_inference_steps, training_calls(scale)
    # What nothing was measured for: the LoRA draws as fast as the base, once it is trained.
    training = lab.cost(ONE)["seconds"] * scale.steps
    ways[LORA]["seconds"] = ways["the best of 1"]["seconds"]

    drawn, axes = figure(2, 3, width=3.8)
    lines = {
        "the best of N seeds": ([f"the best of {count}" for count in counts(scale)], "o-"),
        "ratio, by strength": (ratios(scale), "s-"),
        "ratio, without noise": ([STILL], "D"),
        "gradient_guidance": (aheads(scale), "^"),
        "look-ahead that trains": ([TUNED], "v"),
        LORA: ([LORA], "*"),
    }
    shown = [("calls", "reward"), ("seconds", "reward"), ("reward", "judge_3d"), ("reward", "diversity")]
    names = {"calls": "denoiser calls a picture", "seconds": "seconds a picture", "judge_3d": "judge: P(3D)"}
    for axis, (x, y) in zip(axes.flat, shown, strict=False):
        for label, (own, style) in lines.items():
            axis.plot([ways[w][x] for w in own], [ways[w][y] for w in own], style, label=label, markersize=5)
        axis.set(xlabel=names.get(x, x), ylabel=names.get(y, y))
        if x != "reward":
            ticks = [ways[way][x] for way in lines["the best of N seeds"][0]]
            axis.set(xscale="log", xlim=(0.7 * ticks[0], 2 * ticks[-1]))
            axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            axis.set_xticks([], minor=True)
    axes[0, 0].legend(fontsize=7)
    for axis, sheet, title in zip(
        axes[1, 1:], sheets(folder, len(wholes(scale))), ("filled in", "coloured"), strict=True
    ):
        axis.imshow(np.asarray(grid(sheet)))
        axis.set(title=f"known, {title}, whole")
        axis.axis("off")

    base, ahead = ways["the best of 1"], ways[AHEAD]
    equal = f"the best of {calls(AHEAD, 1)}"
    strengths = [ways[way] for way in ratios(scale)]
    named = [way for way in strengths if way["judge_name"] > 0.95]
    strongest = max(named or strengths[:1], key=lambda way: float(way["reward"]))
    judged = at_reward(strengths, ways[LORA]["reward"], "judge_3d")
    means = np.mean([row["rewards"] for row in rows if row["way"] == AHEAD], axis=0)
    gain, noise = differences(rows, AHEAD, equal)
    text = (
        f"Without guidance the reward is {base['reward']:.3f}. At {ahead['calls']} calls a picture `{AHEAD}` has "
        f"{ahead['reward']:.3f} and {equal} seeds {ways[equal]['reward']:.3f}: {gain:+.3f}, with a standard deviation "
        f"over seeds of {noise:.3f}. At {t} calls and {t + 1} scored pictures `{strongest['way']}` has "
        f"{strongest['reward']:.3f}, the most at which the judge reads the right name in over 95 %. A call with a "
        f"backward pass counts as two. Training {LORA} took {once} calls once; drawn with it {t} more each give "
        f"{ways[LORA]['reward']:.3f}: as many calls as {equal} or look-ahead would take for "
        f"{once / (ahead['calls'] - t):.0f} pictures, and the seconds of the ratio for "
        f"{training / max(1e-9, strongest['seconds'] - base['seconds']):.0f}. Drawn from the ancestral sampler, as "
        f"the ratio does, unguided pictures have {strengths[0]['reward']:.3f}."
    )
    if math.isfinite(judged):
        text += f" At the LoRA's reward the judge's P(3D) is {ways[LORA]['judge_3d']:.3f} with it, {judged:.3f} with "
        text += "the ratio."
    text += (
        f" Filled in and coloured at strength {STRENGTH}; mean squared distances to the whole pictures, of what was "
        f"not told: filled in {distances['filled guided']:.4f}, the known half's mean colour "
        f"{distances['filled plain']:.4f}, unguided {distances['filled unguided']:.4f}; coloured "
        f"{distances['coloured guided']:.4f}, left grey {distances['coloured plain']:.4f}, unguided "
        f"{distances['coloured unguided']:.4f}."
    )
    climbs = [float(row["rewards"][-1] - row["rewards"][0]) for row in rows if row["way"] == AHEAD]
    more, chance = differences(rows, TUNED, AHEAD)
    met = min(distances[f"{name} plain"] / distances[f"{name} guided"] for name in ("filled", "coloured"))
    claims = [
        Claim(
            "Gradient Guidance: drawn in rounds, each towards the last one's gradient, the reward climbs",
            f"{' → '.join(f'{mean:.2f}' for mean in means)}",
            compared(float(np.mean(climbs)), spread(climbs)),
        ),
        Claim(
            "Gradient Guidance: trained on what it draws, the denoiser gets farther (Algorithm 2)",
            f"{more:+.3f} at {ways[TUNED]['calls']} calls in place of {ahead['calls']}; its LoRA alone "
            f"{ways[ALONE]['reward']:.3f}; standard deviation of the difference {chance:.3f}",
            compared(more, chance),
        ),
        Claim(
            "PGDiff: a model that was trained for neither fills in and colours",
            f"at least {met:.1f} times nearer to the whole picture than a plain fill or the greys",
            "confirmed" if met > 2 else "weaker" if met > 1.1 else "not seen",
        ),
    ]
    return Report(rows, table, drawn, text, claims, scale.seeds)


GUIDED = Experiment(
    "Guidance",
    "What does a reward bring that is followed while drawing, without training?",
    guided_work,
    guidance,
)
