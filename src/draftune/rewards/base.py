"""The base class of rewards, and weighted sums of rewards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError, out_of_memory
from draftune.prompts import copied, is_blank
from draftune.registry.expression import written_sum
from draftune.registry.factories import add_factory, error_text
from draftune.rewards.chunked import chunked_scores
from draftune.utils.loading import Truncation

RESERVED_COLUMNS = ("image", "total")
"""Columns of the command `score` beside those of the rewards."""


class Reward(nn.Module):
    """Scores images [B, 3, H, W] float32 in [0, 1] of B prompts by B numbers; higher is better.

    A subclass implements `score`. If it has weights, its constructor locates them and `load` reads them, so that
    missing weights are reported before anything is loaded. Weights are frozen, and scores are computed in float32 under
    any autocast. The gradient flows to the images. Rewards add up: `clip + 0.1 * aesthetic - jpeg`.
    """

    label: str = "reward"
    """Its name in logs and tables."""
    expression: str = ""
    """The expression that `load_reward` builds it from; empty for a reward that was written in Python."""
    loaded: bool = False
    """Whether `load` was called."""
    chunk_size: int = 1
    """Images that are scored at a time; the memory for activations is that of one chunk."""
    precision: str | None = None
    """The precision in which the weights are stored, see `load_in_precision`; None is "no" (float32)."""
    converts_itself: bool = False
    """Whether `load` stores the weights in `precision`."""
    reads_prompts: bool = False
    """Whether `score` reads the text of the prompts, so that a blank prompt is refused."""

    def __init__(self) -> None:
        super().__init__()  # a signature without parameters: a subclass without a constructor has no settings

    def load(self) -> None:
        """Read the weights that the constructor located."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raise DraftuneError for prompts that this reward can't score; `check_prompts` calls it for all parts."""

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """Count the prompts that its text encoder cuts off; empty without one. Its weights must be loaded."""
        return []

    def on_step(self, step: int) -> None:
        """Prepare for an update of training; called with the number of the update, from 1 on, before it starts."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B] of images [B, 3, H, W]. Each score depends on its own image and prompt only.

        Both arguments are copies, which the reward may change or retain.
        """
        raise NotImplementedError

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        """The weighted parts that this reward is the sum of; a single reward returns `[(1.0, self)]`."""
        return [(1.0, self)]

    @property
    def named_terms(self) -> dict[str, tuple[float, Reward]]:
        """The weighted parts by their names in logs and tables.

        A part that occurs twice has one name and the sum of its weights. Different parts with one label are named by
        their expressions, and get numbers if these are the same too.
        """
        named: dict[str, tuple[float, Reward]] = {}
        parts = [part for _, part in self.terms]
        for (weight, part), name in zip(self.terms, distinct_names(parts), strict=True):
            label, count = name, 2
            while label in RESERVED_COLUMNS or (label in named and named[label][1] is not part):
                label, count = f"{name}-{count}", count + 1
            named[label] = (named[label][0] if label in named else 0.0) + weight, part
        return named

    def load_weights(self) -> Reward:
        """Load the weights of all parts, freeze them, switch to evaluation mode, and return this reward."""
        for _, part in self.terms:
            if not part.loaded:
                with wrap_errors(part):
                    part.load()
                part.loaded = True
        return self.eval().requires_grad_(False)

    def set_chunk_size(self, size: int) -> None:
        """Set how many images this reward, and all rewards inside it, score at a time."""
        for part in sub_rewards(self).values():
            part.chunk_size = size

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the total scores [B]."""
        return self.components(images, prompts)[0]

    def components(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total scores [B], and by name each part's scores [B] before its weight, without gradient."""
        if isinstance(prompts, str) or len(prompts) != len(images):
            count = "one text" if isinstance(prompts, str) else str(len(prompts))
            raise DraftuneError(f"prompts must be a list of {len(images)}, one for each image, not {count}")
        with torch.autocast(images.device.type, enabled=False):
            scores = {
                label: (weight, part.scores(images.float(), prompts, self.chunk_size))
                for label, (weight, part) in self.named_terms.items()
            }
        total = sum((weight * score for weight, score in scores.values()), torch.zeros((), device=images.device))
        return total, {label: score.detach() for label, (_, score) in scores.items()}

    def scores(self, images: Tensor, prompts: Sequence[str], size: int) -> Tensor:
        """Score `size` images at a time; returns [B], at least float32, with the images' gradient if they need one."""

        def score(some: Tensor, rows: slice) -> Tensor:
            scores = checked_score(self, some, prompts[rows])
            if some.requires_grad and not scores.requires_grad and torch.is_grad_enabled():
                raise DraftuneError(f"the reward {self.label!r} has no gradient")
            return scores.to(torch.promote_types(scores.dtype, torch.float32))

        with wrap_errors(self):  # `chunked_scores` runs the backward pass through the reward too
            return chunked_scores(score, images, size)

    def __add__(self, other: Reward) -> Reward:
        return WeightedSum([*self.terms, *other.terms])

    def __sub__(self, other: Reward) -> Reward:
        return self + -1.0 * other

    def __mul__(self, weight: float) -> Reward:
        return WeightedSum([(weight * w, part) for w, part in self.terms])

    __rmul__ = __mul__

    def __neg__(self) -> Reward:
        return -1.0 * self


