"""Guiding pictures by a reward while they are drawn; nothing is trained.

Partial guidance (PGDiff; Yang et al., arXiv 2309.10810) pulls the latents after every step along the score's gradient
at the clean latent, never through the network. Look-ahead guidance (Gradient Guidance; Guo et al., arXiv 2404.14743)
draws given a value of the linearised score, through one call of the network, in rounds. No model or reward is known
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from draftune.sampling.sampler import Denoiser, advance
from draftune.sampling.schedule import Prediction, Step

Uphill = Callable[[Tensor], Tensor]
"""Clean latents [B, …] to the gradient [B, …] of each one's own score."""
Fresh = Callable[[], Tensor]
"""Standard normal numbers [B, …], others at every call."""
Pull = Callable[[Tensor, Tensor, Step], Tensor]
"""The move [B, …] that a step made, and the gradient, to how far the gradient moves the latents besides."""

REPEATED = 0.3
"""The share of the steps, the noisiest, that are made several times where repetition is asked for: T to 0.7 T."""


def by_ratio(strength: float, per_channel: bool = False) -> Pull:
    """PGDiff's dynamic scale: a move uphill of `strength` times the norm of the step's own move.

    So a strength means the same for every reward, whatever its units. The norms are those of a picture, or of each of
    its channels. Where there is no gradient there is no move.
    """

    def pull(move: Tensor, gradient: Tensor, step: Step) -> Tensor:
        start = 2 if per_channel else 1
        length = norm(gradient, start)
        return strength * norm(move, start) * torch.where(length > 0, gradient / length, 0.0)

    return pull


def by_variance(strength: float) -> Pull:
    """PGDiff's static scale: `strength` times the variance of the ancestral step times the gradient.

    It moves the step's mean as classifier guidance does, so a strength is in units of one over the score. The variance
    is the posterior's; one that a model has learned is not used.
    """
    return lambda move, gradient, step: strength * step.tau**2 * gradient


def pulled(
    denoise: Denoiser,
    steps: Sequence[Step],
    x: Tensor,
    uphill: Uphill,
    pull: Pull,
    fresh: Fresh,
    eta: float = 1.0,
    repeats: int = 1,
) -> Tensor:
    """The latents [B, …] after `steps` from `x`, each step followed by a pull along the gradient at the clean latent.

    eta: how much of the ancestral sampler's noise a step has, 0 (DDIM; Euler for flow models) to 1 (PGDiff's).
    repeats: how often each of the noisiest steps is made, its result taken for the latent before it, without noise
    added back (PGDiff's N).
    """
    for i, step in enumerate(steps):
        for _ in range(repeats if i < REPEATED * len(steps) else 1):
            with torch.no_grad():
                prediction = denoise(x, step)
                following = stepped(prediction, step, fresh, eta)
            x = following + pull(x - following, uphill(prediction.clean), step)
    return x


def look_ahead(denoise: Denoiser, direction: Tensor, target: Tensor, sigma: float = 0.1) -> Denoiser:
    """The network given that <direction, x_0>, seen with Gaussian noise of `sigma`, is `target`.

    direction [B, …], target [B]; sigma in the units of the target. With y the target, g the direction, h the variance
    of the noise and v = grad_x <g, x_0(x)>, the score function gains
    alpha^2 (y - <g, x_0(x)>) v / (alpha^2 sigma^2 + h (alpha^2 + h) |v|^2). Exact where clean latents are Gaussian with
    a projection for their covariance. The published formula lacks alpha^2 + h, which is 1 for diffusion models; flow
    models want it.
    """

    def call(x: Tensor, step: Step) -> Prediction:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            clean, noise = denoise(x, step)
            seen = dot(direction, clean)
            (slope,) = torch.autograd.grad(seen.sum(), x)
        alpha, h = step.alpha, step.sigma**2
        spread = (alpha * sigma) ** 2 + h * (alpha**2 + h) * norm(slope).square()
        gap = (target - seen.detach()).reshape(spread.shape)
        push = alpha * gap * slope / spread.clamp(min=torch.finfo(spread.dtype).tiny)
        return Prediction(clean.detach() + h * push, noise.detach() - step.sigma * alpha * push)

    return call


def rounds_ahead(
    denoise: Denoiser,
    steps: Sequence[Step],
    uphill: Uphill,
    fresh: Fresh,
    rounds: int,
    rise: float = 0.2,
    sigma: float = 0.1,
    eta: float = 1.0,
    anew: bool = True,
) -> Iterator[Tensor]:
    """Clean latents [B, …]: those without guidance, then those of each round, `anew` from fresh noise or from the same.

    A round linearises the score at the last round's latents and draws ones whose linearised score is higher by `rise`
    (Algorithm 1, each latent by its own gradient). It settles where the score less sigma^2 / (2 rise) times the squared
    distance to the model's mean, in the model's own metric, is highest: rise / sigma^2 says how far it goes, and no
    number of rounds goes farther.
    """
    noise = fresh()
    x = drawn(denoise, steps, noise, fresh, eta)
    yield x
    for _ in range(rounds):
        gradient = uphill(x)
        guided = look_ahead(denoise, gradient, dot(gradient, x) + rise, sigma)
        x = drawn(guided, steps, fresh() if anew else noise, fresh, eta)
        yield x


@torch.no_grad()
def drawn(denoise: Denoiser, steps: Sequence[Step], x: Tensor, fresh: Fresh, eta: float) -> Tensor:
    """The latents after `steps` from `x`."""
    for step in steps:
        x = stepped(denoise(x, step), step, fresh, eta)
    return x


def stepped(prediction: Prediction, step: Step, fresh: Fresh, eta: float) -> Tensor:
    """One step with `eta` of the ancestral sampler's noise."""
    tau = eta * step.tau
    following = advance(prediction, step, tau)
    return following + tau * fresh() if tau else following


def norm(x: Tensor, start: int = 1) -> Tensor:
    """Of each picture, or with start 2 of each of its channels, in a shape that multiplies `x`."""
    return torch.linalg.vector_norm(x, dim=tuple(range(start, x.dim())), keepdim=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each picture's own two, [B]."""
    return (a * b).flatten(1).sum(1)
