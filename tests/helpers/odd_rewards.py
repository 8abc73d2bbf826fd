"""Odd rewards by a generator with a fixed seed, each with its scores and gradients, or the reason to refuse it.

What a reward should give is computed in NumPy, from copies that no reward sees.
"""

from __future__ import annotations

import random as python_random
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftune.prompts import metadata

Array = NDArray[np.float64]
Function = Callable[[Any, Any], Any]


@dataclass
class OddReward:
    """A function, and what it should give: scores [B], gradients [B, 3, H, W], or None for a refusal."""

    name: str
    function: Function
    scores: Callable[[Array, Sequence[str]], Array] | None
    gradients: Callable[[Array, Sequence[str]], Array] | None
    tolerance: float = 1e-5


@dataclass
class Formula:
    """A score by torch, and its value and gradient by NumPy."""

    name: str
    torch: Function
    scores: Callable[[Array, Sequence[str]], Array]
    gradients: Callable[[Array, Sequence[str]], Array]


def spread(values: Any, like: Array) -> Array:
    """One number for each image to all its pixels."""
    return np.broadcast_to(np.asarray(values, dtype=float).reshape(-1, 1, 1, 1), like.shape) / like[0].size


def lengths(prompts: Sequence[str]) -> Array:
    return np.array([float(len(prompt)) for prompt in prompts])


def levels(prompts: Sequence[str]) -> Array:
    return np.array([float(metadata(prompt).get("level", "1")) for prompt in prompts])


def red(x: Array) -> Array:
    mask = np.zeros_like(x)
    mask[:, 0] = 3
    return mask / x[0].size


def means(x: Any, prompts: Sequence[str]) -> Any:
    """Of images of either library."""
    return x.mean((1, 2, 3))


FORMULAS = [
    Formula("mean", means, means, lambda x, p: spread(np.ones(len(x)), x)),
    Formula("red", lambda x, p: x[:, 0].mean((1, 2)), lambda x, p: x[:, 0].mean((1, 2)), lambda x, p: red(x)),
    Formula("square", lambda x, p: means(x**2, p), lambda x, p: means(x**2, p), lambda x, p: 2 * x / x[0].size),
    Formula(
        "length",
        lambda x, p: x.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in p]),
        lambda x, p: x.mean((1, 2, 3)) * lengths(p),
        lambda x, p: spread(lengths(p), x),
    ),
    Formula(
        "level",
        lambda x, p: x.mean((1, 2, 3)) * torch.tensor([float(metadata(prompt).get("level", "1")) for prompt in p]),
        lambda x, p: x.mean((1, 2, 3)) * levels(p),
        lambda x, p: spread(levels(p), x),
    ),
]  # fmt: skip
FROZEN_ADAPTER: list[Any] = []
"""What rewards hold on to."""


def spoil_kept() -> None:
    for tensor in FROZEN_ADAPTER:
        with torch.no_grad():
            tensor.detach().fill_(7.0)


Game = Callable[[Formula, str], OddReward]
"""Makes a reward of a formula and a name."""


def game(
    change: Callable[[Any], Any] | None = None, changed: Callable[[Array], Array] | None = None, factor: Any = 1.0
) -> Game:
    """A change in place, then the formula. `changed`: the same by NumPy, of slope `factor`, a number or a function."""

    def make(formula: Formula, name: str) -> OddReward:
        def function(images: Any, prompts: Any) -> Any:
            if change is not None:
                change(images)
            return formula.torch(images, prompts)

        new = changed or (lambda x: x)

        def gradients(x: Array, prompts: Sequence[str]) -> Array:
            slope = factor(x) if callable(factor) else factor
            return formula.gradients(new(x), prompts) * slope

        return OddReward(f"{name} {formula.name}", function, lambda x, p: formula.scores(new(x), p), gradients)

    return make


def with_prompts(change: Callable[[Any], Any]) -> Game:
    """The formula, and then a change of the prompts."""

    def make(formula: Formula, name: str) -> OddReward:
        def function(images: Any, prompts: Any) -> Any:
            score = formula.torch(images, prompts)
            change(prompts)
            return score

        return OddReward(f"{name} {formula.name}", function, formula.scores, formula.gradients)

    return make


