"""Metrics of images and of the denoiser, and the comparison of the base model with the fine-tuned one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from draftune.errors import DraftuneError
from draftune.evaluation.criterion import DIVERSITY, EVAL_PREFIX
from draftune.evaluation.verdict import UNDECIDED, direction
from draftune.models import DiffusionModel
from draftune.rewards import Reward
from draftune.rewards.base import checked_features
from draftune.sampling.sampler import ddim_step
from draftune.sampling.schedule import Schedule
from draftune.utils.tables import NAME, shortened

RETAINED_PREFIX = "retained/"
"""Prefix of the columns of an earlier training's reward."""
Draw = Callable[[Sequence[str], Sequence[int]], Tensor]
"""A function that samples images [N, 3, H, W] from N prompts and N seeds."""


@dataclass
class Evaluation:
    """Images of one model and their scores.

    Attributes:
        values: Scores by column, [prompts, images per prompt]; [prompts, 1] for diversity.
        prompts: The prompt of each image.
        images: Images [N, 3, H, W] in [0, 1].
    """

    values: dict[str, Tensor]
    prompts: list[str]
    images: Tensor

    @property
    def scores(self) -> dict[str, float]:
        """Return the mean of each column."""
        return {name: float(values.mean()) for name, values in self.values.items()}

    @property
    def stderr(self) -> dict[str, float]:
        """Return the standard error of each mean over prompts, NaN for one prompt.

        Images of one prompt are not independent.
        """
        errors = {name: v.mean(1).std() / len(v) ** 0.5 for name, v in self.values.items() if len(v) > 1}
        return {name: float(errors.get(name, math.nan)) for name in self.values}


@dataclass
class Paired:
    """One score of the base and the fine-tuned model.

    Attributes:
        base, tuned: Mean scores.
        difference: Mean difference, fine-tuned minus base.
        low, high: Its 95 % confidence interval.
        win_rate: Fraction of images, 0 to 1, whose score is higher than that of the base image; a tie counts 0.5.
    """

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    win_rate: float


@dataclass
class Comparison:
    """Evaluations of the base and the fine-tuned model, with the same prompts, seeds and rewards.

    Attributes:
        template: Mean scores of the base model with the prompts of a template, by column; empty without a template.
    """

    base: Evaluation
    tuned: Evaluation
    template: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return self.base.prompts

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """Return the means of both models by column: {"aesthetic": (base, tuned), …}."""
        tuned = self.tuned.scores
        return {name: (value, tuned[name]) for name, value in self.base.scores.items()}

    def table(self) -> str:
        """Format a line for each score: both means, their difference, and what its 95 % interval says.

        What the base model reaches with the template of prompts comes last. Long names are cut to fit a terminal.
        """
        width, lines = min(NAME, max(map(len, self.scores))), []
        for name, s in self.paired().items():
            between = f"{s.low:+.3f} to {s.high:+.3f}" if math.isfinite(s.low) else "interval unknown"
            verdict = "" if direction(s.low, s.high) else f", {UNDECIDED}"
            other = f" | {self.template[name]:.3f}" if name in self.template else ""
            change = f"({s.difference:+.3f})  {between}{verdict}{other}"
            lines.append(f"{shortened(name, width):{width}}  {s.base:8.3f} → {s.tuned:8.3f}  {change}")
        return "\n".join(lines)

    def paired(self) -> dict[str, Paired]:
        """Compare the models image by image, which are paired by prompt and seed.

        The confidence interval is over prompts, since images of one prompt are not independent.
        """
        result = {}
        for name, values in self.base.values.items():
            base, tuned = values.double(), self.tuned.values[name].double()
            by_prompt = (tuned - base).mean(1)
            wins = (tuned > base).double() + 0.5 * (tuned == base).double()
            means = float(base.mean()), float(tuned.mean()), float(by_prompt.mean())
            result[name] = Paired(*means, *interval(by_prompt), float(wins.mean()))
        return result

    def bounds(self) -> dict[str, list[float]]:
        """Return the 95 % interval of each score's change, without those that are not finite."""
        return {name: [s.low, s.high] for name, s in self.paired().items() if math.isfinite(s.low)}


def interval(values: Tensor) -> tuple[float, float]:
    """Compute the 95 % confidence interval of the mean by Student's t distribution.

    mean ± t_{0.975, N - 1} * std / sqrt(N)

    A bootstrap covers the mean less often for few values: for 8 normal values 89 % (BCa), this interval 95 %.

    Args:
        values: Independent values [N].

    Returns:
        The bounds: -inf and inf if N is 1, NaN if a value is not finite.
    """
    from scipy.stats import t  # takes 0.6 s to import

    if len(values) == 1:
        return -math.inf, math.inf
    mean, margin = float(values.mean()), float(t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5)
    return mean - margin, mean + margin


