"""Guidance by a reward as a user asks for it: `ratio(strength=0.1)`, `look-ahead(rounds=4)`, on any model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.experimental.denoising_loss import Fit
from draftune.guidance.sampler import Fresh, Uphill, by_ratio, by_variance, pulled, rounds_ahead
from draftune.lora import add_lora, lora_parameters
from draftune.models import Model
from draftune.registry.factories import build, parse_call
from draftune.rewards import Reward, load_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.chunked import at_once
from draftune.rewards.latent import parts_of
from draftune.rewards.online import extra_queries, taught
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Schedule, Step


class Guide(ABC):
    """Draws clean latents along a reward's gradient."""

    tune_from = 0
    """From which drawing on a LoRA is trained on what was drawn, counted from 0, where it is trained at all."""
    learning_rate = 0.0

    @property
    def draws(self) -> int:
        """How many times the pictures are drawn."""
        return 1

    @abstractmethod
    def latents(self, denoise: Denoiser, steps: Sequence[Step], uphill: Uphill, fresh: Fresh) -> Iterator[Tensor]:
        """Clean latents [B, C, H, W] of each time that the pictures are drawn; the last are the result."""


@dataclass(frozen=True)
class Ratio(Guide):
    """After every step a move uphill of `strength` times the norm of the step's own move (PGDiff's dynamic guidance).

    The gradient flows through the decoder, never through the denoiser, and a strength means the same for every reward.
    PGDiff's strengths are 0.0015 to 0.01 in 1,000 steps; fewer steps want more. `eta`: how much of the ancestral
    sampler's noise a step has, 0 (DDIM; Euler for flow models) to 1 (PGDiff's). `repeats`: how often each of the first
    30 % of the steps is made (PGDiff's N). `per_channel`: the norms are those of each channel, as PGDiff colours
    pictures. One scored picture and one pass back through the decoder a step.
    """

    strength: float = 0.1
    eta: float = 1.0
    repeats: int = 1
    per_channel: bool = False

    def __post_init__(self) -> None:
        check("ratio", strength=(self.strength, 0, math.inf), eta=(self.eta, 0, 1), repeats=(self.repeats, 1, 1000))

    def latents(self, denoise: Denoiser, steps: Sequence[Step], uphill: Uphill, fresh: Fresh) -> Iterator[Tensor]:
        pull = by_ratio(self.strength, self.per_channel)
        yield pulled(denoise, steps, fresh(), uphill, pull, fresh, self.eta, self.repeats)


@dataclass(frozen=True)
class Static(Guide):
    """Every step of the ancestral sampler moved by `strength` times its variance times the gradient (PGDiff's static).

    As `ratio`, but a strength is in units of one over the reward and has to be found anew for each one.
    """

    strength: float

    def __post_init__(self) -> None:
        check("static", strength=(self.strength, 0, math.inf))

    def latents(self, denoise: Denoiser, steps: Sequence[Step], uphill: Uphill, fresh: Fresh) -> Iterator[Tensor]:
        yield pulled(denoise, steps, fresh(), uphill, by_variance(self.strength), fresh)


@dataclass(frozen=True)
class LookAhead(Guide):
    """Drawn anew in rounds, each given that the linearised reward is higher by `rise` (Gradient Guidance).

    The reward is asked for its gradient once a round; at every step a gradient flows through one call of the denoiser.
    `rise` and `sigma`, how far from the wanted value a picture may be, are in the reward's units: rise / sigma^2 says
    how far the pictures go. Their defaults are those of the authors' toy, and the number of rounds that of their
    pictures, which were drawn for a fixed value instead. `anew`: every round starts from fresh noise, as the authors'
    do, and not from the picture's own, where the gradient of one picture is used for another. `eta`: the sampler's
    noise, 0 (DDIM; Euler for flow models) to 1 (ancestral). `tune_from`: the round from which on every round ends with
    a step of Adam at `learning_rate` on a fresh LoRA of rank 8, towards denoising what the round drew (Algorithm 2;
    theirs trains the whole network of a toy, at 1e-6 from round 60 of 1,200); 0 trains nothing.
    """

    rise: float = 0.2
    sigma: float = 0.1
    rounds: int = 8
    anew: bool = False
    eta: float = 0.0
    tune_from: int = 0
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        check("look-ahead", rise=(self.rise, 0, math.inf), sigma=(self.sigma, 1e-6, math.inf), eta=(self.eta, 0, 1))
        check("look-ahead", rounds=(self.rounds, 1, 100_000), tune_from=(self.tune_from, 0, self.rounds))
        check("look-ahead", learning_rate=(self.learning_rate, 0, math.inf))

    @property
    def draws(self) -> int:
        return 1 + self.rounds

    def latents(self, denoise: Denoiser, steps: Sequence[Step], uphill: Uphill, fresh: Fresh) -> Iterator[Tensor]:
        return rounds_ahead(denoise, steps, uphill, fresh, self.rounds, self.rise, self.sigma, self.eta, self.anew)


GUIDES: dict[str, type[Guide]] = {"ratio": Ratio, "static": Static, "look-ahead": LookAhead}


