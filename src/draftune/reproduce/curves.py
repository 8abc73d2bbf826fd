"""Experiments on whole curves: what a reward costs to reach, and what comes after its best point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from draftune.figures import band, color, figure, legend
from draftune.reproduce.lab import LV, ONE, Lab, Record, Scale, Work, tidy
from draftune.reproduce.report import Claim, Experiment, Report, spread


def half(scale: Scale) -> str:
    """DRaFT-10 at 20 steps."""
    return f"draft_k(k={scale.num_inference_steps // 2})"


def deep(scale: Scale) -> str:
    quarter = max(2, scale.num_inference_steps // 4)
    return f"drtune(k={quarter}, m={quarter})"


def methods(scale: Scale) -> list[str]:
    """What is compared, with the settings that fit the number of sampling steps: m is the paper's 20 of 50."""
    t = scale.num_inference_steps
    late = max(2, round(0.4 * t))
    return [
        ONE,
        LV,
        half(scale),
        "draft",
        f"refl(m={late})",
        f"alignprop(cut=uniform, m={t // 2})",
        deep(scale),
        "leapalign",
    ]


def policy(scale: Scale, seed: int) -> Work:
    settings = {"batch_size": 8, "gradient_accumulation_steps": scale.policy_batches}
    return Work("ddpo(min_count=4, timestep_fraction=0.25)", scale.policy_updates, seed, settings)


def matching(scale: Scale) -> Work:
    return Work(f"adjoint_matching(scale=10, k={max(2, scale.num_inference_steps // 4)})", scale.long)


def efficiency_work(scale: Scale) -> list[Work]:
    gradients = [Work(method, scale.steps, seed) for seed in range(scale.seeds) for method in methods(scale)]
    return gradients + [policy(scale, seed) for seed in range(scale.seeds)]


def overoptimisation_work(scale: Scale) -> list[Work]:
    return [Work(method, scale.long) for method in methods(scale)] + [matching(scale), policy(scale, 0)]


def seconds_of(lab: Lab, work: Work) -> float:
    """Of one update, measured apart from the run, which other work may have held up."""
    size = work.settings.get("batch_size", 4)
    return lab.cost(work.method, size)["seconds"] * work.settings.get("gradient_accumulation_steps", 1)


def rows_of(work: Work, record: Record) -> list[dict[str, Any]]:
    return [
        {
            "method": work.method,
            "seed": work.seed,
            "update": int(row["step"]),
            "reward_queries": int(row["reward_queries"]),
            **tidy(row),
        }
        for row in record.evaluations
    ]


