"""Pictures drawn along a reward, and by the plain ways to a higher one: what each gives and costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftune.evaluation.metrics import evaluate, score_batches
from draftune.experimental.denoising_loss import LEVELS
from draftune.guidance.methods import load_guide, sample_guided
from draftune.models import Model
from draftune.reproduce.lab import GUIDANCE, ONE, Lab, Scale, Work, slug, tidy
from draftune.rewards.pixel import ImageMatch
from draftune.utils.images import open_image, save_image, to_pil

RATIOS = (0.0, 0.05, 0.1, 0.2, 0.5)
STILL = "ratio(strength=0.2, eta=0)"
AHEAD = "look-ahead(rise=2, rounds=4)"
OTHERS = ("look-ahead(rise=0.5, rounds=4)", "look-ahead(rise=2, rounds=8)")
TUNED = "look-ahead(rise=2, rounds=4, tune_from=1, learning_rate=0.001)"
ALONE = "the LoRA of that, drawn without guidance"
LORA = f"the LoRA of {ONE}"
SEEDS = 1000
"""From a picture's seed to that of the next candidate in its place."""
WHOLE = ("cat face", "strawberry", "rocket", "pizza")
STRENGTH = 0.3
"""Of the ratio that fills in and colours."""
Row = dict[str, Any]


def ratios(scale: Scale) -> list[str]:
    return [f"ratio(strength={strength:g})" for strength in RATIOS[: scale.grid]]


def aheads(scale: Scale) -> list[str]:
    return [AHEAD, *OTHERS[: scale.grid - 2]]


def wholes(scale: Scale) -> tuple[str, ...]:
    return WHOLE[: scale.eval_prompts]


def counts(scale: Scale) -> list[int]:
    """The best of how many: of one, of two, and of as many as cost the calls of each look-ahead."""
    return sorted({1, 2, *(calls(method, 1) for method in aheads(scale))})


def calls(method: str, steps: int) -> int:
    """Forward passes of the denoiser for a guided picture; one with a backward pass counts as two.

    Through frozen weights a backward pass costs what a forward one does.
    """
    guide = load_guide(method)
    rounds = guide.draws - 1
    return steps * (1 + 2 * rounds) + (2 * LEVELS * (guide.draws - guide.tune_from) if guide.tune_from else 0)


def training_calls(scale: Scale) -> int:
    """Forward passes of the denoiser for all of DRaFT-1's training, counted in the same way."""
    return scale.steps * 4 * (scale.num_inference_steps + 1)


def guided_work(scale: Scale) -> list[Work]:
    return [Work(ONE, scale.steps, seed) for seed in range(scale.seeds)]