@torch.no_grad()
def score_batches(
    reward: Reward, images: Tensor, prompts: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score images in chunks of the reward's `chunk_size`.

    Args:
        images: Images [N, 3, H, W] on any device; each chunk is moved to `device`.

    Returns:
        The reward [N] and, by label, each of its terms [N], on the CPU.
    """
    totals: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), reward.chunk_size):
        batch = slice(start, start + reward.chunk_size)
        total, terms = reward.components(images[batch].to(device), prompts[batch])
        totals.append(total.cpu())
        for label, values in terms.items():
            parts.setdefault(label, []).append(values.cpu())
    return torch.cat(totals), {label: torch.cat(values) for label, values in parts.items()}


def normalized_weights(
    reward: Reward, images: Tensor, prompts: Sequence[str], device: torch.device | str = "cpu"
) -> list[float]:
    """Divide the weight of each term of a sum by the term's standard deviation over images.

    Args:
        images: Images [N, 3, H, W], N at least 2.

    Returns:
        The weights of the terms, which are comparable.

    Raises:
        DraftuneError: there are fewer images, or a term gives all of them the same score.
    """
    if len(images) < 2:
        raise DraftuneError(f"reward_normalization_samples must be 0 or at least 2, not {len(images)}")
    weights = []
    for weight, part in reward.terms:
        total, _ = score_batches(part, images, prompts, device)
        spread = float(total.std())
        if not spread > 0:
            raise DraftuneError(
                f"the reward {part.label!r} has the same score for {len(images)} images: it cannot be normalized"
            )
        weights.append(weight / spread)
    return weights


def has_diversity(eval_rewards: Reward, images_per_prompt: int) -> bool:
    """Return whether `diversity` can be computed: a term has features, and a prompt has two images or more."""
    return images_per_prompt > 1 and any(hasattr(part, "features") for _, part in eval_rewards.terms)


@torch.no_grad()
def diversity(
    eval_rewards: Reward, images: Tensor, images_per_prompt: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Compute the mean distance between the features of images of one prompt, from the first term with features.

    Args:
        eval_rewards: The evaluation rewards.
        images: Images [prompts * images_per_prompt, 3, H, W]; images of one prompt follow each other.

    Returns:
        The mean pairwise Euclidean distance of each prompt [prompts], 0 to 2 for unit features; the mean of one minus
        their cosine for a term with `cosine_distance`. None if no term has features or there is one image per prompt.
    """
    if not has_diversity(eval_rewards, images_per_prompt):
        return None
    extractors = [part for _, part in eval_rewards.terms if hasattr(part, "features")]
    chunks = images.split(eval_rewards.chunk_size)
    features = torch.cat([checked_features(extractors[0], chunk.to(device)).cpu() for chunk in chunks])
    groups = features.reshape(-1, images_per_prompt, features.shape[-1])
    if getattr(extractors[0], "cosine_distance", False):
        distances = 1 - normalize(groups, dim=-1) @ normalize(groups, dim=-1).mT
    else:
        distances = torch.cdist(groups, groups)
    return distances.sum((1, 2)) / (images_per_prompt * (images_per_prompt - 1))


def denoiser_mse_from_base(
    model: DiffusionModel, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
) -> float:
    """Return the mean of `denoiser_mse_by_prompt` over the prompts, with the seeds 0, 1, …"""
    seeds = range(len(prompts))
    return float(denoiser_mse_by_prompt(model, prompts, seeds, schedule, guidance_scale, negative_prompt).mean())


@torch.no_grad()
def denoiser_mse_by_prompt(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    schedule: Schedule,
    guidance_scale: float,
    negative_prompt: str = "",
) -> Tensor:
    """Compute the mean squared error between the predictions of the fine-tuned and the base denoiser.

    mean over steps t and elements of (e_tuned(x_t, t) - e_base(x_t, t))^2, x_t on the fine-tuned model's trajectory

    e is noise, velocity or x_0, whichever the model predicts, with classifier-free guidance. All steps have the same
    weight; the KL divergence of the two samplers weights each step by its noise.

    Args:
        seeds: Seeds of the initial noise, one for each prompt.

    Returns:
        The error of each prompt [B].
    """
    denoise, base = model.denoisers_for(prompts, schedule, guidance_scale, negative_prompt)
    x, schedule = model.start([torch.Generator().manual_seed(seed) for seed in seeds], len(prompts), schedule)
    total = torch.zeros(len(prompts), device=x.device, dtype=x.dtype)
    for step in schedule.steps:
        prediction = denoise(x, step)
        total += schedule.output_difference(prediction, base(x, step), step).square().flatten(1).mean(1)
        x = ddim_step(prediction, step)
    return total / len(schedule)


def evaluate(
    draw: Draw,
    reward: Reward,
    eval_rewards: Reward | None,
    prompts: Sequence[str],
    images_per_prompt: int,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Sample every prompt with the seeds 0 to `images_per_prompt` - 1 and score the images.

    Args:
        draw: Samples images from prompts and seeds.
        reward: The training reward; a column for it and one for each of its terms.
        eval_rewards: Evaluation rewards: columns "eval/LABEL", and "eval/diversity" if one of them has features.
    """
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    images = draw(repeated, [seed for _ in prompts for seed in range(images_per_prompt)])
    total, parts = score_batches(reward, images, repeated, device)
    # With a weight other than 1, the sum differs from its only term and has its own column.
    scores = {reward.label: total} | parts
    if eval_rewards is not None:
        _, terms = score_batches(eval_rewards, images, repeated, device)
        scores |= {f"{EVAL_PREFIX}{name}": values for name, values in terms.items()}
    values = {name: score.reshape(len(prompts), images_per_prompt) for name, score in scores.items()}
    if eval_rewards is not None and (spread := diversity(eval_rewards, images, images_per_prompt, device)) is not None:
        values[DIVERSITY] = spread[:, None]
    return Evaluation(values, repeated, images)