def keeping(formula: Formula, name: str) -> OddReward:
    """Spoils what it was given before, and keeps what it is given now."""

    def function(images: Any, prompts: Any) -> Any:
        spoil_kept()
        FROZEN_ADAPTER.append(images)
        # A sum of its own, whose gradient needs nothing of what is spoilt.
        return formula.torch(images * 1.0, prompts)

    return OddReward(f"{name} {formula.name}", function, formula.scores, formula.gradients)


def buffered(formula: Formula, name: str) -> OddReward:
    """Returns the same buffer at each call, without a gradient."""
    buffer = torch.zeros(64)

    def function(images: Any, prompts: Any) -> Any:
        with torch.no_grad():
            return buffer[: len(images)].copy_(formula.torch(images, prompts))

    return OddReward(f"{name} {formula.name}", function, formula.scores, None)


def inside(context: Callable[[], Any], differentiable: bool) -> Game:
    def make(formula: Formula, name: str) -> OddReward:
        def function(images: Any, prompts: Any) -> Any:
            with context():
                return formula.torch(images, prompts)

        gradients = formula.gradients if differentiable else None
        return OddReward(f"{name} {formula.name}", function, formula.scores, gradients)

    return make


def disturbing(disturb: Callable[[], Any], differentiable: bool = True) -> Game:
    """Leaves something global changed."""

    def make(formula: Formula, name: str) -> OddReward:
        def function(images: Any, prompts: Any) -> Any:
            disturb()
            return formula.torch(images, prompts)

        gradients = formula.gradients if differentiable else None
        return OddReward(f"{name} {formula.name}", function, formula.scores, gradients)

    return make


def returned(
    convert: Callable[[Any], Any],
    scores: Callable[[Array], Array],
    tolerance: float = 1e-5,
    slope: Callable[[Array], Array] | None = np.ones_like,
) -> Game:
    """The formula's scores as another kind of numbers; `slope` by the formula's score, None without a gradient."""

    def make(formula: Formula, name: str) -> OddReward:
        def gradients(x: Array, prompts: Sequence[str]) -> Array:
            assert slope is not None
            return formula.gradients(x, prompts) * slope(formula.scores(x, prompts)).reshape(-1, 1, 1, 1)

        return OddReward(
            f"{name} {formula.name}",
            lambda images, prompts: convert(formula.torch(images, prompts)),
            lambda x, p: scores(formula.scores(x, p)),
            None if slope is None else gradients,
            tolerance,
        )

    return make


def in_thread(formula: Formula, name: str) -> OddReward:
    """Scores in a thread, which ends by spoiling what it was given."""

    def function(images: Any, prompts: Any) -> Any:
        found = []

        def work(grad: bool) -> None:
            with torch.set_grad_enabled(grad):
                found.append(formula.torch(images * 1.0, prompts))
                images.detach().fill_(-1.0)
                prompts.clear()

        thread = threading.Thread(target=work, args=(torch.is_grad_enabled(),))
        thread.start()
        thread.join()
        return found[0]

    return OddReward(f"{name} {formula.name}", function, formula.scores, formula.gradients)


def own_backward(formula: Formula, name: str) -> OddReward:
    """Takes a gradient for itself on the way and lets the graph go, so that there is none left to give."""

    def function(images: Any, prompts: Any) -> Any:
        with torch.enable_grad():
            score = formula.torch(images.requires_grad_().square(), prompts)
            torch.autograd.grad(score.sum(), images)
        return score

    return OddReward(f"{name} {formula.name}", function, lambda x, p: formula.scores(x**2, p), None)


def normalize(x: Any) -> Any:
    return x.sub_(0.5).div_(0.5)


def clip_slope(x: Array) -> Array:
    return ((x >= 0.25) & (x <= 0.75)).astype(float)


def blue_green(x: Array) -> Array:
    mask = np.ones_like(x)
    mask[:, 0] = 0
    return mask


