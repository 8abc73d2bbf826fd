"""Experiments on whole curves: what a reward costs to reach, and what comes after its best point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from draftune.reproduce.figures import band, color, figure
from draftune.reproduce.lab import DIVERSITY, JUDGE, LV, NAMED, ONE, REWARD, Lab, Record, Scale, Work
from draftune.reproduce.report import Claim, Experiment, Report


def methods(scale: Scale) -> list[str]:
    """What is compared, with the settings that fit the number of sampling steps: m is the paper's 20 of 50."""
    t = scale.num_inference_steps
    late = max(2, round(0.4 * t))
    return [
        ONE,
        LV,
        f"draft-k(k={t // 2})",
        "draft",
        f"refl(m={late})",
        f"alignprop(m={t // 2})",
        f"drtune(k={max(2, t // 4)}, m={max(2, t // 4)})",
        "leapalign",
    ]


def policy(scale: Scale, seed: int) -> Work:
    settings = {"batch_size": 8, "gradient_accumulation_steps": scale.policy_batches}
    return Work("ddpo(min_count=4, timestep_fraction=0.25)", scale.policy_updates, seed, settings)


def matching(scale: Scale) -> Work:
    return Work(f"adjoint-matching(scale=10, k={max(2, scale.num_inference_steps // 4)})", scale.long)


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
            "reward": row[REWARD],
            "judge_3d": row[JUDGE],
            "judge_name": row[NAMED],
            "diversity": row[DIVERSITY],
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
    axes[0, 0].legend(fontsize=7)
    ddpo = policy(lab.scale, 0).method
    start = [row for row in rows if row["update"] == 0 and row["method"] == LV]
    table = [summary(start, LV) | {"method": "base"}, *(summary(rows, name) for name in names)]

    base = averaged(rows, LV, "reward")[0]
    best, final = max(averaged(rows, ddpo, "reward")), averaged(rows, LV, "reward")[-1]
    level = min(best, max(averaged(rows, LV, "reward")))
    spent = {name: averaged(rows, name, "reward_queries")[-1] for name in (ddpo, LV)}
    ratios = {}
    for unit in ("reward_queries", "seconds"):
        slow, fast = (reached(averaged(rows, m, unit), averaged(rows, m, "reward"), level) for m in (ddpo, LV))
        ratios[unit] = slow / fast if slow and fast else 0.0
    gains = [row["reward"] for row in rows if row["method"] == ddpo and row["update"] == lab.scale.policy_updates]
    spread = float(np.std(gains))
    share = (best - base) / (final - base)
    text = (
        f"DRaFT-LV went from {base:.3f} to {final:.3f} with {spent[LV]:.0f} scored pictures. DDPO's best in "
        f"{spent[ddpo]:.0f} was {best:.3f} (its last values have a standard deviation of {spread:.3f} over seeds), "
        f"{100 * share:.0f} % of that gain. To what DDPO reached, it needed {ratios['reward_queries']:.0f} times the "
        f"reward queries of DRaFT-LV and {ratios['seconds']:.0f} times the seconds. All are evaluated with the "
        "deterministic sampler; DDPO learns on pictures of the ancestral one. Seconds are updates times the median of "
        "one, measured on its own."
    )
    moved = best - base > 2 * spread
    ratio = ratios["reward_queries"]
    verdict = "not seen" if not moved else "confirmed" if ratio > 200 else "weaker" if ratio > 1 else "reversed"
    measured = f"{ratio:.0f} times at DDPO's best, {100 * share:.0f} % of DRaFT-LV's gain"
    if not moved:
        measured += ", within the noise of the seeds: no ratio can be read off"
    claims = [Claim("DRaFT needs more than 200 times fewer reward queries than DDPO", measured, verdict)]
    return Report(rows, table, drawn, text, claims, lab.scale.seeds)


def summary(rows: Sequence[dict[str, Any]], method: str) -> dict[str, Any]:
    """A method's last evaluation, the mean over its seeds and the reward's standard deviation."""
    own = [row for row in rows if row["method"] == method]
    last = [row for row in own if row["update"] == own[-1]["update"]]
    keys = ("reward", "judge_3d", "judge_name", "diversity", "reward_queries", "seconds")
    means: dict[str, Any] = {key: float(np.mean([row[key] for row in last])) for key in keys}
    means["reward_queries"] = int(means["reward_queries"])
    spread = float(np.std([row["reward"] for row in last]))
    return {"method": method, "updates": last[0]["update"], **means, "std of reward": spread}


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
                "reward there": best["reward"],
                "updates": own[-1]["update"],
                "reward": own[-1]["reward"],
                "P(3D)": own[-1]["judge_3d"],
                "right name": own[-1]["judge_name"],
                "diversity": own[-1]["diversity"],
            }
        )
    axes[0, 0].legend(fontsize=7)
    gradients = [row for row in table if not row["method"].startswith(("ddpo", "adjoint"))]
    start = rows[0]["diversity"]
    lost = [row for row in gradients if row["diversity"] < 0.8 * start]
    fell = [row for row in gradients if row["P(3D)"] < row["P(3D) there"] - 0.05 or row["right name"] < 0.95]
    kept = next(row for row in table if row["method"].startswith("adjoint"))
    ends = ", ".join(f"{row['method']} {row['diversity']:.3f}" for row in gradients)
    text = (
        f"Diversity within a prompt is {start:.3f} at the start. After {lab.scale.long} updates: {ends}. Of "
        f"{len(gradients)} methods, {len(fell)} had lost what the judge saw at its best (P(3D) lower by 0.05, or a "
        f"right name in fewer than 95 of 100) while the training reward rose on. Adjoint Matching, whose aim is not "
        f"the reward alone, stood at a reward of {kept['reward']:.3f} with a diversity of {kept['diversity']:.3f}."
    )
    verdict = "confirmed" if len(lost) == len(gradients) else "weaker" if lost else "not seen"
    measured = (
        f"{len(lost)} of {len(gradients)} methods below 80 % of the base's diversity after {lab.scale.long} updates"
    )
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
