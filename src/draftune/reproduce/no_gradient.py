"""An experiment on rewards without a gradient: estimated, by policy gradients, and smoothed where it is a threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import numpy as np

from draftune.errors import DraftuneError
from draftune.figures import band, figure
from draftune.models.base import default_device
from draftune.reproduce.lab import DIVERSITY, JUDGE, LV, NAMED, ONE, REWARD, Lab, Record, Scale, Work
from draftune.reproduce.optimizers import READ
from draftune.reproduce.report import Claim, Experiment, Report, compared, spread
from draftune.rewards import load_reward
from draftune.training.checks import probe_reward

BYTES = "jpeg_file_size"
LEVEL = 6.0
SPREAD = 2.0
"""Of `emoji_aesthetic` from picture to picture of the base model."""
ABOVE = f"threshold({REWARD}, at={LEVEL:g})"
JUDGES = "emoji_name_accuracy + emoji_style_probability(style='3d')"
SIZE = f"held-out/{BYTES}"
SHARE, CLIMBED = f"held-out/threshold({REWARD})", f"held-out/{REWARD}"
POLICY = "ddpo(min_count=4, timestep_fraction=0.25)"
RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of which the policy has the best, by its first seed; 0.01 loses names, and 0.03 all of them.

Seen with the loss that was summed over elements and steps.
"""
KEPT = {JUDGE: "judge_3d", NAMED: "judge_name", DIVERSITY: "diversity"}


@dataclass(frozen=True)
class Way:
    """A way to train on a reward that gives no gradient."""

    name: str
    method: str
    reward: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def annealed(width: float, power: float) -> str:
    """The threshold, with a width in units of the reward's spread that falls as update^-power."""
    return f"threshold({REWARD}, at={LEVEL:g}, temperature={SPREAD * width:g}, decay={power:g})"


PICTURES = f"zeroth_order({BYTES}, coordinates=4, perturbation_std=0.02, basis=high_pass, size=2)"
LATENTS = f"zeroth_order({BYTES}, coordinates=8, perturbation_std=0.1, size=2, space=latent)"
ESTIMATED = (
    Way("estimated in pictures, DRaFT-1", ONE, PICTURES),
    Way("estimated in latents, DRaFT-1", ONE, LATENTS),
    Way("estimated in pictures, DRaFT-LV", LV, PICTURES),
    Way("estimated in latents, DRaFT-LV", LV, LATENTS),
)
RULERS = (
    Way("differentiable JPEG, DRaFT-1", ONE, "jpeg_compressibility"),
    Way("differentiable JPEG, DRaFT-LV", LV, "jpeg_compressibility"),
)
OVER = (
    Way("width stays at 0.15", ONE, annealed(0.15, 0.0)),
    Way("width falls from 0.6", ONE, annealed(0.6, 0.5)),
    Way("without the threshold", ONE, REWARD),
)
WAYS = (*ESTIMATED, *RULERS, *OVER)
DDPO = "DDPO"


def run_of(way: Way, seed: int, scale: Scale) -> Work:
    judges = f"{JUDGES} + {ABOVE} + {REWARD}" if way in OVER else f"{JUDGES} + {BYTES}"
    return Work(way.method, scale.steps, seed, {"reward": way.reward, "held_out": judges, **way.settings})


def policy(rate: float, seed: int, scale: Scale) -> Work:
    settings: dict[str, Any] = {"reward": BYTES, "held_out": f"{JUDGES} + {BYTES}", "learning_rate": rate}
    settings |= {"batch_size": 8, "gradient_accumulation_steps": scale.policy_batches, "eval_every": half(scale)}
    return Work(POLICY, scale.policy_updates, seed, settings)


def half(scale: Scale) -> int:
    return max(1, scale.policy_updates // 2)


def search(scale: Scale) -> dict[float, Work]:
    """The first halves of DDPO's runs of one seed, by their learning rates."""
    return {rate: replace(policy(rate, 0, scale), steps=half(scale)) for rate in RATES[-scale.rates :]}


def work(scale: Scale) -> list[Work]:
    """All runs but DDPO's whole ones, whose learning rate is not known before."""
    return [*(run_of(way, seed, scale) for seed in range(scale.seeds) for way in WAYS), *search(scale).values()]


def no_gradient(lab: Lab) -> Report:
    scale, seeds = lab.scale, range(lab.scale.seeds)
    found = {way.name: [lab.run(run_of(way, seed, scale)) for seed in seeds] for way in WAYS}
    searched = {rate: lab.run(first) for rate, first in search(scale).items()}
    readable = [rate for rate in searched if searched[rate].final[NAMED] >= READ]
    rate = max(readable or searched, key=lambda rate: searched[rate].final[SIZE])
    found[DDPO] = [lab.run(policy(rate, seed, scale)) for seed in seeds]
    smaller, over = [way.name for way in (*ESTIMATED, *RULERS)] + [DDPO], [way.name for way in OVER]

    rows = [row for name in smaller for row in rows_of(name, found[name], {SIZE: "kB"})]
    rows += [row for name in over for row in rows_of(name, found[name], {SHARE: "above", CLIMBED: "aesthetic"})]
    table = [summary(rows, name) for name in (*smaller, *over)]
    drawn, axes = figure(1, 2, width=5.2, height=4)
    for axis, names, key, label in (
        (axes[0, 0], smaller, SIZE, "kB of the JPEG file"),
        (axes[0, 1], over, SHARE, f"share of pictures above {LEVEL:g}"),
    ):
        for name in names:
            sign = -1 if key == SIZE else 1
            runs = [[sign * row[key] for row in record.evaluations] for record in found[name]]
            queries = [row["reward_queries"] for row in found[name][0].evaluations]
            band(axis, queries, runs, name, marker=".")
        axis.set(xlabel="scored pictures", ylabel=label)
        axis.set_xscale("symlog", linthresh=100)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)

    hard = lab.measured("no-gradient-hard", lambda: refused(lab))
    asked = found[DDPO][0].final["reward_queries"]
    near = "; ".join(f"{way.name} {at_queries(found[way.name], asked):.0f}" for way in (*ESTIMATED, *RULERS))
    which = f"the best of those that leave the judge {READ:.0%} of the names" if readable else "one that loses names"
    tried = ", ".join(
        f"{-1000 * record.final[SIZE]:.0f} bytes and {record.final[NAMED]:.0%} at {rate:g}"
        for rate, record in searched.items()
    )
    text = (
        f"Files: the base model's pictures are {-1000 * found[DDPO][0].evaluations[0][SIZE]:.0f} bytes each. "
        + told(found, smaller, lambda record: -1000 * record.final[SIZE], "{:.0f} bytes")
        + f"DDPO's learning rate is {which}, by half a run of its first seed ({tried}). At its {asked:.0f} scored "
        f"pictures, or at their ends before, the others are at, on lines between evaluations: {near} bytes. The "
        "differentiable JPEG is climbed in place of the files' size, as a ruler. Threshold, by "
        f"{ONE}: {hard} Of the base model's pictures {found[over[0]][0].evaluations[0][SHARE]:.0%} are above "
        f"{LEVEL:g}. "
        + told(found, over, lambda record: record.final[SHARE], "{:.0%}")
        + "Where a threshold's score has a gradient, as here, climbing the score is the plain way. All counts include "
        "the changed pictures, and those that were scored a second time for the log."
    )
    return Report(rows, table, drawn, text, claims_of(found), scale.seeds)


