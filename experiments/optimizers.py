"""Optimizers on the same number of scored images, each with the learning rate that a search found best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from draftune.experimental.optimizers import MEKA
from draftune.lora import add_lora, lora_parameters
from draftune.models import DiffusionModel
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Schedule
from draftune.training.data import PromptSampler
from experiments.budget import Budget
from experiments.report import Experiment, Panel, aggregate
from experiments.runner import DRAFT_1, GUIDANCE_SCALE, ExperimentRunner, Row, RunSpec, rename_columns

FACTOR = 3.0
"""Ratio of neighboring learning rates in a search."""
MAX_EXTENSIONS = 3
"""How often a search adds a learning rate when the best one is its lowest or highest."""
MIN_NAME_ACCURACY = 0.9
PENALTY = 100.0
"""Subtracted from the score of a run with a lower name accuracy; larger than any reward."""
OWN_RATE = 0.0
"""Learning rate that stands for AdaMEKA's own step sizes."""
BATCH_SIZE = 4
WINDOW = 10
"""Gradients over which the training reward is averaged."""


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer and the learning rates of its search, the expected best in the middle."""

    name: str
    rates: tuple[float, ...]
    optimizer: str = ""
    """The setting `optimizer`; "" for AdaMEKA, which `train` does not offer."""
    gradients: int = 1
    """Gradients of one batch in one update."""

    def run_spec(self, rate: float, seed: int, budget: Budget) -> RunSpec:
        """Return a run; all runs score the same number of images."""
        settings: dict[str, Any] = {"optimizer": self.optimizer, "learning_rate": rate, "validation_steps": 0}
        if self.gradients > 1:
            # Clipping would hide the change between the two gradients.
            settings["max_grad_norm"] = 0.0
        return RunSpec(DRAFT_1, max(1, budget.steps // self.gradients), seed, settings)


OPTIMIZERS = (
    OptimizerSpec("AdamW", (3e-4, 1e-3, 3e-3), "adamw"),
    OptimizerSpec("SGD, momentum 0.9", (0.03, 0.1, 0.3), "sgd(momentum=0.9)"),
    OptimizerSpec("Step-Tuned SGD", (0.3, 1.0, 3.0), "step_tuned_sgd", 2),
    OptimizerSpec("EXTRAP + AdamW", (3e-4, 1e-3, 3e-3), "extrapolate(adamw, rate=0.1)"),
    OptimizerSpec("AdaMEKA", (1e-3, 3e-3)),
)


def runs(budget: Budget) -> list[RunSpec]:
    """Return the first runs of each search; later ones depend on their results."""
    trained = [spec for spec in OPTIMIZERS if spec.optimizer]
    return [spec.run_spec(rate, 0, budget) for spec in trained for rate in spec.rates[-budget.rates :]]


def measure_run(runner: ExperimentRunner, spec: OptimizerSpec, rate: float, seed: int) -> Row:
    """Train once and return the final scores and the running mean of the training reward halfway."""
    if spec.optimizer:
        result = runner.run(spec.run_spec(rate, seed, runner.budget))
        training, final = [row["reward"] for row in result.metrics], rename_columns(result.final)
    else:
        training, final = runner.cached(f"adameka rate={rate} seed={seed}", partial(train_adameka, runner, rate, seed))
    # Step-Tuned SGD logs one reward for two gradients.
    width = max(1, WINDOW // spec.gradients)
    means = [mean(training[max(0, i + 1 - width) : i + 1]) for i in range(len(training))]
    curve = {"training": " ".join(f"{value:.5g}" for value in means), "updates": len(training)}
    queries = BATCH_SIZE * spec.gradients * len(training)
    return {**curve, "reward_queries": queries, "halfway_reward": means[(len(means) - 1) // 2], **final}


def train_adameka(runner: ExperimentRunner, rate: float, seed: int) -> tuple[list[float], dict[str, float]]:
    """Train DRaFT-1 with AdaMEKA, which needs the loss of each sample; return training rewards and final scores.

    A sample's second derivatives come from the same graph and need no further scored image.
    """
    model, generator = runner.model(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        add_lora(model, 8)
    model.set_checkpointing("none")  # checkpointing has no second derivative
    optimizer = MEKA(lora_parameters(model).values(), lr=None if rate == OWN_RATE else rate, adaptive=True)
    prompts, schedule = runner.prompts, model.schedule(runner.budget.num_inference_steps)
    order, training = PromptSampler(len(prompts), generator), []
    for _ in range(runner.budget.steps):
        batch = [prompts[i] for i in order.next(BATCH_SIZE)]
        noise = model.noise(generator, BATCH_SIZE)
        with torch.no_grad():
            latents = rollout(model.denoiser_for(batch, schedule, GUIDANCE_SCALE), schedule.steps[:-1], noise)
        with sdpa_kernel(SDPBackend.MATH):
            losses = partial(sample_losses, runner, model, schedule, batch, latents)
            training.append(-float(optimizer.step(losses)))
    return training, rename_columns(runner.evaluate(model))


def sample_losses(
    runner: ExperimentRunner, model: DiffusionModel, schedule: Schedule, prompts: Sequence[str], latents: Tensor
) -> Tensor:
    """Return DRaFT-1's loss of each sample [B], each from its own graph with second derivatives."""
    losses = []
    for prompt, latent in zip(prompts, latents.split(1), strict=True):
        clean = rollout(model.denoiser_for([prompt], schedule, GUIDANCE_SCALE), schedule.steps[-1:], latent)
        losses.append(-runner.reward.score(model.decode(clean), [prompt]))
    return torch.cat(losses)


