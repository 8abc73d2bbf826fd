"""Base against tuned: the same prompts and seeds, scored by rewards that were and were not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.models import Model
from draftune.rewards import Reward, WeightedSum
from draftune.rewards.base import checked_features
from draftune.sampling.sampler import advance
from draftune.sampling.schedule import Schedule

KEPT_COLUMN = "kept/"
"""Before the names of scores that tell how an earlier training's reward fares."""
Draw = Callable[[Sequence[str], Sequence[int]], Tensor]


@dataclass
class Evaluation:
    """Scores by name, [prompts, pictures of each], and the pictures [N, 3, H, W] with their prompts."""

    values: dict[str, Tensor]
    prompts: list[str]
    images: Tensor

    @property
    def scores(self) -> dict[str, float]:
        """The means."""
        return {name: float(values.mean()) for name, values in self.values.items()}

    @property
    def errors(self) -> dict[str, float]:
        """The standard errors of the means: pictures of one prompt are alike, so that it is prompts that count."""
        return {name: float(v.mean(1).std() / len(v) ** 0.5) if len(v) > 1 else 0.0 for name, v in self.values.items()}


@dataclass
class Paired:
    """A score of base and tuned, the mean difference, a 95 % interval of it, and how often tuned wins, 0 to 1."""

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    win_rate: float


@dataclass
class Comparison:
    """Two evaluations of the same prompts and seeds by the same rewards."""

    base: Evaluation
    tuned: Evaluation

    @property
    def prompts(self) -> list[str]:
        return self.base.prompts

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """Means by name: {"aesthetic": (base, tuned), …}."""
        tuned = self.tuned.scores
        return {name: (value, tuned[name]) for name, value in self.base.scores.items()}

    def table(self) -> str:
        """A line for each score; with the difference where it is one that was to be kept."""
        width, lines = max(map(len, self.scores)), []
        for name, (base, tuned) in self.scores.items():
            lost = f"  ({tuned - base:+.3f})" if name.startswith(KEPT_COLUMN) else ""
            lines.append(f"{name:{width}}  {base:8.3f} → {tuned:8.3f}{lost}")
        return "\n".join(lines)

    def paired(self) -> dict[str, Paired]:
        """What changed from picture to picture of one prompt and seed, by name; a tie is half a win.

        The interval is over the prompts, since pictures of one prompt are alike; diversity is one number a prompt.
        """
        found = {}
        for name, values in self.base.values.items():
            base, tuned = values.double(), self.tuned.values[name].double()
            by_prompt = (tuned - base).mean(1)
            low, high = interval(by_prompt)
            wins = (tuned > base).double() + 0.5 * (tuned == base).double()
            found[name] = Paired(
                float(base.mean()), float(tuned.mean()), float(by_prompt.mean()), low, high, float(wins.mean())
            )
        return found


def interval(values: Tensor, resamples: int = 10, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the mean of values [N], by a bootstrap of `resamples` thousands; -inf to inf where N is 1.

    The percentiles are those of the expanded interval (Hesterberg, The American Statistician 69, 2015): the plain ones
    (Efron and Tibshirani 1993, chapter 13) hold the mean too seldom where values are few.
    """
    count = len(values)
    if count == 1:
        return -math.inf, math.inf
    generator = torch.Generator().manual_seed(seed)
    # In parts: thousands of prompts, each drawn ten thousand times, would take gigabytes.
    drawn = (torch.randint(count, (1000, count), generator=generator) for _ in range(resamples))
    means = torch.cat([values[chosen].mean(1) for chosen in drawn])
    tail = expanded_tail(count)
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def expanded_tail(count: int) -> float:
    """The share of resampled means below a 95 % interval: 0.025 for many values, less for few.

    Resampled means spread too little by the root of (n - 1) / n, and like Student's t where a normal is taken for it;
    t by Wallace's approximation (Annals of Mathematical Statistics 30, 1959).
    """
    normal, free = NormalDist(), count - 1
    z = normal.inv_cdf(0.975) * (8 * free + 3) / (8 * free + 1)
    t = math.sqrt(free * math.expm1(z**2 / free))
    return normal.cdf(-t * math.sqrt(count / free))


@torch.no_grad()
def score_batches(
    reward: Reward, images: Tensor, prompts: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total and by label every part of it [N], of pictures on the CPU, scored on the reward's device."""
    totals: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), reward.chunk_size):
        batch = slice(start, start + reward.chunk_size)
        total, found = reward.parts(images[batch].to(device), prompts[batch])
        totals.append(total.cpu())
        for label, values in found.items():
            parts.setdefault(label, []).append(values.cpu())
    return torch.cat(totals), {label: torch.cat(values) for label, values in parts.items()}