def rows_of(name: str, records: Sequence[Record], keys: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"way": name, "seed": seed, "update": int(row["step"]), "reward_queries": int(row["reward_queries"])}
        | {short: -row[long] if long == SIZE else row[long] for long, short in {**keys, **KEPT}.items()}
        for seed, record in enumerate(records)
        for row in record.evaluations
    ]


def summary(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """A way's last evaluations, the means over its seeds."""
    own = [row for row in rows if row["way"] == name]
    last = [row for row in own if row["update"] == own[-1]["update"]]
    score = "kB" if "kB" in last[0] else "above"
    means = {key: mean(row[key] for row in last) for key in last[0] if key not in ("way", "seed")}
    whole = {key: round(means[key]) for key in ("reward_queries", "update")}
    return {"way": name, **means, **whole, "std": spread([row[score] for row in last])}


def at_queries(records: Sequence[Record], queries: float) -> float:
    """The mean size in bytes after this many scored pictures, on lines between evaluations."""

    def size(record: Record) -> float:
        asked, sizes = ([row[key] for row in record.evaluations] for key in ("reward_queries", SIZE))
        return float(np.interp(queries, asked, sizes))

    return -1000 * mean(map(size, records))


def told(
    found: Mapping[str, Sequence[Record]], names: Sequence[str], value: Callable[[Record], float], unit: str
) -> str:
    """Where each way ended, what it took, and what it left of the names."""

    def end(name: str) -> str:
        records = found[name]
        queries, named = (mean(record.final[key] for record in records) for key in ("reward_queries", NAMED))
        reached = unit.format(mean(map(value, records)))
        return f"{name} {reached} with {queries:.0f} scored pictures, {named:.0%} of the names read"

    return f"After training: {'; '.join(map(end, names))}. "


def refused(lab: Lab) -> str:
    """What training says of the threshold as it is."""
    model, reward = lab.model(), load_reward(ABOVE).to(default_device())
    prompts = lab.prompts[:2]
    pictures = model.generate(prompts, [0, 1], model.schedule(lab.scale.num_inference_steps), 3.0)
    try:
        probe_reward(reward, pictures.to(model.device), prompts)
    except DraftuneError as error:
        return f"as it is, without smoothing, it is refused before training (“{error}”)."
    return "as it is, without smoothing, it is not refused."


def gains(records: Sequence[Record], key: str) -> list[float]:
    return [record.final[key] - record.evaluations[0][key] for record in records]


def claims_of(found: Mapping[str, Sequence[Record]]) -> list[Claim]:
    """What the sources promise of their own ways, in the words of what was measured."""
    claims = []
    for way in ESTIMATED:
        (exact,) = (other for other in RULERS if other.method == way.method)
        gained, ruler = gains(found[way.name], SIZE), mean(gains(found[exact.name], SIZE))
        claims.append(
            Claim(
                f"a reward of which only scores are known can be climbed ({way.name})",
                f"{-1000 * mean(gained):+.0f} bytes; {-1000 * ruler:+.0f} by the differentiable JPEG",
                compared(mean(gained), spread(gained), ruler / 2),
            )
        )
    fixed, falling = (gains(found[way.name], SHARE) for way in OVER[:2])
    claims.append(
        Claim(
            "a smoothed threshold can be trained on",
            f"{mean(falling):+.0%} of the pictures above it",
            compared(mean(falling), spread(falling)),
        )
    )
    difference, noise = mean(falling) - mean(fixed), max(spread(falling), spread(fixed))
    claims.append(
        Claim(
            "a width that falls does better than one that stays",
            f"{difference:+.0%} of the pictures; over seeds these vary by {noise:.0%}",
            compared(difference, noise),
        )
    )
    return claims


NO_GRADIENT = Experiment(
    "No gradient", "What is to be had from rewards that give scores and no gradient?", work, no_gradient
)
