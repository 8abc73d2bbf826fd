"""A discriminator of real images as the reward, for sampling in few steps: SFT-PG against DRaFT-1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from draftune.evaluation.kid import kid
from draftune.models import DiffusionModel
from draftune.rewards import load_reward
from draftune.sampling.ancestral import ancestral_rollout
from experiments.budget import Budget
from experiments.examples import EXAMPLES, example_images
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim
from experiments.runner import DRAFT_1, EVAL_BATCH, GUIDANCE_SCALE, ExperimentRunner, Row, RunSpec
from experiments.statistics import Effect, mean_effect, paired_effect

STEPS = (3, 5)
BASE_STEPS = (1, 2, *STEPS, 20)
IMAGES_PER_NAME = 3
"""As many as there are real images of a name: one in each style."""
BATCHES = 5
DISCRIMINATOR = f"discriminator(folder={EXAMPLES}, width=32, learning_rate=0.001)"
LEARNING_RATE = 3e-4
"""With 0.001, the embedded model's default, each variant with 3 steps ended farther away than it began."""
BASE, SFT_PG, DRAFT = "base", "SFT-PG", "DRaFT-1"
METHODS = {SFT_PG: "sft_pg(generator_steps=4, value_learning_rate=0.001)", DRAFT: DRAFT_1}
SAMPLERS = {SFT_PG: "ancestral", DRAFT: "deterministic"}
"""The sampler that a method trains with, and is evaluated with."""
KIDS = ("kid_classifier", "kid_clip")


def variants() -> list[tuple[str, int]]:
    return [(name, steps) for steps in STEPS for name in METHODS]


def spec(name: str, steps: int, seed: int, budget: Budget) -> RunSpec:
    """Return a run. All runs score the same number of images, and the discriminator trains on each batch of them."""

    settings: dict[str, Any] = {"learning_rate": LEARNING_RATE, "reward": DISCRIMINATOR, "num_inference_steps": steps}
    settings |= {"batch_size": 8, "gradient_accumulation_steps": BATCHES}
    if name == SFT_PG:
        settings["max_grad_norm"] = 0.1  # the paper's value
    label = f"few-steps {name} {steps} steps seed={seed}"
    return RunSpec(METHODS[name], (budget.few_updates,), seed, settings, label)


def jobs(budget: Budget) -> list[Job]:
    images, made = IMAGES_PER_NAME * budget.eval_prompts, list[Job]()
    for seed in range(budget.few_seeds):
        made.append(Job(f"few steps base seed={seed}", partial(measure_base, seed), images=2 * images))
        for name, steps in variants():
            own = spec(name, steps, seed, budget)
            cost = lambda runner, own=own: 6 * own.steps * runner.cost(DRAFT_1)["seconds"]  # noqa: E731
            measured = partial(measure_run, name, steps, seed)
            made.append(Job(f"few steps {name} {steps} seed={seed}", measured, (), images, cost))
    return made


@torch.no_grad()
def sample_images(model: DiffusionModel, names: Sequence[str], steps: int, sampler: str, seed: int) -> Tensor:
    """Sample IMAGES_PER_NAME images of each name."""
    schedule, images = model.schedule(steps), []
    prompts = [name for name in names for _ in range(IMAGES_PER_NAME)]
    if sampler == "deterministic":
        seeds = [IMAGES_PER_NAME * seed + own for own in range(IMAGES_PER_NAME)] * len(names)
        return model.sample_tensors(prompts, seeds, schedule, GUIDANCE_SCALE, batch_size=EVAL_BATCH)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(prompts), EVAL_BATCH):
        batch = prompts[start : start + EVAL_BATCH]
        denoise, noise = model.denoiser_for(batch, schedule, GUIDANCE_SCALE, ""), model.noise(generator, len(batch))
        randn_like = lambda like: torch.randn(like.shape, generator=generator)  # noqa: E731
        *_, (*_, clean) = ancestral_rollout(denoise, schedule, noise, randn_like)
        images.append(model.decode(clean).cpu())
    return torch.cat(images)