def check(guide: str, **numbers: tuple[float, float, float]) -> None:
    """Raises DraftuneError for a value that is not between its bounds."""
    for name, (value, low, high) in numbers.items():
        if not (low <= value <= high and math.isfinite(value)):
            wanted = f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g} and finite"
            raise DraftuneError(f"{name} of {guide} must be {wanted}, not {value}")


def load_guide(text: str) -> Guide:
    """From a name and its settings, as in "ratio(strength=0.2)". Raises DraftuneError for what is not there."""
    return build(parse_call(text, "guidance", "ratio(strength=0.1)"), "guidance", GUIDES, Guide)  # type: ignore[type-abstract]


@dataclass(frozen=True)
class Guided:
    """What `sample_guided` drew."""

    pictures: Tensor
    """[B, 3, H, W] in [0, 1], on the CPU."""
    rewards: Tensor
    """[R, B], of each time that the pictures were drawn, the last being these; look-ahead's first had no guidance."""
    queries: int
    """Pictures that were scored, with or without a gradient."""


class Slope:
    """The reward's gradient at clean latents, through the decoder; counts what it scores."""

    def __init__(self, model: Model, reward: Reward, prompts: Sequence[str]) -> None:
        self.model, self.reward, self.prompts, self.queries = model, reward, prompts, 0

    def score(self, latents: Tensor) -> Tensor:
        """The rewards [B]. Raises DraftuneError where one is not finite."""

        def scored(some: Tensor, part: slice) -> Tensor:
            return parts_of(self.reward, some, self.model.decode, self.prompts[part])[0]

        before = extra_queries(self.reward)
        rewards = at_once(scored, latents, self.reward.chunk_size)
        self.queries += len(latents) + extra_queries(self.reward) - before
        if not rewards.isfinite().all():
            raise DraftuneError(f"the reward became {rewards.tolist()} while guiding: less strength may help")
        return rewards

    def __call__(self, latents: Tensor) -> Tensor:
        """The gradients [B, C, H, W]. Raises DraftuneError where one is not finite, and if the first are all zero."""
        first = self.queries == 0
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.score(leaf).sum(), leaf)
        if not gradient.isfinite().all():
            raise DraftuneError(f"the gradient of the reward {self.reward.label!r} became infinite while guiding")
        if first and not gradient.any():
            raise DraftuneError(f"the reward {self.reward.label!r} gives no gradient to guide by")
        return gradient


def fresh_lora(model: Model, schedule: Schedule, learning_rate: float) -> Fit:
    """Adds a LoRA to the model, always the same; what trains it. Raises DraftuneError if there is one already."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(model, rank=8)
    return Fit(lora_parameters(model).values(), schedule, learning_rate, torch.Generator().manual_seed(0))


def sample_guided(
    model: Model,
    reward: str | Reward | Callable[..., Any],
    prompts: str | Sequence[str],
    method: str = "ratio",
    *,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: int = 8,
    progress: bool = False,
) -> Guided:
    """Pictures of prompts, guided by a reward while they are drawn; one for each prompt, with its seed.

    `method`: "ratio", "static" or "look-ahead" with settings, as in "ratio(strength=0.2)". Seeds are 0, 1, … unless
    given; a picture depends on its own alone. Sampling steps and guidance default to what is recommended for the model.
    Where the method trains a LoRA (look-ahead's `tune_from`), pictures depend on those before them and beside them, and
    the LoRA stays on the model: `save_lora` keeps it. Raises DraftuneError for a method or a reward that is not there,
    one without a gradient, numbers that stop being finite, and a model to train that carries a LoRA.
    """
    guide = load_guide(method)
    if model.autocast_dtype is torch.float16:
        raise DraftuneError("the gradient that guides vanishes in fp16: use bf16 or no")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = range(len(prompts)) if seeds is None else seeds
    score = taught(load_reward(reward)).to(model.device)
    model.check_prompts(prompts, negative_prompt)
    check_prompts(score, prompts)
    defaults = model.recommended
    schedule = model.schedule(num_inference_steps or defaults["num_inference_steps"])
    scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale

    # Before the denoisers, which look at once what they carry.
    fit = fresh_lora(model, schedule, guide.learning_rate) if guide.tune_from else None
    pictures, rewards, queries = [], [], 0
    bar = tqdm(total=guide.draws * len(prompts), desc="guided", unit="picture", leave=False, disable=not progress)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        fresh = partial(model.noise, generators, len(batch))
        denoise = model.denoise(batch, schedule, scale, negative_prompt)
        slope = Slope(model, score, batch)
        found = []
        for drawing, latents in enumerate(guide.latents(denoise, schedule.steps, slope, fresh)):
            found.append(slope.score(latents).cpu())
            if fit is not None and drawing >= guide.tune_from:
                fit(model.denoise(batch, schedule, guidance_scale=1), latents)
            bar.update(len(batch))
        pictures.append(model.decode(latents).cpu().float())
        rewards.append(torch.stack(found))
        queries += slope.queries
    bar.close()
    return Guided(torch.cat(pictures), torch.cat(rewards, 1), queries)
