"""Reward guidance during sampling, against the best of N seeds and a LoRA of DRaFT-1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from draftune.evaluation.metrics import evaluate, score_batches
from draftune.experimental.denoising_loss import LEVELS
from draftune.guidance.methods import load_guide
from draftune.guidance.sample import sample_guided
from draftune.rewards.pixel import ImageMatch
from draftune.utils.images import grid, save_image, to_pil
from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim
from experiments.runner import DRAFT_1, GUIDANCE_SCALE, ExperimentRunner, Row, RunSpec, short_scores
from experiments.statistics import mean_effect, paired_effect

LOOK_AHEAD, TRAINED, TRAINED_LORA, LORA = "look-ahead", "look-ahead, trained", "its LoRA alone", "LoRA of DRaFT-1"
GUIDES = {f"ratio {strength}": f"pgdiff_dynamic(strength={strength})" for strength in (0.05, 0.1, 0.2, 0.5)} | {
    LOOK_AHEAD: "gradient_guidance(target_increase=2, rounds=4)",
    TRAINED: "gradient_guidance(target_increase=2, rounds=4, finetune_from_round=1, learning_rate=0.001)",
}
"""The guidance method of each variant."""
SEED_STRIDE = 1000
"""Difference between the seeds of two candidates for one image."""
RESTORED = ("cat face", "strawberry", "rocket", "pizza")
"""Prompts of the images that are inpainted and colorized."""
BATCH = 4
Sampler = Callable[[Sequence[str], Sequence[int]], Tensor]


def calls(method: str, steps: int) -> int:
    """Return the denoiser calls for one guided image. A call with a backward pass counts as two.

    A backward pass through frozen weights costs as much as a forward pass.
    """
    guide = load_guide(method)
    training = 2 * LEVELS * (guide.num_samplings - guide.finetune_from_round) if guide.finetune_from_round else 0
    return steps * (1 + 2 * (guide.num_samplings - 1)) + training


def best_of(steps: int) -> int:
    """Return the number of candidates that costs as many calls as the look-ahead."""
    return calls(GUIDES[LOOK_AHEAD], steps) // steps


def jobs(budget: Budget) -> list[Job]:
    steps, made = budget.num_inference_steps, []
    images = budget.grid_images * budget.eval_prompts
    for seed in range(budget.few_seeds):
        made.append(Job(f"guidance best of N seed={seed}", partial(best_of_n, seed), images=images * best_of(steps)))
        for name, method in GUIDES.items():
            count = images * calls(method, steps) // steps
            made.append(Job(f"guidance {name} seed={seed}", partial(guided, name, seed), images=count))
        spec = RunSpec(DRAFT_1, budget.short, seed)
        made.append(Job(f"guidance LoRA seed={seed}", partial(lora, spec), [spec], images))
    return made


def scored(runner: ExperimentRunner, seed: int, sample: Sampler) -> Row:
    """Evaluate a sampler with the images' seeds shifted by `seed`."""
    count = runner.budget.grid_images
    shifted = lambda prompts, seeds: sample(prompts, [seed * count + own for own in seeds])  # noqa: E731
    evaluation = evaluate(shifted, runner.reward, runner.judges, runner.eval_prompts, count, runner.model().device)
    return {"seed": seed, **short_scores(evaluation, runner.reward)}


def best_of_n(seed: int, runner: ExperimentRunner) -> list[Row]:
    """Evaluate the candidate of highest reward, of one and of as many as cost as much as the look-ahead."""
    sampler, steps = runner.sampler(runner.model()), runner.budget.num_inference_steps
    candidates: list[Tensor] = []
    rewards: list[Tensor] = []

    def best(count: int, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        while len(candidates) < count:
            candidates.append(sampler(prompts, [own + SEED_STRIDE * len(candidates) for own in seeds]))
            rewards.append(score_batches(runner.reward, candidates[-1], prompts, candidates[-1].device)[0])
        return torch.stack(candidates)[torch.stack(rewards).argmax(0), torch.arange(len(prompts))]

    return [
        {"variant": f"best of {count}", "calls": steps * count, **scored(runner, seed, partial(best, count))}
        for count in (1, best_of(steps))
    ]


def guided(name: str, seed: int, runner: ExperimentRunner) -> list[Row]:
    """Evaluate a guidance method, and then the LoRA that it trained, if any."""
    model, steps, method = runner.model(), runner.budget.num_inference_steps, GUIDES[name]
    model.set_checkpointing("none")
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE, "batch_size": BATCH}

    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample_guided(model, runner.reward, prompts, method, seeds=seeds, **options).images

    rows = [{"variant": name, "calls": calls(method, steps), **scored(runner, seed, sample)}]
    if load_guide(method).finetune_from_round:
        plain = scored(runner, seed, runner.sampler(model))
        rows.append({"variant": TRAINED_LORA, "calls": steps, **plain})
    return rows


