"""DRaFT-LV against DRaFT-1 where the noise of the last step matters: gradient variance, and updates to equal reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from draftune.lora import add_lora, lora_parameters
from experiments.budget import Budget
from experiments.experiment import Claim, Experiment, Job, Panel, by_seed, claim, curve_job, curves_by_seed
from experiments.runner import DRAFT_1, DRAFT_LV, REWARD, ExperimentRunner, Row, RunSpec, loaded
from experiments.statistics import Effect, factor_effect, mean_effect, paired_effect, queries_to_reach, ratio_effect
from experiments.taste import LOG_ODDS

REWARDS = {"aesthetic": REWARD, "CLIP": "emoji_clip", "classifier": LOG_ODDS}
GRIDS: dict[str, dict[str, Any]] = {
    # Stable Diffusion's scheduler: the last step starts at t = 1 and does not end at a clean latent.
    "leading": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    # The last step starts at a fifth of the noise levels.
    "5 steps": {"timestep_spacing": "trailing", "set_alpha_to_one": True, "num_inference_steps": 5},
}
BATCHES = (1, 2, 4)
COPIES = 2
"""n of DRaFT-LV, the paper's value."""
MARGIN = 0.1


def settings(grid: str, reward: str, batch: int) -> dict[str, Any]:
    changed = {} if REWARDS[reward] == REWARD else {"reward": REWARDS[reward]}
    return {**GRIDS[grid], **changed, "batch_size": batch}


def cases(batches: Sequence[int] = BATCHES) -> list[tuple[str, str, int]]:
    """Return grid, reward and batch of each comparison: all rewards at batch 1, one reward at the larger batches."""
    pairs = [(reward, batch) for batch in batches for reward in (REWARDS if batch == 1 else ("aesthetic",))]
    return [(grid, *pair) for grid, pair in product(GRIDS, pairs)]


def summarized() -> list[tuple[str, str, int]]:
    """Return the comparisons of the summary table."""
    return [(grid, reward, 1) for grid in GRIDS for reward in REWARDS if reward == "aesthetic" or grid == "5 steps"]


def jobs(budget: Budget) -> list[Job]:
    made = []
    for seed, (grid, reward, batch) in product(range(budget.seeds), cases()):
        columns = {"grid": grid, "loss": reward, "batch": batch}
        for name, method in (("DRaFT-1", DRAFT_1), ("DRaFT-LV", DRAFT_LV)):
            label = f"lv {name} {grid} {reward} batch={batch} seed={seed}"
            spec = RunSpec(method, budget.pair, seed, settings(grid, reward, batch), label)
            made.append(curve_job("lv", spec, **columns, method=name))
    for seed, grid, reward in product(range(budget.seeds), GRIDS, REWARDS):
        gradients = budget.noises * (budget.noises + 1)
        name = f"lv variance {grid} {reward} seed={seed}"
        cost = lambda runner, n=gradients: n * runner.cost(DRAFT_1, 1)["seconds"]  # noqa: E731
        made.append(Job(name, partial(gradient_variance, grid, reward, seed), seconds=cost))
    return made


def gradient_variance(grid: str, reward: str, seed: int, runner: ExperimentRunner) -> list[Row]:
    """Measure where the variance of DRaFT-1's gradient comes from, for one prompt and a LoRA at its start.

    g(x_0, eps) is the gradient through the last step from x_1 = alpha_1 x_0 + sigma_1 eps. The traces of covariance
    are V_eps, over re-noisings at a fixed x_0, and V_0, of the mean gradient over initial noises. DRaFT-1 has the
    variance V_0 + V_eps, and the mean of 1 + n terms V_0 + V_eps / (1 + n).
    """
    model, scorer = runner.model(), loaded(REWARDS[reward])
    options = dict(GRIDS[grid])
    steps = options.pop("num_inference_steps", 0)
    model.set_sampler_options(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(model, 8)
    model.set_checkpointing("none")
    parameters, count = list(lora_parameters(model).values()), runner.budget.noises
    prompt, gradients = runner.prompts[seed % len(runner.prompts)], []
    for noise in range(count):
        batch = runner.batch(model, [prompt], 1000 * seed + noise, scorer, steps)
        last, prefix = batch.schedule.steps[-1], batch.no_grad_latents(len(batch.schedule) - 1)
        with torch.no_grad():
            clean = batch.denoise(prefix, last).clean
        for _ in range(count):
            x = last.alpha * clean + last.sigma * batch.randn_like(clean)
            loss = batch.reward(batch.denoise(x, last).clean).sum()
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in gradient if g is not None]).double())
    by_image = torch.stack(gradients).unflatten(0, (count, count))
    within = float(by_image.var(1).sum(-1).mean())
    # The variance of a mean over re-noisings contains a share of the variance over re-noisings.
    between = max(0.0, float(by_image.mean(1).var(0).sum()) - within / count)
    row = {"grid": grid, "loss": reward, "seed": seed, "within": within, "between": between}
    share = within / (within + between) if within + between else 0.0
    return [row | {"share": share, "variance_ratio": 1 - share + share / (1 + COPIES)}]