def distinct_names(parts: Sequence[Reward]) -> list[str]:
    """Return the label of each reward, or its expression where another reward has the same label."""
    shared = {part.label for part in parts for other in parts if other is not part and other.label == part.label}
    return [part.expression or part.label if part.label in shared else part.label for part in parts]


class WeightedSum(Reward):
    """A weighted sum of rewards."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        super().__init__()
        self.weights = [float(weight) for weight, _ in terms]
        self.rewards = nn.ModuleList(part for _, part in terms)
        names = distinct_names([part for _, part in terms])
        self.label = written_sum([(weight, name) for (weight, _), name in zip(terms, names, strict=True)], digits=4)
        if all(part.expression for _, part in terms):
            self.expression = written_sum([(weight, part.expression) for weight, part in terms])

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        return [(w, part) for w, part in zip(self.weights, self.rewards, strict=True)]  # type: ignore[misc]


class FunctionReward(Reward):
    """A function, or any other callable, of (images, prompts) as a reward.

    Raises:
        DraftuneError: if it does not take these two arguments.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        named = getattr(function, "func", function)  # the function inside a functools.partial
        self.label = getattr(named, "__name__", "") or type(function).__name__
        try:
            inspect.signature(function).bind(None, None)
        except (TypeError, ValueError) as error:
            raise DraftuneError(f"the reward {self.label!r} must take (images, prompts): {error}") from error

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


def sub_rewards(reward: Reward) -> dict[str, Reward]:
    """Return the reward and all rewards inside it, by their module names."""
    return {name: module for name, module in reward.named_modules() if isinstance(module, Reward)}


def begin_step(reward: Reward, step: int) -> None:
    """Call `on_step` of the reward and of all rewards inside it."""
    for part in sub_rewards(reward).values():
        with wrap_errors(part):
            part.on_step(step)


@contextmanager
def wrap_errors(reward: Reward) -> Iterator[None]:
    """Convert an exception that a reward raises to a DraftuneError that names the reward and the line of code."""
    try:
        yield
    except DraftuneError:
        raise
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the reward {reward.label!r} failed: {error_text(error)}") from error


def checked_score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Call `reward.score` with copies of the arguments, and return a copy of its scores [B].

    Every score is computed through this function. A reward can therefore not change tensors of other rewards, of saved
    images or of the caller, and cannot leave autograd switched off.

    Raises:
        DraftuneError: for a blank prompt that the reward reads, and for anything but one real number for each image.
    """
    refuse_blank(reward, prompts)
    name, count = f"the reward {reward.label!r}", len(images)
    with wrap_errors(reward), torch.set_grad_enabled(torch.is_grad_enabled()):
        # The clone is no leaf tensor, so the reward may change it in place under autograd.
        score: Any = reward.score(images.clone(), copied(prompts))
    if not isinstance(score, Tensor):
        raise DraftuneError(f"{name} must return a tensor, not {type(score).__name__}")
    if score.shape != (count,):
        raise DraftuneError(f"{name} must return shape ({count},), one number for each image, not {tuple(score.shape)}")
    if score.is_complex() or score.layout != torch.strided:
        raise DraftuneError(f"{name} must return real numbers in a dense tensor, not {score.dtype}, {score.layout}")
    with wrap_errors(reward):
        own = score.to(images.device).clone()
    return own if images.requires_grad and torch.is_grad_enabled() else own.detach()


def checked_features(reward: Reward, images: Tensor) -> Tensor:
    """Call `reward.features` with a copy of the images, and return a copy of the features [B, D].

    Raises:
        DraftuneError: for anything but one row for each image.
    """
    with wrap_errors(reward):
        features: Any = reward.features(images.clone())  # type: ignore[operator]
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise DraftuneError(f"features of reward {reward.label!r} must have shape ({len(images)}, …), not {shape}")
    return features.clone()


def check_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Raise DraftuneError for prompts that the reward, or a reward inside it, can't score."""
    for part in sub_rewards(reward).values():
        refuse_blank(part, prompts)
        with wrap_errors(part):
            part.check(copied(prompts))


def refuse_blank(reward: Reward, prompts: Sequence[str]) -> None:
    """Raise DraftuneError for a blank prompt if the reward reads prompts."""
    if reward.reads_prompts and (blank := sum(map(is_blank, prompts))):
        raise DraftuneError(
            f"the reward {reward.label!r} compares an image with its prompt, and {blank} of {len(prompts)} prompts are "
            "empty: give a prompt for each image"
        )


REWARDS: dict[str, Callable[..., Reward]] = {}
R = TypeVar("R", bound=Callable[..., Reward])


def register(name: str) -> Callable[[R], R]:
    """Return a decorator that adds a reward's class or factory to the registry. Its docstring is the description.

    A factory whose first parameter is a `Reward` is a wrapper: `sharpness_aware(clip + 0.1*aesthetic, rho=0.01)`.

    Raises:
        DraftuneError: the name is no Python identifier, or that of another reward.
    """

    def add(factory: R) -> R:
        add_factory(REWARDS, name, factory, "reward")
        return factory

    return add