def distances(runner: ExperimentRunner, model: DiffusionModel, steps: int, sampler: str, seed: int) -> dict[str, float]:
    """Return KID (Binkowski et al., 2018, arXiv:1801.01401), times 1,000, to real images of evaluation names.

    The features are from two networks that no run trains against.
    """
    assert runner.examples is not None
    names = runner.eval_prompts
    classifier, clip = (load_reward(name) for name in ("emoji_style_probability", "emoji_clip"))
    embeddings = (classifier.features, clip.clip.embed_images)  # type: ignore[union-attr]
    networks: dict[str, Callable[[Tensor], Tensor]] = dict(zip(KIDS, embeddings, strict=True))  # type: ignore[arg-type]
    sets = [sample_images(model, names, steps, sampler, seed), example_images(runner.examples, names)]
    result = {}
    for key, network in networks.items():
        with torch.no_grad():
            unit = [torch.cat([network(part) for part in images.split(EVAL_BATCH)]) for images in sets]
        # Unit features times sqrt(D) make KID's kernel (cosine + 1)^3.
        result[key] = 1000 * kid(*(features * features.shape[1] ** 0.5 for features in unit))
    return result


def measure_base(seed: int, runner: ExperimentRunner) -> list[Row]:
    pairs = [*product(BASE_STEPS, ["deterministic"]), *product(STEPS, ["ancestral"])]
    return [
        {"variant": BASE, "steps": n, "sampler": s, "seed": seed} | distances(runner, runner.model(), n, s, seed)
        for n, s in pairs
    ]


def measure_run(name: str, steps: int, seed: int, runner: ExperimentRunner) -> list[Row]:
    model = runner.model({"lora": runner.lora(spec(name, steps, seed, runner.budget))})
    row = {"variant": name, "steps": steps, "sampler": SAMPLERS[name], "seed": seed}
    return [row | distances(runner, model, steps, SAMPLERS[name], seed)]


def change(rows: list[Row], name: str, steps: int, column: str) -> Effect:
    """Return the change of a distance by training, with the sampler of the method."""
    own, base = (
        by_seed(rows, column, variant=v, steps=steps, sampler=SAMPLERS[name]) for v in (name, BASE)
    )  # fmt: skip
    return paired_effect(own, base)


def claims(rows: list[Row]) -> list[Claim]:
    found = []
    for name, steps in variants():
        text = f"{name} brings samples of {steps} steps closer to real images (KID x 1,000)"
        found.append(claim(text, change(rows, name, steps, KIDS[0]), 5.0, -1))
    return found


def answer(rows: list[Row]) -> list[str]:
    parts = []
    for steps in BASE_STEPS:
        means = (mean_effect(by_seed(rows, k, variant=BASE, steps=steps, sampler="deterministic")) for k in KIDS)
        parts.append(f"{steps}: {' and '.join(f'{mean.value:.3g}' for mean in means)}")
    other = [f"{name}, {steps} steps: {change(rows, name, steps, KIDS[1]).text()}" for name, steps in variants()]
    return [
        f"KID x 1,000 of the base model by steps, classifier and CLIP features: {'; '.join(parts)}.",
        f"By CLIP features training changes it by: {'; '.join(other)}.",
        "Each method is evaluated with the sampler of its training. Seeds share the real images, of names that the "
        "discriminator does not know.",
    ]


EXPERIMENT = Experiment(
    title="Few steps",
    question="Does a discriminator of real images improve samples of few steps, and does it need a policy gradient?",
    setting="The reward is a discriminator that trains along, five batches for an update. KID "
    "compares 3 images of each of 64 names with real ones, by the judge's and by CLIP's features.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[
        Panel("steps", y, "variant", kind="points", log=True, xlabel="sampling steps", ylabel=f"KID x 1,000, {label}")
        for y, label in zip(KIDS, ("classifier", "CLIP"), strict=True)
    ],
    needs_examples=True,
)