def factor(rows: list[Row], grid: str, reward: str, batch: int) -> Effect:
    """Return the updates of DRaFT-1 divided by those of DRaFT-LV, for DRaFT-1's last reward or the lower last one."""
    curves = [
        curves_by_seed(rows, grid=grid, loss=reward, batch=batch, method=name) for name in ("DRaFT-1", "DRaFT-LV")
    ]
    one, other = list[float](), list[float]()
    for pair in zip(*curves, strict=True):
        target = min(curve[-1]["reward"] for curve in pair)
        for updates, curve in zip((one, other), pair, strict=True):
            points = [row["update"] for row in curve], [row["reward"] for row in curve]
            # A reward that the base model has already says nothing.
            updates.append(queries_to_reach(*points, target, logarithm=False)[0] or math.nan)
    return factor_effect(one, other, [False] * len(one))


def variance(rows: list[Row], grid: str, reward: str) -> Effect:
    """Return the variance of DRaFT-LV's gradient divided by that of DRaFT-1's."""
    ratios = by_seed(rows, "variance_ratio", grid=grid, loss=reward, update=None)
    return ratio_effect(ratios, [1.0] * len(ratios))


def claims(rows: list[Row]) -> list[Claim]:
    found = []
    for grid in GRIDS:
        text = f"DRaFT-LV has a lower gradient variance than DRaFT-1, {grid} grid, aesthetic"
        found.append(claim(text, variance(rows, grid, "aesthetic"), 1 + MARGIN, -1, "{:.3g}×"))
    for grid, reward, batch in summarized():
        text = f"DRaFT-LV needs fewer updates than DRaFT-1, {grid} grid, {reward}, batch {batch}"
        found.append(claim(text, factor(rows, grid, reward, batch), 1 + MARGIN, form="{:.3g}×"))
    return found


def answer(rows: list[Row]) -> list[str]:
    shares, ratios = [], []
    for grid, reward in product(GRIDS, REWARDS):
        share = mean_effect(by_seed(rows, "share", grid=grid, loss=reward, update=None))
        ratio = variance(rows, grid, reward)
        shares.append(f"{grid}, {reward} {share.full('{:.1%}')}")
        ratios.append(f"{ratio.value:.3g} and {1 - share.value:.3g}")

    words = [
        f"{grid}, {reward}, batch {batch} {factor(rows, grid, reward, batch).full('{:.2f}')}"
        for grid, reward, batch in cases()
        if (grid, reward, batch) not in summarized()
    ]
    finals = {
        name: by_seed(rows, "reward", grid=grid, loss="aesthetic", batch=BATCHES[-1], method="DRaFT-1", update=update)
        for grid in GRIDS
        for name, update in ((grid, max(row["update"] or 0 for row in rows)), (f"{grid} base", 0))
    }
    gains = {g: [b - a for a, b in zip(finals[f"{g} base"], finals[g], strict=True)] for g in GRIDS}
    spacing = paired_effect(gains["trailing"], gains["leading"])
    return [
        f"Share of the variance of DRaFT-1's gradient that comes from the noise of the last step: {'; '.join(shares)}.",
        f"The variance with n = {COPIES} and for any larger n, in the same order: {', '.join(ratios)} times DRaFT-1's.",
        f"Updates of DRaFT-1 divided by those of DRaFT-LV: {'; '.join(words)}.",
        f"DRaFT-1 gains {spacing.full()} more reward on the trailing than on the leading grid.",
        "The paper's setting differs: Stable Diffusion 1.4, 512 pixels, 50 steps, 10,000 updates. Where the share "
        "above is small, no n can lower the variance much. These runs are too short for what matters late.",
    ]


EXPERIMENT = Experiment(
    title="DRaFT-LV",
    question="Where do the re-noised copies of DRaFT-LV help?",
    setting="n = 2. The leading grid is that of Stable Diffusion's scheduler, whose last step does not end at a clean "
    "latent; `5 steps` are on the trailing grid, with more noise in the last one. The classifier's reward is the "
    "log-odds of the judge, so `p_3d` is no judge there. Variances are traces of the covariance of the gradient for "
    "one prompt, over re-noisings of an image and over images.",
    jobs=jobs,
    claims=claims,
    answer=answer,
    panels=[
        *(
            Panel("update", "reward", ylabel=f"reward, {grid}", where={"grid": grid, "loss": "aesthetic", "batch": 1})
            for grid in GRIDS
        ),
        Panel("loss", "variance_ratio", "grid", kind="names", ylabel="variance of LV / of DRaFT-1"),
    ],
    columns=2,
)