def normalized(reward: Reward, images: Tensor, prompts: Sequence[str], device: torch.device | str = "cpu") -> Reward:
    """The same sum with each part divided by its standard deviation over these pictures, so that weights compare.

    images: [N, 3, H, W], at least 2. Raises DraftuneError for a part that gives all of them the same score.
    """
    if len(images) < 2:
        raise DraftuneError("normalize_reward wants at least 2 pictures, or 0 for none")
    terms = []
    for weight, part in reward.terms:
        total, _ = score_batches(part, images, prompts, device)
        spread = float(total.std())
        if not spread > 0:
            raise DraftuneError(
                f"the reward {part.label!r} is the same for {len(images)} pictures: it can't be normalised"
            )
        terms.append((weight / spread, part))
    return WeightedSum(terms)


@torch.no_grad()
def diversity(
    held_out: Reward, images: Tensor, images_per_prompt: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """For each prompt the mean distance between its pictures' features, 0 to 2; None if no part of the reward has any.

    images: [prompts * images_per_prompt, 3, H, W], those of one prompt beside each other.
    """
    judges = [part for _, part in held_out.terms if hasattr(part, "features")]
    if not judges or images_per_prompt < 2:
        return None
    chunks = images.split(held_out.chunk_size)
    features = torch.cat([checked_features(judges[0], chunk.to(device)).cpu() for chunk in chunks])
    groups = features.reshape(-1, images_per_prompt, features.shape[-1])
    return torch.cdist(groups, groups).sum((1, 2)) / (images_per_prompt * (images_per_prompt - 1))


def denoiser_mse_from_base(
    model: Model, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
) -> float:
    """Return the mean of `denoiser_mse_by_prompt` over the prompts, with the seeds 0, 1, …"""
    seeds = range(len(prompts))
    return float(denoiser_mse_by_prompt(model, prompts, seeds, schedule, guidance_scale, negative_prompt).mean())


@torch.no_grad()
def denoiser_mse_by_prompt(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    schedule: Schedule,
    guidance_scale: float,
    negative_prompt: str = "",
) -> Tensor:
    """Measure how far the LoRA moves the denoiser from the base model's, along the tuned sampler's path.

    Every step of the path counts alike: the squared `Schedule.prediction_error` of the two denoisers, both with
    guidance and at the same noisy latent, is averaged over the latent's numbers and over the steps. It is no KL
    divergence of the two samplers, which weights each step by its noise.

    Args:
        seeds: of the initial noise, one for each prompt.

    Returns:
        The mean squared error of each prompt [B].
    """
    denoise, base = model.denoisers(prompts, schedule, guidance_scale, negative_prompt)
    x = model.noise([torch.Generator().manual_seed(seed) for seed in seeds], len(prompts))
    total = torch.zeros(len(prompts), device=x.device, dtype=x.dtype)
    for step in schedule.steps:
        prediction = denoise(x, step)
        total += schedule.prediction_error(prediction, base(x, step), step).square().flatten(1).mean(1)
        x = advance(prediction, step)
    return total / len(schedule)


def evaluate(
    draw: Draw,
    reward: Reward,
    held_out: Reward | None,
    prompts: Sequence[str],
    images_per_prompt: int,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Draws every prompt with the seeds 0, 1, … and scores what comes by both rewards, and by diversity."""
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    images = draw(repeated, [seed for _ in prompts for seed in range(images_per_prompt)])
    total, parts = score_batches(reward, images, repeated, device)
    # A weight, as a normalised reward has one, makes its own column of the sum.
    scores = {reward.label: total} | parts
    if held_out is not None:
        _, judged = score_batches(held_out, images, repeated, device)
        scores |= {f"eval/{name}": values for name, values in judged.items()}
    values = {name: found.reshape(len(prompts), images_per_prompt) for name, found in scores.items()}
    if held_out is not None and (spread := diversity(held_out, images, images_per_prompt, device)) is not None:
        values["eval/diversity"] = spread[:, None]
    return Evaluation(values, repeated, images)