def lora(spec: RunSpec, runner: ExperimentRunner) -> list[Row]:
    sampler = runner.sampler(runner.model({"lora": runner.lora(spec)}))
    return [{"variant": LORA, "calls": runner.budget.num_inference_steps, **scored(runner, spec.seed, sampler)}]


def restore(runner: ExperimentRunner) -> Image.Image:
    """Inpaint and colorize images of the base model, for a grid: known half, inpainted, grayscale, colorized, whole."""
    model, prompts, steps = runner.model(), list(RESTORED), runner.budget.num_inference_steps
    folder = runner.folder / "guidance-images"
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
    whole = runner.sampler(model)(prompts, range(11, 11 + len(prompts)))
    hidden = torch.zeros_like(whole[:1])
    hidden[..., hidden.shape[-1] // 2 :] = 1
    save_image(to_pil(hidden)[0], folder / "mask.png")
    rows: dict[str, list[Tensor]] = {"inpainted": [], "colorized": []}
    for i, prompt in enumerate(prompts):
        path = str(folder / f"whole-{i}.png")
        save_image(to_pil(whole[i : i + 1])[0], Path(path))
        rewards = {"inpainted": ImageMatch(path, mask=str(folder / "mask.png")), "colorized": ImageMatch(path, "gray")}
        for name, reward in rewards.items():
            samples = sample_guided(model, reward, prompt, "pgdiff_dynamic(strength=0.3)", seeds=[0], **options)
            rows[name].append(samples.images)
    grey = whole.mean(1, keepdim=True).expand_as(whole)
    shown = {"known half": whole * (1 - hidden) + 0.5 * hidden, "inpainted": torch.cat(rows["inpainted"])}
    shown |= {"grayscale": grey, "colorized": torch.cat(rows["colorized"]), "whole": whole}
    return grid(list(shown.values()), list(shown), prompts)


def claims(rows: list[Row]) -> list[Claim]:
    steps = min(row["calls"] for row in rows)
    best = max(row["variant"] for row in rows if row["variant"].startswith("best of ") and row["calls"] > steps)
    pairs = {
        f"look-ahead guidance beats the {best} at equal denoiser calls": (LOOK_AHEAD, best),
        "fine-tuning on its samples improves the look-ahead (Algorithm 2)": (TRAINED, LOOK_AHEAD),
    }
    return [
        claim(text, paired_effect(by_seed(rows, "reward", variant=a), by_seed(rows, "reward", variant=b)), 0.1)
        for text, (a, b) in pairs.items()
    ]


def answer(rows: list[Row]) -> list[str]:
    parts = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        reward, names, count = (
            mean_effect(by_seed(rows, column, variant=variant)).value for column in ("reward", "name_accuracy", "calls")
        )
        parts.append(f"{variant} {reward:.3g} ({names:.0%}; {count:.0f})")
    return [f"Reward, share of names and denoiser calls for an image: {', '.join(parts)}."]


EXPERIMENT = Experiment(
    title="Guidance",
    question="What does a reward bring that guides sampling, without training?",
    setting="64 images a seed. A call with a backward pass counts as two. `ratio` is `pgdiff_dynamic`, with "
    "the ancestral sampler; `look-ahead` is `gradient_guidance` of four rounds.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[
        Panel("calls", "reward", "variant", kind="points", log=True, xlabel="denoiser calls for an image"),
        Panel("reward", "name_accuracy", "variant", key="variant", kind="points"),
    ],
    image=restore,
)
