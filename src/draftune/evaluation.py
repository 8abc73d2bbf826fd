"""Base against tuned: the same prompts and seeds, scored by rewards that were and were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.models import Model
from draftune.rewards import Reward, WeightedSum
from draftune.sampling import advance
from draftune.schedule import Schedule

Draw = Callable[[Sequence[str], Sequence[int]], Tensor]


@dataclass
class Evaluation:
    """Means over fixed prompts and seeds by name, and the pictures [N, 3, H, W] with their prompts."""

    scores: dict[str, float]
    prompts: list[str]
    images: Tensor


@dataclass
class Comparison:
    """Means over the same prompts and seeds: {"aesthetic": (base, tuned), …}, and the pictures [N, 3, H, W]."""

    scores: dict[str, tuple[float, float]]
    prompts: list[str]
    base: Tensor
    tuned: Tensor

    @classmethod
    def of(cls, base: Evaluation, tuned: Evaluation) -> Comparison:
        scores = {name: (base.scores[name], tuned.scores[name]) for name in base.scores}
        return cls(scores, base.prompts, base.images, tuned.images)

    def table(self) -> str:
        width = max(map(len, self.scores))
        return "\n".join(f"{name:{width}}  {base:8.3f} → {tuned:8.3f}" for name, (base, tuned) in self.scores.items())


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
) -> float | None:
    """Mean distance between the features of pictures of one prompt, 0 to 2; None if no part of the reward has any.

    images: [prompts * images_per_prompt, 3, H, W], those of one prompt beside each other.
    """
    judges = [part for _, part in held_out.terms if hasattr(part, "features")]
    if not judges or images_per_prompt < 2:
        return None
    features_of: Callable[[Tensor], Tensor] = judges[0].features  # type: ignore[assignment]
    features = torch.cat([features_of(batch.to(device)) for batch in images.split(16)])
    groups = features.reshape(-1, images_per_prompt, features.shape[-1])
    distances = torch.cdist(groups, groups)
    return float(distances.sum() / (len(groups) * images_per_prompt * (images_per_prompt - 1)))


@torch.no_grad()
def divergence(
    model: Model, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
) -> float:
    """How far the LoRA moves the denoiser: the mean of (eps - eps_base)^2 along the tuned sampler's paths, seed 0 on.

    The KL divergence between the two samplers' steps up to a factor for each step, as in the method `kl`.
    """
    denoise, base = model.denoisers(prompts, schedule, guidance_scale, negative_prompt)
    x = model.noise([torch.Generator().manual_seed(seed) for seed in range(len(prompts))], len(prompts))
    total = 0.0
    for step in schedule.steps:
        prediction = denoise(x, step)
        total += float((prediction.noise - base(x, step).noise).square().mean())
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
    scores = {reward.label: total} | (parts if len(parts) > 1 else {})
    if held_out is not None:
        _, judged = score_batches(held_out, images, repeated, device)
        scores |= {f"held-out/{name}": values for name, values in judged.items()}
    means = {name: float(values.mean()) for name, values in scores.items()}
    if held_out is not None and (spread := diversity(held_out, images, images_per_prompt, device)) is not None:
        means["held-out/diversity"] = spread
    return Evaluation(means, repeated, images)
