"""What a reward is, and the algebra of rewards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError, out_of_memory
from draftune.prompts import copied, is_blank
from draftune.registry.custom import where
from draftune.registry.expression import written_sum
from draftune.rewards.chunked import at_once
from draftune.utils.loading import Truncation

COLUMNS = ("image", "total")
Decode = Callable[[Tensor], Tensor]
"""Clean latents [B, C, H, W] to pictures [B, 3, H, W] in [0, 1]."""


class Reward(nn.Module):
    """Scores pictures: images [B, 3, H, W] float32 in [0, 1] and B prompts to B numbers, higher is better.

    A subclass writes `score`, whose number for a picture depends on that picture and its prompt alone; where it has
    weights it finds them in its constructor and reads them in `load`, so that what is missing is said before
    anything is loaded. Weights are frozen, arithmetic is float32 whatever the autocast around it, and gradient flows
    to the images. Rewards add up: `clip + 0.1 * aesthetic - jpeg`.
    """

    label: str = "reward"
    """What it is called in logs and tables."""
    expression: str = ""
    """What `load_reward` would make it from again; empty for a reward that was written in Python."""
    loaded: bool = False
    chunk_size: int = 1
    """How many pictures are scored at once: memory for activations is that of one chunk, whatever the batch."""
    extra_queries: int = 0
    """Pictures that it had to score beyond those it was asked about, so far."""
    past_decoder: bool = False
    """Whether its gradient is that of `slope`, by the latents and not through the decoder, and it has no other."""
    learns: bool = False
    """Whether it is to be told of training's pictures, by `learn`."""
    untaught: bool = False
    """Whether what it scores by is still to be learned."""
    reads_prompts: bool = False
    """Whether its score depends on the prompt's text, so that there is none without; of itself, not of its parts."""

    def load(self) -> None:
        """Reads the weights that the constructor found."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raise DraftuneError for prompts that this reward can't score; `check_prompts` asks its parts as well."""

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """Count the prompts that its text encoder cuts off; empty without one. Its weights must be loaded."""
        return []

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W]; both arguments are this call's own, to change or to keep."""
        raise NotImplementedError

    def learn(self, images: Tensor, prompts: Sequence[str], expected: Tensor | None) -> None:
        """Learns from a batch of training's pictures [B, 3, H, W] of all processes, once they are scored.

        `expected` [B, S]: what the method expected of each picture's score at each of S steps, where it says so.
        """

    def slope(self, latents: Tensor, decode: Decode, prompts: Sequence[str]) -> Tensor:
        """Of each score the gradient by clean latents [B, C, H, W], where that is `past_decoder`."""
        raise NotImplementedError

    def carried(self) -> dict[str, Tensor]:
        """What it learns from one update to the next, by name, in place; a run that goes on takes it up again."""
        return {}

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        """The weighted parts that this reward is the sum of; a plain reward is its own single part."""
        return [(1.0, self)]

    @property
    def columns(self) -> dict[str, tuple[float, Reward]]:
        """The parts by their names in logs and tables; one that stands there twice has the sum of its weights."""
        named: dict[str, tuple[float, Reward]] = {}
        for weight, part in self.terms:
            label, count = part.label, 2
            while label in COLUMNS or (label in named and named[label][1] is not part):
                # Two parts of one kind are logged apart, and none takes the place of what stands beside them.
                label, count = f"{part.label}-{count}", count + 1
            named[label] = (named[label][0] if label in named else 0.0) + weight, part
        return named

    def ready(self) -> Reward:
        """This reward with its weights loaded and frozen, in evaluation mode."""
        for _, part in self.terms:
            if not part.loaded:
                with explained(part):
                    part.load()
                part.loaded = True
        return self.eval().requires_grad_(False)

    def set_chunk_size(self, size: int) -> None:
        """How many pictures this reward and those inside it score at once."""
        for module in self.modules():
            if isinstance(module, Reward):
                module.chunk_size = size

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.parts(images, prompts)[0]

    def parts(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total [B], and by label what each part gave before its weight [B]."""
        if isinstance(prompts, str) or len(prompts) != len(images):
            given = "one text" if isinstance(prompts, str) else str(len(prompts))
            raise DraftuneError(f"a list of {len(images)} prompts is wanted, one for each picture, not {given}")
        with torch.autocast(images.device.type, enabled=False):
            scores = {
                label: (weight, in_chunks(part, images.float(), prompts, self.chunk_size))
                for label, (weight, part) in self.columns.items()
            }
        total = sum((weight * score for weight, score in scores.values()), torch.zeros((), device=images.device))
        return total, {label: score.detach() for label, (_, score) in scores.items()}

    def parts_of(
        self, latents: Tensor, decode: Decode, prompts: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """`parts` of what clean latents decode to, with the gradient by these, and the pictures without a graph."""
        asked = torch.is_grad_enabled() and latents.requires_grad
        past = [(weight, part) for weight, part in self.columns.values() if part.past_decoder]
        with torch.set_grad_enabled(asked and not all(part.past_decoder for _, part in self.terms)):
            pictures = decode(latents)
            total, parts = self.parts(pictures, prompts)
        for weight, part in past if asked else ():
            with explained(part):
                slope = part.slope(latents.detach().clone(), decode, copied(prompts)).detach().clone()
            if slope.shape != latents.shape:
                wanted, given = tuple(latents.shape), tuple(slope.shape)
                raise DraftuneError(
                    f"the slope of reward {part.label!r} must have the latents' shape {wanted}, not {given}"
                )
            # Nothing is added to the scores but their gradient.
            total = total + weight * ((latents - latents.detach()) * slope).flatten(1).sum(1)
        return total, parts, pictures.detach()

    def __add__(self, other: Reward) -> Reward:
        return WeightedSum([*self.terms, *other.terms])

    def __sub__(self, other: Reward) -> Reward:
        return self + -1.0 * other

    def __mul__(self, weight: float) -> Reward:
        return WeightedSum([(weight * w, part) for w, part in self.terms])

    __rmul__ = __mul__

    def __neg__(self) -> Reward:
        return -1.0 * self


class WeightedSum(Reward):
    """A sum of rewards with a weight each."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        super().__init__()
        self.weights = [float(weight) for weight, _ in terms]
        self.rewards = nn.ModuleList(part for _, part in terms)
        self.label = written_sum([(weight, part.label) for weight, part in terms], digits=4)
        if all(part.expression for _, part in terms):
            self.expression = written_sum([(weight, part.expression) for weight, part in terms])

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        return [(w, part) for w, part in zip(self.weights, self.rewards, strict=True)]  # type: ignore[misc]


class FunctionReward(Reward):
    """A plain function, or any other callable, of (images, prompts) as a reward.

    Raises DraftuneError if it can't take these two.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        named = getattr(function, "func", function)  # what a functools.partial is of
        self.label = getattr(named, "__name__", "") or type(function).__name__
        try:
            inspect.signature(function).bind(None, None)
        except (TypeError, ValueError) as error:
            raise DraftuneError(f"the reward {self.label!r} must take (images, prompts): {error}") from error

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


def inside(reward: Reward) -> dict[str, Reward]:
    """The reward and all that it is made of, by their places in it."""
    return {name: module for name, module in reward.named_modules() if isinstance(module, Reward)}


def carried(reward: Reward) -> dict[str, Tensor]:
    """What the reward and all inside it learn from one update to the next."""
    learned = ((name, part.carried()) for name, part in inside(reward).items())
    return {f"reward/{name}/{key}": value for name, tensors in learned for key, value in tensors.items()}


def learners(reward: Reward) -> list[Reward]:
    """What of the reward, itself or inside it, learns from training's pictures."""
    return [part for part in inside(reward).values() if part.learns]


def taught(reward: Reward) -> Reward:
    """The reward. Raises DraftuneError where something in it is still to learn what it scores by."""
    for part in learners(reward):
        if part.untaught:
            raise DraftuneError(
                f"the reward {part.label!r} learns in training and knows nothing yet: give one that a run left, as in "
                f"{part.label}(…, critic=RUN)"
            )
    return reward


def extra_queries(reward: Reward) -> int:
    return sum(part.extra_queries for part in inside(reward).values())


@contextmanager
def explained(reward: Reward) -> Iterator[None]:
    """Turns what a reward raises into a DraftuneError that says where."""
    try:
        yield
    except DraftuneError:
        raise
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the reward {reward.label!r} failed: {where(error)}") from error


def in_chunks(reward: Reward, images: Tensor, prompts: Sequence[str], size: int) -> Tensor:
    """The scores [B] of `size` pictures at a time, at least float32, with their gradient where one is wanted."""

    if reward.past_decoder:
        images = images.detach()  # `parts_of` brings its gradient

    def score(some: Tensor, part: slice) -> Tensor:
        found = checked_score(reward, some, prompts[part])
        if some.requires_grad and not found.requires_grad and torch.is_grad_enabled():
            raise DraftuneError(f"the reward {reward.label!r} has no gradient")
        return found.to(torch.promote_types(found.dtype, torch.float32))

    with explained(reward):  # where a gradient is wanted, the backward pass through the reward is made here too
        return at_once(score, images, size)


def checked_score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Call `reward.score` with copies of its own, through which gradient flows, and return a copy of its scores [B].

    Every score is called through here. What a reward changes in place, retains, or returns again is never shared with
    other rewards, saved images or the caller; and its switches of autograd end with the call.

    Raises:
        DraftuneError: for an empty prompt that the reward reads, and for anything but one real number for each image.
    """
    refuse_blank(reward, prompts)
    name, count = f"the reward {reward.label!r}", len(images)
    with explained(reward), torch.set_grad_enabled(torch.is_grad_enabled()):
        # The copy is no leaf, so that changes in place are allowed where a gradient is wanted, and differentiated.
        score: Any = reward.score(images.clone(), copied(prompts))
    if not isinstance(score, Tensor):
        raise DraftuneError(f"{name} must return a tensor, not {type(score).__name__}")
    if score.shape != (count,):
        shape = tuple(score.shape)
        raise DraftuneError(
            f"{name} must return one number for each of {count} pictures, shape ({count},), not {shape}"
        )
    if score.is_complex() or score.layout != torch.strided:
        raise DraftuneError(f"{name} must return real numbers in a dense tensor, not {score.dtype}, {score.layout}")
    with explained(reward):
        own = score.to(images.device).clone()
    return own if images.requires_grad and torch.is_grad_enabled() else own.detach()


def checked_features(reward: Reward, images: Tensor) -> Tensor:
    """Call `reward.features` with a copy of its own; [B, D]. Raises DraftuneError for anything but one row an image."""
    with explained(reward):
        features: Any = reward.features(images.clone())  # type: ignore[operator]
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise DraftuneError(f"the features of reward {reward.label!r} must be of shape ({len(images)}, …), not {given}")
    return features.clone()


def check_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Raise DraftuneError for prompts that the reward, or one inside it, can't score, before anything is sampled."""
    for part in inside(reward).values():
        refuse_blank(part, prompts)
        with explained(part):
            part.check(copied(prompts))


def refuse_blank(reward: Reward, prompts: Sequence[str]) -> None:
    """Raise DraftuneError for a prompt without text where the reward itself reads it."""
    if reward.reads_prompts and (blank := sum(map(is_blank, prompts))):
        raise DraftuneError(
            f"the reward {reward.label!r} compares an image with its prompt, and {blank} of {len(prompts)} are empty: "
            "give a prompt for each"
        )


def learn_all(reward: Reward, images: Tensor, prompts: Sequence[str], expected: Tensor | None) -> None:
    """Let each reward inside this one that learns do so, by `learn` with copies of its own.

    `expected` is of this reward's scores and says nothing of its parts' scores, which don't get it.
    """
    for part in learners(reward):
        known = expected.clone() if expected is not None and part is reward else None
        with explained(part):
            part.learn(images.clone(), copied(prompts), known)


REWARDS: dict[str, Callable[..., Reward]] = {}
R = TypeVar("R", bound=Callable[..., Reward])


def register(name: str) -> Callable[[R], R]:
    """Makes a reward known by name to the command line and to `load_reward`. Its docstring is its description.

    A factory whose first parameter is a Reward is a wrapper: `robust(clip + 0.1*aesthetic, rho=0.01)`.
    """

    def add(factory: R) -> R:
        if name in REWARDS:
            raise DraftuneError(f"there is a reward {name!r} already")
        REWARDS[name] = factory
        return factory

    return add