def scored(lab: Lab, model: Model, seed: int, draw: Callable[[Sequence[str], Sequence[int]], Tensor]) -> Row:
    """What a way of drawing gives with the seeds of the held-out pictures, and its seconds for each of them."""
    seconds = 0.0

    def timed(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        nonlocal seconds
        start = time.perf_counter()
        pictures = draw(prompts, [seed * lab.scale.eval_images + own for own in seeds])
        seconds = (time.perf_counter() - start) / len(prompts)
        return pictures

    found = evaluate(timed, lab.reward, lab.judges, lab.eval_prompts, lab.scale.eval_images, model.device)
    return {**tidy(found.scores), "seconds": seconds}


def plain(lab: Lab, model: Model) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    schedule = model.schedule(lab.scale.num_inference_steps)
    return lambda prompts, seeds: model.generate(prompts, seeds, schedule, GUIDANCE, batch_size=4)


def best_of(lab: Lab, seed: int) -> list[Row]:
    """The plain way: of several pictures the one of the highest reward, for each of `counts`."""
    model = unguarded(lab)
    drawn: list[Tensor] = []
    rewards: list[Tensor] = []

    def best(count: int, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        while len(drawn) < count:
            drawn.append(plain(lab, model)(prompts, [own + SEEDS * len(drawn) for own in seeds]))
            rewards.append(score_batches(lab.reward, drawn[-1], prompts, model.device)[0])
        return torch.stack(drawn)[torch.stack(rewards).argmax(0), torch.arange(len(prompts))]

    rows: list[Row] = []
    for count in counts(lab.scale):
        row = scored(lab, model, seed, partial(best, count))
        spent = rows[-1]["seconds"] if rows else 0.0
        rows.append(row | {"count": count, "seconds": spent + row["seconds"]})
    return rows


def guided(lab: Lab, method: str, seed: int) -> list[Row]:
    """A way of guidance, with the mean reward of its drawings in turn; the LoRA that it trains is drawn alone too."""
    model = unguarded(lab)
    rewards: list[float] = []

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        options = {"num_inference_steps": lab.scale.num_inference_steps, "guidance_scale": GUIDANCE, "batch_size": 4}
        found = sample_guided(model, lab.reward, prompts, method, seeds=seeds, **options)
        rewards.extend(found.rewards.mean(1).tolist())
        return found.pictures

    rows = [scored(lab, model, seed, draw) | {"rewards": rewards}]
    if load_guide(method).tune_from:
        rows.append(scored(lab, model, seed, plain(lab, model)))
    return rows


def unguarded(lab: Lab) -> Model:
    """The model as the lab trains it: its graphs fit into memory as they are."""
    model = lab.model()
    model.set_checkpointing("no")
    return model


def measured(lab: Lab) -> list[Row]:
    """A row for each way and seed: calls and scored pictures for each picture, seconds, reward and judges."""
    scale, rows = lab.scale, []
    t = scale.num_inference_steps
    for seed in range(scale.seeds):
        for row in lab.measured(f"guidance-best-{seed}", partial(best_of, lab, seed)):
            count = row.pop("count")
            rows.append({"way": f"the best of {count}", "seed": seed, "calls": t * count, "scored": count} | row)
        for method in (*ratios(scale), STILL, *aheads(scale), TUNED):
            name = f"guidance-{slug(method)}-{seed}"
            found = lab.measured(name, partial(guided, lab, method, seed))
            ratio, rounds = method.startswith("ratio"), load_guide(method).draws - 1
            spent = {"calls": calls(method, t), "scored": t + 1 if ratio else 2 * rounds + 1}
            rows.append({"way": method, "seed": seed} | spent | found[0])
            if len(found) > 1:
                rows.append({"way": ALONE, "seed": seed, "calls": t, "scored": 0} | found[1])
    for work in guided_work(scale):
        final = tidy(lab.run(work).final)
        rows.append({"way": LORA, "seed": work.seed, "calls": t, "scored": 0} | final)
    return rows


def pictures(lab: Lab, folder: Path) -> dict[str, float]:
    """Pictures filled in and coloured, into `folder`; mean squared distances to the whole ones, of what was not told.

    The plain ways are the known half's mean colour and the greys as they are.
    """
    model, prompts = unguarded(lab), wholes(lab.scale)
    folder.mkdir(parents=True, exist_ok=True)
    options = {"num_inference_steps": lab.scale.num_inference_steps, "guidance_scale": GUIDANCE}
    schedule = model.schedule(lab.scale.num_inference_steps)
    whole = model.generate(prompts, range(11, 11 + len(prompts)), schedule, GUIDANCE)
    base = model.generate(prompts, [0] * len(prompts), schedule, GUIDANCE)
    hidden = torch.zeros_like(whole[:1])
    hidden[..., hidden.shape[-1] // 2 :] = 1
    save_image(to_pil(hidden)[0], folder / "mask.png")
    found: dict[str, list[Tensor]] = {"filled": [], "coloured": []}
    for i, prompt in enumerate(prompts):
        path = folder / f"whole-{i}.png"
        save_image(to_pil(whole[i : i + 1])[0], path)
        for name, reward in (
            ("filled", ImageMatch(str(path), mask=str(folder / "mask.png"))),
            ("coloured", ImageMatch(str(path), "gray")),
        ):
            drawn = sample_guided(model, reward, prompt, f"ratio(strength={STRENGTH})", seeds=[0], **options)
            found[name].append(drawn.pictures)
            save_image(to_pil(drawn.pictures)[0], folder / f"{name}-{i}.png")
    half = hidden.bool().expand_as(whole)
    mean = (whole * (1 - hidden)).mean((2, 3), keepdim=True) / (1 - hidden).mean()
    greys = whole.mean(1, keepdim=True).expand_as(whole)
    tried = {"filled": (torch.cat(found["filled"]), mean.expand_as(whole), half)}
    tried["coloured"] = (torch.cat(found["coloured"]), greys, torch.ones_like(half))
    distances = {}
    for name, (ours, simple, where) in tried.items():
        for label, other in (("guided", ours), ("plain", simple), ("unguided", base)):
            distances[f"{name} {label}"] = float((other - whole)[where].square().mean())
    return distances


def sheets(folder: Path, count: int) -> list[list[Tensor]]:
    """Rows [count, 3, H, W] of what is known, drawn and whole, for what was filled in and for what was coloured."""
    filled, coloured, whole = (
        torch.cat([open_image(folder / f"{name}-{i}.png") for i in range(count)])
        for name in ("filled", "coloured", "whole")
    )
    hidden, greys = open_image(folder / "mask.png"), whole.mean(1, keepdim=True).expand_as(whole)
    return [[whole * (1 - hidden) + 0.5 * hidden, filled, whole], [greys, coloured, whole]]