def tripled(x: Any) -> Any:
    return x.mul_(3) if x.requires_grad else torch.mul(x.detach(), 3, out=x)


def nan_for_some(scores: Any) -> Any:
    return torch.where(scores > 0.4, torch.nan, scores)


GAMES: dict[str, Game] = {
    "plain": game(),
    "normalized in place": game(normalize, lambda x: (x - 0.5) / 0.5, 2.0),
    "clamped in place": game(lambda x: x.clamp_(0.25, 0.75), lambda x: np.clip(x, 0.25, 0.75), clip_slope),
    "squared in place": game(lambda x: x.pow_(2), lambda x: x**2, lambda x: 2 * x),
    "a part set": game(lambda x: x[:, 0].zero_(), lambda x: x * blue_green(x), blue_green),
    "by out=": game(tripled, lambda x: 3 * x, 3.0),
    "asking for a gradient": game(lambda x: x.requires_grad_()),
    "a hook": game(lambda x: x.register_hook(lambda g: 2 * g) if x.requires_grad else None, None, 2.0),
    "keeping": keeping,
    "a thread": in_thread,
    "prompts cleared": with_prompts(lambda p: p.clear()),
    "prompts added": with_prompts(lambda p: p.append("more")),
    "prompts replaced": with_prompts(lambda p: p.__setitem__(slice(None), ["x"] * len(p))),
    "prompts sorted": with_prompts(lambda p: p.sort()),
    "metadata cleared": with_prompts(lambda p: [getattr(prompt, "metadata", {}).clear() for prompt in p]),
    "metadata set": with_prompts(lambda p: [getattr(prompt, "metadata", {}).update(level="9") for prompt in p]),
    "one buffer": buffered,
    "in no_grad": inside(torch.no_grad, False),
    "in inference mode": inside(torch.inference_mode, False),
    "in enable_grad": inside(torch.enable_grad, True),
    "in autocast": inside(partial(torch.autocast, "cpu"), True),
    "seeding": disturbing(lambda: (torch.manual_seed(0), python_random.seed(0), np.random.seed(0))),
    "switching gradients off": disturbing(lambda: torch.set_grad_enabled(False), False),
    "warning": disturbing(lambda: warnings.warn("odd", stacklevel=1)),
    "half": returned(lambda s: s.half(), lambda s: s, 2e-2),
    "bfloat16": returned(lambda s: s.bfloat16(), lambda s: s, 1e-1),
    "double": returned(lambda s: s.double(), lambda s: s),
    "whole numbers": returned(lambda s: (s > 0.4).long(), lambda s: (s > 0.4).astype(float), 0, None),
    "truth": returned(lambda s: s > 0.4, lambda s: (s > 0.4).astype(float), 0, None),
    "bytes": returned(lambda s: (s.abs() * 9).to(torch.uint8), lambda s: np.floor(abs(s) * 9), 0, None),
    "detached": returned(lambda s: s.detach(), lambda s: s, slope=None),
    "a view": returned(lambda s: s[None].expand(2, -1)[1], lambda s: s, 1e-5),
    "a strided view": returned(lambda s: torch.stack([s, -s], 1)[:, 0], lambda s: s, 1e-5),
    "nan": returned(nan_for_some, lambda s: np.where(s > 0.4, np.nan, s), slope=lambda s: (s <= 0.4).astype(float)),
    "infinite": returned(lambda s: torch.full_like(s, -torch.inf), lambda s: np.full_like(s, -np.inf), slope=None),
    "its own gradient": own_backward,
}  # fmt: skip


def wrong(name: str, function: Function) -> OddReward:
    return OddReward(name, function, None, None)


def raising(error: BaseException) -> OddReward:
    def function(images: Any, prompts: Any) -> Any:
        raise error

    return wrong(f"raises {type(error).__name__}", function)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("it can't be said")


