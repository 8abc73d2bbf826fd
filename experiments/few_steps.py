"""A discriminator of real images as the reward, for sampling in few steps: SFT-PG against DRaFT-1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from draftune.evaluation.kid import kid
from draftune.models import DiffusionModel
from draftune.prompts import load_prompts
from draftune.rewards import load_reward
from draftune.sampling.ancestral import ancestral_rollout
from draftune.utils.images import grid, open_image
from experiments.budget import Budget
from experiments.examples import EXAMPLES, example_files, example_images
from experiments.report import Experiment, Panel, aggregate
from experiments.runner import DRAFT_1, GUIDANCE_SCALE, ExperimentRunner, Row, RunSpec

BASE_STEPS = (1, 2, 3, 5, 20, 50)
IMAGES_PER_NAME = 3
"""As many as there are real images of a name: one in each style."""
EVAL_BATCH, BATCH_SIZE = 32, 8
DISCRIMINATOR = f"discriminator(folder='{EXAMPLES}', width=32, learning_rate=0.001)"
LEARNING_RATE = 3e-4
"""With 0.001, the embedded model's default, each variant with 3 steps ended farther away than it began."""
SFT_PG, DRAFT, DRAFT_ONE = "SFT-PG", "DRaFT-1", "DRaFT-1, 1 discriminator step"
METHODS = {SFT_PG: "sft_pg(generator_steps=4, value_learning_rate=0.001)", DRAFT: DRAFT_1, DRAFT_ONE: DRAFT_1}
SAMPLERS = ("deterministic", "ancestral")


def variants(budget: Budget) -> list[tuple[str, int]]:
    """Return names and sampling steps. `DRAFT_ONE` is compared at the fewest steps only."""
    few = budget.few_steps
    return [(name, steps) for steps in few for name in METHODS if name != DRAFT_ONE or steps == min(few)]


