"""An experiment on few steps, and on a reward that is known by real pictures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftune.evaluation.kid import kernel_distance
from draftune.figures import figure
from draftune.methods import Batch
from draftune.models import Model
from draftune.prompts import load_prompts
from draftune.reproduce.lab import GUIDANCE, ONE, Lab, Scale, Work, slug
from draftune.reproduce.real import EXAMPLES, real_files, real_pictures
from draftune.reproduce.report import Claim, Experiment, Report, compared, spread
from draftune.rewards import load_reward
from draftune.sampling.ancestral import ancestral
from draftune.sampling.sampler import Latents
from draftune.utils.images import grid, open_image

RULERS = (1, 2, 3, 5, 20, 50)
EACH = 3
"""Pictures of each name, as many as there are real ones: one of each style."""
AT_ONCE = 32
SIZE = 8
CRITIC = f"discriminator(folder='{EXAMPLES}', width=32, learning_rate=0.001)"
POLICY, PLAIN, EVEN = "SFT-PG", "DRaFT-1", "DRaFT-1 (one critic step)"
WAYS = {POLICY: "sft_pg(generator_steps=4, value_learning_rate=0.001)", PLAIN: ONE, EVEN: ONE}
RATE = 3e-4
"""The learning rate of all; 0.001, the embedded model's own, left each with 3 steps farther away than it began."""
DISTANCES = ("by the judge", "by CLIP")
DETERMINISTIC, ANCESTRAL = "deterministic", "ancestral"
SAMPLERS = (DETERMINISTIC, ANCESTRAL)
Distances = dict[str, float]
"""Squared kernel distances to the real pictures, times 1,000, by the features that they are measured with."""


def ways(scale: Scale) -> list[tuple[str, int]]:
    """What is trained, and for how many sampling steps; that several critic steps are wanted is asked once."""
    fewest = min(scale.few)
    return [(name, steps) for steps in scale.few for name in WAYS if name != EVEN or steps == fewest]


def called(name: str, steps: int) -> str:
    return f"{name}, {steps} steps"