class Backwards(torch.autograd.Function):
    """A function whose backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.mean((1, 2, 3))

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        raise ZeroDivisionError("on the way back")


def endless(images: Any, prompts: Any) -> Any:
    return endless(images, prompts)


def pixel(x: Array) -> Array:
    mask = np.zeros_like(x)
    mask[:, 1, 2, 3] = 1
    return mask


def middle(x: Any, prompts: Sequence[str]) -> Any:
    return x[:, 1, 2, 3]


def specials() -> list[OddReward]:
    mean = FORMULAS[0].torch
    found = [
        wrong("None", lambda x, p: None),
        wrong("a number", lambda x, p: 0.5),
        wrong("a list", lambda x, p: mean(x, p).tolist()),
        wrong("a tuple", lambda x, p: (mean(x, p), {"seen": len(p)})),
        wrong("a table", lambda x, p: {"score": mean(x, p)}),
        wrong("NumPy", lambda x, p: mean(x, p).detach().numpy()),
        wrong("text", lambda x, p: "good"),
        wrong("a function", lambda x, p: mean),
        wrong("a generator", lambda x, p: (score for score in mean(x, p))),
        wrong("a module", lambda x, p: torch.nn.Identity()),
        wrong("a column", lambda x, p: mean(x, p)[:, None]),
        wrong("one for all", lambda x, p: mean(x, p).mean()),
        wrong("one too many", lambda x, p: torch.cat([mean(x, p), torch.zeros(1)])),
        wrong("one too few", lambda x, p: mean(x, p)[1:]),
        wrong("nothing", lambda x, p: torch.zeros(0)),
        wrong("the images", lambda x, p: x),
        wrong("a sparse tensor", lambda x, p: mean(x, p).detach().to_sparse()),
        wrong("complex numbers", lambda x, p: mean(x, p).to(torch.complex64)),
        wrong("a tensor that holds nothing", lambda x, p: mean(x, p).to("meta")),
        wrong("an index too far", lambda x, p: x[:, 7].mean((1, 2))),
        wrong("a name that is not there", lambda x, p: undefined(x)),  # type: ignore[name-defined]  # noqa: F821
        wrong("an attribute that is not there", lambda x, p: x.no_such()),
        wrong("its own batch size", lambda x, p: mean(x.reshape(5, 7, -1), p)),
        wrong("without gradients", lambda x, p: mean(x, p).detach().requires_grad_(False).backward()),
        wrong("without end", endless),
        OddReward("a failing way back", lambda x, p: Backwards.apply(x), means, None),  # type: ignore[no-untyped-call]
        OddReward("a pixel of the input", middle, middle, lambda x, p: pixel(x)),
        OddReward(
            "a view of the input, which is then spoilt",
            lambda x, p: (x.detach()[:, 1, 2, 3], x.mul_(1))[0],
            lambda x, p: x[:, 1, 2, 3],
            None,
        ),
        OddReward("negative zero", lambda x, p: -0.0 * mean(x, p), lambda x, p: np.zeros(len(x)), lambda x, p: 0 * x),
        OddReward("a constant", lambda x, p: torch.full((len(x),), 2.5), lambda x, p: np.full(len(x), 2.5), None),
        OddReward(
            "a parameter",
            lambda x, p: torch.nn.Parameter(torch.full((len(x),), 2.5)),
            lambda x, p: np.full(len(x), 2.5),
            lambda x, p: 0 * x,
        ),
        OddReward(
            "a partial function",
            partial(lambda x, p, k: k * mean(x, p), k=3.0),
            lambda x, p: 3 * means(x, p),
            lambda x, p: 3 * spread(np.ones(len(x)), x),
        ),
    ]  # fmt: skip
    errors: list[BaseException] = [
        ValueError("two\nlines"), KeyError("x\x1b[31m"), RuntimeError("shape"), AssertionError(), StopIteration(),
        SystemExit("bye"), SystemExit(0), ZeroDivisionError(), NotImplementedError(), RecursionError("deep"),
        OSError(2, "gone"), UnspeakableError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "odd"),
    ]  # fmt: skip
    return found + [raising(error) for error in errors]


def odd_rewards(seed: int = 0) -> list[OddReward]:
    """Every game with two formulas, and everything special."""
    random = Random(seed)
    return [make(formula, name) for name, make in GAMES.items() for formula in random.sample(FORMULAS, 2)] + specials()