def score(run: Row) -> float:
    """Return the reward, or less than any reward if the name accuracy is too low: high rewards can ruin images."""
    named = run["name_accuracy"]
    return float(run["reward"]) if named >= MIN_NAME_ACCURACY else named - PENALTY


def search(rates: Sequence[float], run: Callable[[float], Row]) -> dict[float, Row]:
    """Run several learning rates, further ones while the best is the lowest or highest, then one above the best."""
    results = {rate: run(rate) for rate in rates}

    def best() -> float:
        return max(results, key=lambda rate: score(results[rate]))

    def try_rate(rate: float) -> None:
        rate = float(f"{rate:.2g}")
        results[rate] = run(rate)

    for _ in range(MAX_EXTENSIONS if len(rates) > 1 else 0):
        known, rate = sorted(results.keys() - {OWN_RATE}), best()
        if rate in (OWN_RATE, *known[1:-1]):
            break
        try_rate(rate * FACTOR if rate == known[-1] else rate / FACTOR)
    if len(rates) > 1 and (rate := best()) != OWN_RATE:
        # Most runs above the best rate ruin the images; the limit is searched more finely.
        try_rate(rate * FACTOR**0.5)
    return results


def measure(runner: ExperimentRunner) -> list[Row]:
    rows, budget = [], runner.budget
    for spec in OPTIMIZERS:
        rates = spec.rates[-budget.rates :] if spec.optimizer else (OWN_RATE, *spec.rates)[: budget.rates]
        tried = search(rates, lambda rate, spec=spec: measure_run(runner, spec, rate, 0))  # type: ignore[misc]
        best = max(tried, key=lambda rate: score(tried[rate]))
        results = {(rate, 0): row for rate, row in tried.items()}
        results |= {(best, seed): measure_run(runner, spec, best, seed) for seed in range(budget.seeds)}
        for (rate, seed), row in sorted(results.items()):
            name = {"optimizer": spec.name, "learning_rate": rate or "its own", "seed": seed}
            rows.append({**name, "best": int(rate == best), **row})
    return rows


def table(rows: list[Row]) -> list[Row]:
    """Return the means of each optimizer at its best learning rate."""
    columns = ("updates", "reward_queries", "reward", "p_3d", "name_accuracy", "diversity", "halfway_reward")
    best = [row for row in rows if row["best"]]
    return aggregate(best, "optimizer learning_rate", columns, ci="reward halfway_reward")


EXPERIMENT = Experiment(
    title="Optimizers",
    question="Does another optimizer get more reward from the same number of images?",
    runs=runs,
    measure=measure,
    table=table,
    panels=[
        Panel("learning_rate", "reward", by="optimizer", where={"seed": 0}, log=True, xlabel="learning rate, seed 0"),
        Panel("reward", "name_accuracy", by="optimizer", where={"seed": 0}),
    ],
)