def spec(name: str, steps: int, seed: int, budget: Budget) -> RunSpec:
    """Return a run. All runs score the same number of images, and the discriminator trains on each batch of them."""
    batches = 1 if name == DRAFT_ONE else budget.few_batches
    settings: dict[str, Any] = {
        "learning_rate": LEARNING_RATE,
        "reward": DISCRIMINATOR,
        "num_inference_steps": steps,
        "batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": batches,
        "validation_steps": 0,
    }
    if name == SFT_PG:
        settings["max_grad_norm"] = 0.1  # the paper's value
    return RunSpec(METHODS[name], budget.few_updates * budget.few_batches // batches, seed, settings)


def runs(budget: Budget) -> list[RunSpec]:
    return [spec(name, steps, seed, budget) for seed in range(budget.seeds) for name, steps in variants(budget)]


@torch.no_grad()
def sample_images(model: DiffusionModel, names: Sequence[str], steps: int, sampler: str) -> Tensor:
    """Sample IMAGES_PER_NAME images of each name."""
    schedule, images = model.schedule(steps), []
    prompts = [name for name in names for _ in range(IMAGES_PER_NAME)]
    if sampler == "deterministic":
        seeds = list(range(IMAGES_PER_NAME)) * len(names)
        return model.sample_tensors(prompts, seeds, schedule, GUIDANCE_SCALE, batch_size=EVAL_BATCH)
    for start in range(0, len(prompts), EVAL_BATCH):
        batch, generator = prompts[start : start + EVAL_BATCH], torch.Generator().manual_seed(start)
        denoise, noise = model.denoiser_for(batch, schedule, GUIDANCE_SCALE, ""), model.noise(generator, len(batch))

        def randn_like(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator)  # noqa: B023

        *_, (*_, clean) = ancestral_rollout(denoise, schedule, noise, randn_like)
        images.append(model.decode(clean).cpu())
    return torch.cat(images)


class KIDEvaluator:
    """Measures KID (Binkowski et al., 2018, arXiv:1801.01401), times 1,000, to real images of evaluation names.

    The features are from two networks that no run trains against.
    """

    def __init__(self, runner: ExperimentRunner) -> None:
        assert runner.examples is not None
        self.names = load_prompts("emoji-common")[: runner.budget.few_names]
        classifier, clip = (load_reward(name) for name in ("emoji_style_probability", "emoji_clip"))
        self.networks: dict[str, Callable[[Tensor], Tensor]] = {
            "kid_classifier": classifier.features,  # type: ignore[dict-item]
            "kid_clip": clip.clip.embed_images,  # type: ignore[union-attr,dict-item]
        }
        self.real = self.features(example_images(runner.examples, self.names))

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return unit features times sqrt(D), whose KID kernel is (cosine + 1)^3."""
        batches = images.split(EVAL_BATCH)
        unit = {key: torch.cat([network(batch) for batch in batches]) for key, network in self.networks.items()}
        return {key: features * features.shape[1] ** 0.5 for key, features in unit.items()}

    def kid(self, model: DiffusionModel, steps: int, sampler: str) -> dict[str, float]:
        features = self.features(sample_images(model, self.names, steps, sampler))
        return {key: 1000 * kid(features[key], real) for key, real in self.real.items()}

    def noise(self) -> dict[str, float]:
        """Return the standard deviation of KID between random halves of the real images."""
        generator, total = torch.Generator().manual_seed(0), len(next(iter(self.real.values()))) // 2 * 2
        orders = [torch.randperm(total, generator=generator).chunk(2) for _ in range(20)]
        return {
            key: 1000 * float(np.std([kid(real[first], real[second]) for first, second in orders]))
            for key, real in self.real.items()
        }


def measure_base(runner: ExperimentRunner) -> list[Row]:
    evaluator, model, budget = KIDEvaluator(runner), runner.model(), runner.budget
    pairs = [(steps, "deterministic") for steps in BASE_STEPS if steps <= budget.kid_max_steps]
    pairs += [(steps, "ancestral") for steps in budget.few_steps]
    rows: list[Row] = [{"variant": "base", "steps": n, "sampler": s, **evaluator.kid(model, n, s)} for n, s in pairs]
    return [*rows, {"variant": "halves of the real images, standard deviation", **evaluator.noise()}]


def measure_run(runner: ExperimentRunner, name: str, steps: int, seed: int) -> list[Row]:
    evaluator, model = KIDEvaluator(runner), runner.model({"lora": runner.lora(spec(name, steps, seed, runner.budget))})
    row = {"variant": name, "steps": steps, "seed": seed}
    return [{**row, "sampler": sampler, **evaluator.kid(model, steps, sampler)} for sampler in SAMPLERS]


def measure(runner: ExperimentRunner) -> list[Row]:
    rows = list(runner.cached("few-steps-base", partial(measure_base, runner)))
    for name, steps in variants(runner.budget):
        for seed in range(runner.budget.seeds):
            measured = partial(measure_run, runner, name, steps, seed)
            rows += runner.cached(f"few-steps {name} {steps} steps {seed}", measured)
    columns = ("kid_classifier", "kid_clip")
    rows = [{"steps": None, "sampler": None, **row} for row in rows]
    return aggregate(rows, "variant steps sampler", columns, ci=" ".join(columns))


def sample_grid(runner: ExperimentRunner, count: int = 8) -> Image.Image:
    """Return images of the base model, of each variant and of many steps, above real ones."""
    assert runner.examples is not None
    names, budget = load_prompts("emoji-common")[: runner.budget.few_names], runner.budget
    real = {file.stem: file for file in example_files(runner.examples, names)}
    names = [name for name in names if name in real]
    names = (names[:: max(1, len(names) // count)] * count)[:count]
    rows = {}
    for steps in (*budget.few_steps, budget.num_inference_steps):
        models = {"base": runner.model()}
        for name in (name for name, own in variants(budget) if own == steps):
            models[name] = runner.model({"lora": runner.lora(spec(name, steps, 0, budget))})
        for name, model in models.items():
            images = model.sample_tensors(names, [0] * count, model.schedule(steps), GUIDANCE_SCALE, batch_size=count)
            rows[f"{name}, {steps} steps"] = images
    rows["real"] = torch.cat([open_image(real[name]) for name in names])
    return grid(list(rows.values()), list(rows), names)


EXPERIMENT = Experiment(
    title="Few steps",
    question="Does a discriminator of real images improve samples of few steps, and does it need a policy gradient?",
    runs=runs,
    measure=measure,
    table=lambda rows: rows,
    panels=[
        Panel(
            "steps",
            y,
            by="variant",
            where={"sampler": "deterministic"},
            log=True,
            xlabel="sampling steps",
            ylabel=label,
        )
        for y, label in (("kid_classifier", "KID x 1,000, classifier"), ("kid_clip", "KID x 1,000, CLIP"))
    ],
    images=sample_grid,
    needs_examples=True,
)