def work(name: str, steps: int, seed: int, scale: Scale) -> Work:
    """A run of as many scored pictures as any other; the critic learns from each batch of them."""
    batches = 1 if name == EVEN else scale.few_batches
    settings: dict[str, Any] = {
        "learning_rate": RATE,
        "reward": CRITIC,
        "num_inference_steps": steps,
        "batch_size": SIZE,
        "gradient_accumulation_steps": batches,
        "eval_every": 0,
    }
    if name == POLICY:
        settings["max_grad_norm"] = 0.1  # the paper's
    return Work(WAYS[name], scale.few_updates * scale.few_batches // batches, seed, settings)


def few_work(scale: Scale) -> list[Work]:
    return [work(name, steps, seed, scale) for seed in range(scale.seeds) for name, steps in ways(scale)]


@torch.no_grad()
def drawn(model: Model, names: Sequence[str], steps: int, sampler: str = DETERMINISTIC) -> Tensor:
    """EACH pictures of each name."""
    schedule, pictures = model.schedule(steps), []
    prompts, seeds = [name for name in names for _ in range(EACH)], list(range(EACH)) * len(names)
    if sampler == DETERMINISTIC:
        return model.generate(prompts, seeds, schedule, GUIDANCE, batch_size=AT_ONCE)
    for start in range(0, len(prompts), AT_ONCE):
        some, generator = prompts[start : start + AT_ONCE], torch.Generator().manual_seed(start)
        denoise, base = model.denoisers(some, schedule, GUIDANCE, "")
        noise = Latents(model.noise(generator, len(some)))
        *_, (*_, clean) = ancestral(Batch(some, noise, schedule, denoise, base, lambda clean: clean, generator))
        pictures.append(model.decode(clean).cpu())
    return torch.cat(pictures)


class Ruler:
    """Measures how far pictures are from real ones of the same names, by networks that nothing is trained against."""

    def __init__(self, lab: Lab) -> None:
        self.names = load_prompts("emoji-common")[: lab.scale.few_names]
        judge, clip = (load_reward(name) for name in ("emoji_style_probability", "emoji_clip"))
        self.networks: list[Callable[[Tensor], Tensor]] = [judge.features, clip.clip.embed_images]  # type: ignore[union-attr,list-item]
        assert lab.examples is not None
        self.pictures = real_pictures(lab.examples, self.names)
        self.real = self.features(self.pictures)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> list[Tensor]:
        return [torch.cat([network(some) for some in pictures.split(AT_ONCE)]) for network in self.networks]

    def distances(self, model: Model, steps: int, sampler: str = DETERMINISTIC) -> Distances:
        found = zip(DISTANCES, self.features(drawn(model, self.names, steps, sampler)), self.real, strict=True)
        return {name: 1000 * kernel_distance(ours, real) for name, ours, real in found}

    def halves(self) -> Distances:
        """The standard deviation of the distance between halves of the real pictures, over ways to halve them."""
        generator, half = torch.Generator().manual_seed(0), len(self.pictures) // 2
        orders = [torch.randperm(2 * half, generator=generator) for _ in range(20)]
        return {
            name: 1000 * float(np.std([kernel_distance(real[order[:half]], real[order[half:]]) for order in orders]))
            for name, real in zip(DISTANCES, self.real, strict=True)
        }


def base_distances(lab: Lab) -> dict[str, Distances]:
    """Of the base model by the number of steps, from the ancestral sampler too, and what chance alone makes of it."""
    ruler, model = Ruler(lab), lab.model()
    found = {str(steps): ruler.distances(model, steps) for steps in RULERS if steps <= lab.scale.few_ruler}
    for steps in lab.scale.few:
        found[f"{steps} {ANCESTRAL}"] = ruler.distances(model, steps, ANCESTRAL)
    return found | {"halves": ruler.halves()}


def tuned_distances(lab: Lab, name: str, steps: int, seed: int) -> dict[str, Distances]:
    """Of a run's pictures, by the sampler that drew them."""

    def measure() -> dict[str, Distances]:
        ruler, model = Ruler(lab), lab.tuned({"lora": lab.lora(work(name, steps, seed, lab.scale))})
        return {sampler: ruler.distances(model, steps, sampler) for sampler in SAMPLERS}

    found: dict[str, Distances] = lab.measured(slug(f"few-steps {called(name, steps)} {seed}"), measure)
    return found


def sheet(lab: Lab, count: int = 8) -> Any:
    """Pictures of few steps before and after, of many steps, and real ones."""
    assert lab.examples is not None
    names = load_prompts("emoji-common")[: lab.scale.few_names]
    there = {file.stem: file for file in real_files(lab.examples, names)}
    names = [name for name in names if name in there]
    names = (names[:: max(1, len(names) // count)] * count)[:count]
    rows = {}
    for steps in (*lab.scale.few, lab.scale.num_inference_steps):
        models = {"base": lab.model()}
        for name, own in ways(lab.scale):
            if own == steps:
                models[name] = lab.tuned({"lora": lab.lora(work(name, steps, 0, lab.scale))})
        for name, model in models.items():
            pictures = model.generate(names, [0] * count, model.schedule(steps), GUIDANCE, batch_size=count)
            rows[called(name, steps)] = pictures
    rows["real"] = torch.cat([open_image(there[name]) for name in names])
    return grid(list(rows.values()), list(rows), names)


def averaged(found: Sequence[Mapping[str, Distances]], sampler: str) -> Distances:
    """The means over seeds, and the standard deviations."""
    values = {key: [one[sampler][key] for one in found] for key in DISTANCES}
    means = {key: float(np.mean(of)) for key, of in values.items()}
    return means | {f"std {key}": spread(of) for key, of in values.items()}


def agreed(first: str, second: str) -> str:
    """The word for what two networks say: less where only one of them sees it."""
    if first == second:
        return first
    return "not seen" if "reversed" in (first, second) else "weaker"


def few_steps(lab: Lab) -> Report:
    scale = lab.scale
    base = lab.measured("few-steps-base", lambda: base_distances(lab))
    tuned: dict[tuple[str, int, str], Distances] = {}
    for name, steps in ways(scale):
        found = [tuned_distances(lab, name, steps, seed) for seed in range(scale.seeds)]
        tuned |= {(name, steps, sampler): averaged(found, sampler) for sampler in SAMPLERS}
    before = {(steps, DETERMINISTIC): base[str(steps)] for steps in scale.few}
    before |= {(steps, ANCESTRAL): base[f"{steps} {ANCESTRAL}"] for steps in scale.few}
    counts = [int(steps) for steps in base if steps.isdecimal()]
    rows = [{"pictures": "base", "steps": steps, "sampler": DETERMINISTIC, **base[str(steps)]} for steps in counts]
    rows += [{"pictures": "base", "steps": n, "sampler": ANCESTRAL, **before[n, ANCESTRAL]} for n in scale.few]
    rows += [{"pictures": name, "steps": n, "sampler": sampler, **row} for (name, n, sampler), row in tuned.items()]
    rows.append({"pictures": "half of the real ones: std", **base["halves"]})

    shown, axes = figure(1, 2, width=5.4, height=4.4)
    for key, style in zip(DISTANCES, ("-", "--"), strict=True):
        axes[0, 0].plot(counts, [base[str(n)][key] for n in counts], f"o{style}", color="#444444", label=f"base, {key}")
        for name, mark in zip(WAYS, "sPx", strict=True):
            own = [steps for other, steps in ways(scale) if other == name]
            values = [tuned[name, steps, DETERMINISTIC][key] for steps in own]
            axes[0, 0].plot(own, values, mark, markersize=7, label=f"{name}, {key}")
    axes[0, 0].set(xscale="log", xlabel="sampling steps", ylabel="distance to real pictures x 1,000")
    axes[0, 0].set_xticks(counts, [str(count) for count in counts])
    axes[0, 0].set_xticks([], minor=True)
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].imshow(sheet(lab))
    axes[0, 1].axis("off")

    key, many = DISTANCES[0], base[str(counts[-1])]
    papers = {
        # Which samples as it trains.
        (POLICY, ANCESTRAL): "a policy gradient with a learned critic makes samples of few steps more like real ones",
        (PLAIN, DETERMINISTIC): "a reward can be known by examples alone: the same critic, by its gradient",
    }
    claims, told = [], []
    for (name, sampler), paper in papers.items():
        other = SAMPLERS[1 - SAMPLERS.index(sampler)]
        for steps in scale.few:
            start, end = before[steps, sampler], tuned[name, steps, sampler]
            measured = "; ".join(
                f"{k} {start[k]:.1f} before, {end[k]:.1f} after (± {end[f'std {k}']:.1f})" for k in DISTANCES
            )
            words = [compared(start[k] - end[k], end[f"std {k}"], (start[k] - many[k]) / 2) for k in DISTANCES]
            claims.append(Claim(paper, f"{called(name, steps)}, {sampler} sampler: {measured}", agreed(*words)))
            told.append(f"{called(name, steps)}, from {before[steps, other][key]:.1f} to ")
            told[-1] += f"{tuned[name, steps, other][key]:.1f} by the {other} sampler"
    fewest = min(scale.few)
    plain, even = (tuned[name, fewest, DETERMINISTIC] for name in (PLAIN, EVEN))
    noise = {k: math.hypot(plain[f"std {k}"], even[f"std {k}"]) for k in DISTANCES}
    claims.append(
        Claim(
            "several steps of the critic are wanted for one of the model's",
            f"{called(PLAIN, fewest)}, ends at {plain[key]:.1f} with {scale.few_batches} for one and at "
            f"{even[key]:.1f} with one for one, which makes more steps; the difference's noise {noise[key]:.1f}",
            agreed(*(compared(even[k] - plain[k], noise[k]) for k in DISTANCES)),
        )
    )
    pictures = scale.few_updates * scale.few_batches * SIZE

    def both(found: Distances) -> str:
        return " and ".join(f"{found[key]:.1f}" for key in DISTANCES)

    rulers = ", ".join(f"with {steps} {both(base[str(steps)])}" for steps in counts)
    text = (
        f"Squared kernel distances x 1,000 {' and '.join(DISTANCES)}, between {EACH} pictures of each of "
        f"{scale.few_names} names that no run was trained on and the real ones; critics learned from real pictures of "
        f"other names. The base model by its sampling steps: {rulers}. Between halves of the real pictures "
        f"it varies by {both(base['halves'])}, so that of differences below these only their sign over seeds says "
        f"something. Every run scores {pictures:,} pictures, and its critic learns from each of them; learning rates "
        f"are {RATE:g} for all. On the side, {key}: {'; '.join(told)}."
    )
    return Report(rows, rows, shown, text, claims, scale.seeds)


FEW_STEPS = Experiment(
    "Few steps, and a reward known by examples",
    "Can a critic of real pictures make samples of few steps better, and does it take a policy gradient?",
    few_work,
    few_steps,
    wants_examples=True,
)
