"""Samplers guided by the gradient of a score. They know no model and no reward.

- `guided_sample`: PGDiff (Yang et al., 2023, arXiv:2309.10810). After each step, move the latent along the gradient at
  the predicted x_0. The gradient does not flow through the network.
- `posterior_guidance`, `iterative_guidance`: Gradient Guidance (Guo et al., 2024, arXiv:2404.14743). Sample conditioned
  on a value of the linearized score, in rounds. The gradient flows through one call of the network at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from draftune.sampling.sampler import Denoiser, ddim_step
from draftune.sampling.schedule import Prediction, Step

GradientFn = Callable[[Tensor], Tensor]
"""Compute the gradients [B, ...] of each sample's own score at clean latents [B, ...]."""
NoiseFn = Callable[[], Tensor]
"""Sample new noise [B, ...] from N(0, I)."""
UpdateRule = Callable[[Tensor, Tensor, Step], Tensor]
"""Compute the guidance update [B, ...] from the change that a step made [B, ...], the gradient [B, ...], the step."""

REPEATED = 0.3
"""Fraction of the steps, the noisiest ones, that `repeats` applies to: T to 0.7 T in PGDiff."""


def dynamic_scale(strength: float, per_channel: bool = False) -> UpdateRule:
    """Return PGDiff's dynamic guidance: an update with `strength` times the norm of the step's own change.

        update = strength * |x_t - x_s| * g / |g|

    A strength then has the same meaning for every reward, whatever its units. The update is 0 where g is.

    Args:
        strength: Length of the update relative to the step.
        per_channel: Use the norms of each channel instead of those of the whole sample.
    """

    def rule(move: Tensor, gradient: Tensor, step: Step) -> Tensor:
        start = 2 if per_channel else 1
        length = norm(gradient, start)
        return strength * norm(move, start) * torch.where(length > 0, gradient / length, 0.0)

    return rule


def variance_scale(strength: float) -> UpdateRule:
    """Return the update of classifier guidance, `strength` times the posterior variance times the gradient.

        update = strength * tau^2 * g

    This is PGDiff's static guidance and shifts the mean of the ancestral step. A strength has the unit 1 / score. A
    variance learned by the model is not used.
    """
    return lambda move, gradient, step: strength * step.ancestral_std**2 * gradient


def guided_sample(
    denoise: Denoiser,
    steps: Sequence[Step],
    x: Tensor,
    gradient_fn: GradientFn,
    rule: UpdateRule,
    noise_fn: NoiseFn,
    eta: float = 1.0,
    repeats: int = 1,
) -> Tensor:
    """Sample with a guidance update after each step, computed from the gradient at the predicted x_0 (PGDiff).

    Args:
        x: Initial noise [B, ...].
        eta: Noise of a step relative to the ancestral sampler: 0 is DDIM (Euler for flow models), 1 is PGDiff's.
        repeats: Number of times each of the first 30% of the steps is run (N in PGDiff). Each repetition starts from
            the previous result; no noise is added back.

    Returns:
        The latents [B, ...] after the last step.
    """
    for i, step in enumerate(steps):
        for _ in range(repeats if i < REPEATED * len(steps) else 1):
            with torch.no_grad():
                prediction = denoise(x, step)
                following = ddim_step_eta(prediction, step, noise_fn, eta)
            x = following + rule(x - following, gradient_fn(prediction.clean), step)
    return x


def posterior_guidance(denoise: Denoiser, direction: Tensor, target: Tensor, sigma: float = 0.1) -> Denoiser:
    """Return the denoiser conditioned on <direction, x_0> + N(0, sigma^2) = target.

        score += alpha^2 (y - <g, x_0(x)>) v / (alpha^2 sigma^2 + h (alpha^2 + h) |v|^2)

    g is the direction, y the target, h = sigma_t^2 the noise variance, and v = grad_x <g, x_0(x)>. This is exact if
    clean latents are Gaussian with a projection as their covariance. The published formula (Guo et al., 2024,
    arXiv:2404.14743) lacks the factor alpha^2 + h, which is 1 for diffusion models but not for flow models.

    Args:
        direction: g [B, ...].
        target: y [B].
        sigma: Standard deviation of the condition, in the units of the target.
    """

    def call(x: Tensor, step: Step) -> Prediction:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            clean, noise = denoise(x, step)
            value = dot(direction, clean)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        alpha, h = step.alpha, step.sigma**2
        variance = (alpha * sigma) ** 2 + h * (alpha**2 + h) * norm(gradient).square()
        gap = (target - value.detach()).reshape(variance.shape)
        score = alpha * gap * gradient / variance.clamp(min=torch.finfo(variance.dtype).tiny)
        return Prediction(clean.detach() + h * score, noise.detach() - step.sigma * alpha * score)

    return call


def iterative_guidance(
    denoise: Denoiser,
    steps: Sequence[Step],
    gradient_fn: GradientFn,
    noise_fn: NoiseFn,
    rounds: int,
    target_increase: float = 0.2,
    sigma: float = 0.1,
    eta: float = 1.0,
    resample_noise: bool = True,
    initial_scale: float = 1.0,
) -> Iterator[Tensor]:
    """Sample in rounds, each conditioned on a higher linearized score (Gradient Guidance, Algorithm 1).

    A round linearizes the score at the previous round's latents, each with its own gradient. It then samples latents
    whose linearized score is higher by `target_increase`. The rounds converge to the maximum of

        score - sigma^2 / (2 target_increase) * (squared distance to the model's mean in the model's own metric)

    Guo et al., 2024, arXiv:2404.14743. The ratio target_increase / sigma^2 limits how far the samples move.

    Args:
        resample_noise: Start each round from new noise, as published, instead of the first round's noise.
        initial_scale: Factor of the initial noise, that of the schedule.

    Yields:
        The clean latents [B, ...] without guidance, then those of each round.
    """
    noise = initial_scale * noise_fn()
    x = sample_eta(denoise, steps, noise, noise_fn, eta)
    yield x
    for _ in range(rounds):
        gradient = gradient_fn(x)
        guided = posterior_guidance(denoise, gradient, dot(gradient, x) + target_increase, sigma)
        noise = initial_scale * noise_fn() if resample_noise else noise
        x = sample_eta(guided, steps, noise, noise_fn, eta)
        yield x


@torch.no_grad()
def sample_eta(denoise: Denoiser, steps: Sequence[Step], x: Tensor, noise_fn: NoiseFn, eta: float) -> Tensor:
    """Run `steps` from `x` and return the latents after them, both [B, ...]."""
    for step in steps:
        x = ddim_step_eta(denoise(x, step), step, noise_fn, eta)
    return x


def ddim_step_eta(prediction: Prediction, step: Step, noise_fn: NoiseFn, eta: float) -> Tensor:
    """Take one DDIM step with noise of standard deviation eta * tau (Song et al., 2020, arXiv:2010.02502, Eq. 16)."""
    tau = eta * step.ancestral_std
    following = ddim_step(prediction, step, tau)
    return following + tau * noise_fn() if tau else following


def norm(x: Tensor, start: int = 1) -> Tensor:
    """Compute the norms over the dimensions from `start` on, with these dimensions retained at size 1."""
    return torch.linalg.vector_norm(x, dim=tuple(range(start, x.dim())), keepdim=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product [B] of each pair of samples."""
    return (a * b).flatten(1).sum(1)