def reached(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where a curve, straight between its points, first gets to a level."""
    if y[0] >= level:
        return float(x[0])
    for (x0, y0), (x1, y1) in zip(zip(x, y, strict=True), zip(x[1:], y[1:], strict=False), strict=False):
        if y1 >= level:
            return float(x0 + (x1 - x0) * (level - y0) / (y1 - y0))
    return None


def averaged(rows: Sequence[dict[str, Any]], method: str, key: str) -> list[float]:
    """A method's curve, the mean over its seeds."""
    seeds = sorted({row["seed"] for row in rows if row["method"] == method})
    curves = [[row[key] for row in rows if row["method"] == method and row["seed"] == seed] for seed in seeds]
    return [float(v) for v in np.mean(curves, axis=0)]


def efficiency(lab: Lab) -> Report:
    works = efficiency_work(lab.scale)
    rows = []
    for work in works:
        second = seconds_of(lab, work)
        rows += [row | {"seconds": row["update"] * second} for row in rows_of(work, lab.run(work))]
    names = list(dict.fromkeys(work.method for work in works))
    drawn, axes = figure(2, 2)
    for i, (key, label) in enumerate([("reward", "training reward"), ("judge_3d", "judge: P(3D)")]):
        for j, unit in enumerate(["reward_queries", "seconds"]):
            for name in names:
                seeds = range(lab.scale.seeds)
                runs = [[row[key] for row in rows if (row["method"], row["seed"]) == (name, s)] for s in seeds]
                x = averaged(rows, name, unit)
                band(axes[i, j], x[1:], [run[1:] for run in runs], name.partition("(min")[0], color=color(name))
            axes[i, j].axhline(rows[0][key], color="black", linestyle=":", linewidth=1, label="base")
            axes[i, j].set(xscale="log", xlabel="reward queries" if j == 0 else "seconds of training", ylabel=label)
    legend(drawn, axes[0, 0])
    ddpo = policy(lab.scale, 0).method
    start = [row for row in rows if row["update"] == 0 and row["method"] == LV]
    table = [summary(start, LV) | {"method": "base"}, *(summary(rows, name) for name in names)]

    slow, fast = ([averaged(rows, name, key) for key in ("reward_queries", "seconds", "reward")] for name in (ddpo, LV))
    base, final, best = fast[2][0], fast[2][-1], max(slow[2])
    last = [row["reward"] for row in rows if row["method"] == ddpo and row["update"] == lab.scale.policy_updates]
    noise, share = spread(last), (best - base) / ((final - base) or 1.0)
    # Between the start and the first evaluation nothing was measured: what lies there is only known to be no later.
    bound = best <= fast[2][1]
    level = min(best, final)
    ratios = []
    for i in (0, 1):
        late, early = reached(slow[i], slow[2], level), reached(fast[i], fast[2], level)
        assert late is not None
        assert early is not None
        ratios.append(late / (fast[i][1] if bound else early))
    text = (
        f"DRaFT-LV went from {base:.3f} to {final:.3f} with {fast[0][-1]:.0f} scored pictures. DDPO's best in "
        f"{slow[0][-1]:.0f} was {best:.3f}, {100 * share:.0f} % of that gain; over seeds its last values have a "
        f"standard deviation of {noise:.3f}. "
    )
    moved = best - base > 2 * noise
    if not moved:
        text += "That is within the noise, so that no ratio can be read off. "
        measured = f"DDPO has {100 * share:.0f} % of DRaFT-LV's gain after {slow[0][-1]:.0f} queries, within its noise"
    else:
        least = "at least " if bound else ""
        text += (
            f"For its best it needed {least}{ratios[0]:.0f} times the reward queries of DRaFT-LV and {least}"
            f"{ratios[1]:.0f} times the seconds"
        )
        text += ": DRaFT-LV is past that at its first evaluation. " if bound else ". "
        measured = f"{least}{ratios[0]:.0f} times, at {100 * share:.0f} % of DRaFT-LV's gain"
    text += (
        "DDPO runs at the learning rate of the others and was not tuned; a budget this small can't show what it does "
        "with more. All are evaluated with the deterministic sampler; DDPO learns on pictures of the ancestral one. "
        "Seconds are updates times the median of one, measured on its own, with checkpointing."
    )
    verdict = "confirmed" if ratios[0] > 200 else "weaker" if ratios[0] > 1 else "reversed"
    paper = "DDPO needs more than 200 times the reward queries of DRaFT"
    claims = [Claim(paper, measured, verdict if moved else "not seen")]
    return Report(rows, table, drawn, text, claims, lab.scale.seeds)


def summary(rows: Sequence[dict[str, Any]], method: str) -> dict[str, Any]:
    """A method's last evaluation, the mean over its seeds and the reward's standard deviation."""
    own = [row for row in rows if row["method"] == method]
    last = [row for row in own if row["update"] == own[-1]["update"]]
    keys = ("reward", "judge_3d", "judge_name", "diversity", "reward_queries", "seconds")
    means: dict[str, Any] = {key: float(np.mean([row[key] for row in last])) for key in keys}
    means["reward_queries"] = int(means["reward_queries"])
    return {
        "method": method,
        "updates": last[0]["update"],
        **means,
        "std of reward": spread([row["reward"] for row in last]),
    }


def overoptimisation(lab: Lab) -> Report:
    works = overoptimisation_work(lab.scale)
    rows = [row for work in works for row in rows_of(work, lab.run(work))]
    keys = {"reward": "training reward", "judge_3d": "judge: P(3D)", "judge_name": "judge: right name"}
    drawn, axes = figure(2, 2)
    table = []
    for work in works:
        own = [row for row in rows if row["method"] == work.method]
        for axis, (key, label) in zip(axes.flat, [*keys.items(), ("diversity", "diversity in a prompt")], strict=True):
            axis.plot(
                [row["update"] for row in own],
                [row[key] for row in own],
                label=work.method.partition("(min")[0],
                color=color(work.method),
            )
            axis.set(xlabel="updates", ylabel=label)
        best = max(own, key=lambda row: row["judge_3d"] * row["judge_name"])
        table.append(
            {
                "method": work.method,
                "judge best at update": best["update"],
                "P(3D) there": best["judge_3d"],
                "right name there": best["judge_name"],
                "reward there": best["reward"],
                "updates": own[-1]["update"],
                "reward": own[-1]["reward"],
                "P(3D)": own[-1]["judge_3d"],
                "right name": own[-1]["judge_name"],
                "diversity": own[-1]["diversity"],
            }
        )
    legend(drawn, axes[0, 0])
    gradients = [row for row in table if not row["method"].startswith(("ddpo", "adjoint"))]
    start = rows[0]["diversity"]
    less = [row for row in gradients if row["diversity"] < 0.8 * start]
    alike = [row for row in gradients if row["diversity"] < 0.25 * start]
    gamed = [
        row
        for row in gradients
        if row["reward"] > row["reward there"] and row["right name"] < row["right name there"] - 0.05
    ]
    kept = next(row for row in table if row["method"].startswith("adjoint"))
    ends = ", ".join(f"{row['method']} {row['diversity']:.3f}" for row in gradients)
    text = (
        f"Diversity within a prompt is {start:.3f} at the start. After {lab.scale.long} updates: {ends}. In "
        f"{len(gamed)} of these {len(gradients)} methods the reward rose on from the judge's best point while the "
        f"judge read the right name in at least 5 % fewer pictures. Adjoint Matching, whose aim is not the reward "
        f"alone, stood at a reward of {kept['reward']:.3f} with a diversity of {kept['diversity']:.3f}."
    )
    n = len(gradients)
    verdict = "confirmed" if len(alike) == n else "weaker" if less else "not seen"
    measured = f"of {n} reward-gradient methods {len(less)} keep less than 80 % and {len(alike)} less than 25 % of the "
    measured += f"base's diversity after {lab.scale.long} updates"
    claims = [Claim("trained too long, every method collapses to near-identical pictures", measured, verdict)]
    return Report(rows, table, drawn, text, claims, 1)


EFFICIENCY = Experiment(
    "Sample efficiency",
    "How many scored pictures, and seconds, does each method need?",
    efficiency_work,
    efficiency,
)
OVEROPTIMISATION = Experiment(
    "Over-optimisation",
    "What happens far past the best point?",
    overoptimisation_work,
    overoptimisation,
)
