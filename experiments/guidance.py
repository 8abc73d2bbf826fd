"""Reward guidance during sampling, against the best of N seeds and a LoRA of DRaFT-1."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from draftune.evaluation.metrics import evaluate, score_batches
from draftune.experimental.denoising_loss import LEVELS
from draftune.guidance.methods import load_guide
from draftune.guidance.sample import sample_guided
from draftune.models import DiffusionModel
from draftune.rewards.pixel import ImageMatch
from draftune.utils.images import grid, save_image, to_pil
from experiments.budget import Budget
from experiments.report import Experiment, Panel, aggregate
from experiments.runner import DRAFT_1, GUIDANCE_SCALE, ExperimentRunner, Row, RunSpec, rename_columns

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.5)
WITHOUT_NOISE = "pgdiff_dynamic(strength=0.2, eta=0)"
LOOK_AHEAD = "gradient_guidance(target_increase=2, rounds=4)"
MORE_LOOK_AHEAD = ("gradient_guidance(target_increase=0.5, rounds=4)", "gradient_guidance(target_increase=2, rounds=8)")
TRAINED = "gradient_guidance(target_increase=2, rounds=4, finetune_from_round=1, learning_rate=0.001)"
SEED_STRIDE = 1000
"""Difference between the seeds of two candidates for one image."""
RESTORED = ("cat face", "strawberry", "rocket", "pizza")
"""Prompts of the images that are inpainted and colorized."""


def runs(budget: Budget) -> list[RunSpec]:
    return [RunSpec(DRAFT_1, budget.steps, seed) for seed in range(budget.seeds)]


def guided_variants(budget: Budget) -> dict[str, str]:
    """Return the family of each guidance method."""
    ratios = {f"pgdiff_dynamic(strength={strength:g})": "ratio, by strength" for strength in STRENGTHS[: budget.grid]}
    ahead = dict.fromkeys((LOOK_AHEAD, *MORE_LOOK_AHEAD[: budget.grid - 2]), "gradient_guidance")
    return {**ratios, WITHOUT_NOISE: "ratio, no noise", **ahead, TRAINED: "look-ahead, trains a LoRA"}


def calls(method: str, steps: int) -> int:
    """Return the denoiser calls for one guided image. A call with a backward pass counts as two.

    A backward pass through frozen weights costs as much as a forward pass.
    """
    guide = load_guide(method)
    training = 2 * LEVELS * (guide.num_samplings - guide.finetune_from_round) if guide.finetune_from_round else 0
    return steps * (1 + 2 * (guide.num_samplings - 1)) + training


def candidate_counts(budget: Budget) -> list[int]:
    """Return N of best-of-N: 1, 2, and as many as have the cost of each look-ahead."""
    ahead = [name for name, family in guided_variants(budget).items() if family == "gradient_guidance"]
    return sorted({1, 2, *(calls(method, 1) for method in ahead)})


def unchecked(runner: ExperimentRunner) -> DiffusionModel:
    """Return the base model without gradient checkpointing, as in the runs."""
    model = runner.model()
    model.set_checkpointing("none")
    return model


Sampler = Callable[[Sequence[str], Sequence[int]], Tensor]


def timed_scores(runner: ExperimentRunner, model: DiffusionModel, seed: int, sample: Sampler) -> Row:
    """Evaluate a sampler with the images' seeds shifted by `seed`, and measure its seconds per image."""
    seconds, images_per_prompt = 0.0, runner.budget.num_validation_images

    def timed(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        nonlocal seconds
        start = time.perf_counter()
        images = sample(prompts, [seed * images_per_prompt + own for own in seeds])
        seconds = (time.perf_counter() - start) / len(prompts)
        return images

    evaluation = evaluate(timed, runner.reward, runner.judges, runner.eval_prompts, images_per_prompt, model.device)
    return {**rename_columns(evaluation.scores), "seconds": seconds}


def best_of_n(runner: ExperimentRunner, seed: int) -> list[Row]:
    """Evaluate the candidate of highest reward, for each number of candidates."""
    model = unchecked(runner)
    candidates: list[Tensor] = []
    rewards: list[Tensor] = []

    def best(count: int, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        while len(candidates) < count:
            shifted = [own + SEED_STRIDE * len(candidates) for own in seeds]
            candidates.append(runner.sampler(model)(prompts, shifted))
            rewards.append(score_batches(runner.reward, candidates[-1], prompts, model.device)[0])
        return torch.stack(candidates)[torch.stack(rewards).argmax(0), torch.arange(len(prompts))]

    rows: list[Row] = []
    for count in candidate_counts(runner.budget):
        row = timed_scores(runner, model, seed, partial(best, count))
        # The candidates of the smaller counts are reused.
        spent = rows[-1]["seconds"] if rows else 0.0
        rows.append(row | {"count": count, "seconds": spent + row["seconds"]})
    return rows


def guided(runner: ExperimentRunner, method: str, seed: int) -> list[Row]:
    """Evaluate a guidance method, with its mean reward by round, and then the LoRA that it trained, if any."""
    model = unchecked(runner)
    rounds: list[float] = []

    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        steps = runner.budget.num_inference_steps
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE, "batch_size": 4}
        samples = sample_guided(model, runner.reward, prompts, method, seeds=seeds, **options)
        rounds.extend(samples.rewards.mean(1).tolist())
        return samples.images

    rows = [timed_scores(runner, model, seed, sample)]
    rows[0]["round_rewards"] = " ".join(f"{value:.5g}" for value in rounds)
    if load_guide(method).finetune_from_round:
        rows.append(timed_scores(runner, model, seed, runner.sampler(model)))
    return rows


def measure(runner: ExperimentRunner) -> list[Row]:
    """Return a row for each variant and seed; `calls` and `scored` are denoiser calls and scored images per image."""
    steps, rows = runner.budget.num_inference_steps, []
    plain = {"calls": steps, "scored": 0}
    for spec in runs(runner.budget):
        seed = spec.seed
        for row in runner.cached(f"guidance-best-{seed}", partial(best_of_n, runner, seed)):
            count = row.pop("count")
            name = {"variant": f"best of {count}", "family": "best of N", "seed": seed}
            rows.append({**name, "calls": steps * count, "scored": count, **row})
            if count == 1:
                # Images of a LoRA take as long as those of the base model.
                plain["seconds"] = row["seconds"]
        for method, family in guided_variants(runner.budget).items():
            scores = runner.cached(f"guidance-{method}-{seed}", partial(guided, runner, method, seed))
            scored = steps + 1 if method.startswith("pgdiff_dynamic") else 2 * load_guide(method).num_samplings - 1
            cost = {"calls": calls(method, steps), "scored": scored}
            rows.append({"variant": method, "family": family, "seed": seed, **cost, **scores[0]})
            for row in scores[1:]:
                label = "LoRA of look-ahead, no guidance"
                rows.append({"variant": label, "family": label, "seed": seed, "calls": steps, "scored": 0, **row})
        name = {"variant": f"LoRA of {DRAFT_1}", "family": f"LoRA of {DRAFT_1}", "seed": seed}
        rows.append({**name, **plain, **rename_columns(runner.run(spec).final)})
    return rows


def restore(runner: ExperimentRunner) -> Image.Image:
    """Inpaint and colorize images, and write the mean squared errors to `guidance-restoration.json`.

    The baselines are the known half's mean color, the grayscale image, and images sampled without guidance.

    Returns:
        A grid: known half, inpainted, grayscale, colorized, whole.
    """
    model, prompts = unchecked(runner), list(RESTORED[: runner.budget.eval_prompts])
    folder, steps = runner.folder / "guidance-images", runner.budget.num_inference_steps
    schedule, options = model.schedule(steps), {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
    whole = model.sample_tensors(prompts, range(11, 11 + len(prompts)), schedule, GUIDANCE_SCALE)
    base = model.sample_tensors(prompts, [0] * len(prompts), schedule, GUIDANCE_SCALE)
    hidden = torch.zeros_like(whole[:1])
    hidden[..., hidden.shape[-1] // 2 :] = 1
    mask = folder / "mask.png"
    save_image(to_pil(hidden)[0], mask)
    restored: dict[str, list[Tensor]] = {"inpainted": [], "colorized": []}
    for i, prompt in enumerate(prompts):
        path = folder / f"whole-{i}.png"
        save_image(to_pil(whole[i : i + 1])[0], path)
        rewards = {"inpainted": ImageMatch(str(path), mask=str(mask)), "colorized": ImageMatch(str(path), "grey")}
        for name, reward in rewards.items():
            samples = sample_guided(model, reward, prompt, "pgdiff_dynamic(strength=0.3)", seeds=[0], **options)
            restored[name].append(samples.images)
    half = hidden.bool().expand_as(whole)
    mean = (whole * (1 - hidden)).mean((2, 3), keepdim=True) / (1 - hidden).mean()
    gray = whole.mean(1, keepdim=True).expand_as(whole)
    images = {name: torch.cat(samples) for name, samples in restored.items()}
    errors = {}
    baselines = {"inpainted": (mean.expand_as(whole), half), "colorized": (gray, torch.ones_like(half))}
    for name, (baseline, region) in baselines.items():
        for label, other in (("guided", images[name]), ("baseline", baseline), ("unguided", base)):
            errors[f"{name} {label}"] = float((other - whole)[region].square().mean())
    runner.cached("guidance-restoration", lambda: errors)
    known = whole * (1 - hidden) + 0.5 * hidden
    rows = {"known half": known, "inpainted": images["inpainted"], "grayscale": gray}
    rows |= {"colorized": images["colorized"], "whole": whole}
    return grid(list(rows.values()), list(rows), prompts)


COLUMNS = ("calls", "scored", "seconds", "reward", "p_3d", "name_accuracy", "diversity")
PER_IMAGE = {"calls": "denoiser calls per image", "seconds": "seconds per image"}
EXPERIMENT = Experiment(
    title="Guidance",
    question="What does a reward bring that guides sampling, without training?",
    runs=runs,
    measure=measure,
    table=partial(aggregate, by="variant", columns=COLUMNS),
    panels=[
        *(Panel(x, "reward", by="family", kind="scatter", log=True, xlabel=label) for x, label in PER_IMAGE.items()),
        *(Panel("reward", y, by="family", kind="scatter") for y in ("p_3d", "diversity")),
    ],
    images=restore,
)
