"""Flow-GRPO in float64: the SDE of the authors and its moments, their loss by hand, unbiasedness."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from test_gradients import GRIDS, Gaussian, Network, S, batch_of, relative
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods import DDPO, Batch, FlowGRPO, MixGRPO
from draftune.methods.flow_grpo import sde_mean, sde_std
from draftune.methods.policy_gradient import PolicyGradient
from draftune.sampling.ancestral import ancestral_rollout
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Prediction, Schedule, Step
from draftune.sampling.step_range import StepRange
from helpers.draws import injected, noises
from helpers.errors import raises

LEVELS = [1.0, 0.9, 0.7, 0.45, 0.2, 0.0]


def flow(levels: list[float]) -> Schedule:
    return Schedule(tuple(Step(i, 1 - s, s, 1 - n, n) for i, (s, n) in enumerate(pairwise(levels))), "flow")


def even(steps: int) -> Schedule:
    return flow([1 - i / steps for i in range(steps + 1)])


FLOW = flow(LEVELS)
FRESH = torch.Generator().manual_seed(5)


def authors_step(
    v: Tensor, x: Tensor, sigma: float, following: float, second: float, level: float
) -> tuple[Tensor, float]:
    """sde_step_with_logprob of flow_grpo: the mean of the next latent, and the noise's standard deviation."""
    dt = following - sigma
    std = math.sqrt(sigma / (1 - (second if sigma == 1 else sigma))) * level
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * math.sqrt(-dt)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("level", [0.7, 1.0, 1.4])
def test_a_step_is_that_of_the_authors(index: int, level: float) -> None:
    x, v = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=FRESH)
    policy = FlowGRPO(noise_level=level).policy(FLOW)
    step = policy.steps[index]
    expected, std = authors_step(v, x, step.sigma, step.sigma_next, LEVELS[1], level)
    assert step.ancestral_std == pytest.approx(std, rel=1e-12)
    found = FlowGRPO().mean(FLOW.to_prediction(v, x, step), step, FLOW)
    assert torch.allclose(found, expected, atol=1e-12)
    # The sampler's own mean is another one.
    assert not torch.allclose(
        found, rollout(lambda x, s: FLOW.to_prediction(v, x, s), [FLOW.steps[index]], x), atol=1e-3
    )


def test_the_last_step_is_deterministic() -> None:
    last = FlowGRPO().policy(FLOW).steps[-1]
    assert last.ancestral_std == 0
    v = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert torch.equal(sde_mean(FLOW.to_prediction(v, 3 * v, last), last), 3 * v - last.sigma * v)
    assert list(FlowGRPO().steps_with_gradient(FLOW)) == [0, 1, 2, 3]


def moments(schedule: Schedule, noise_level: float) -> list[tuple[float, float]]:
    """Mean and variance of the latent after each step for Gaussian data, by recursion: each step is affine in x."""
    data, mean, variance, found = Gaussian(), 0.0, 1.0, []
    mu = float(data.mu.detach())
    for step in schedule.steps:
        p, q, e, f = data.coefficients(step)
        std = sde_std(step, noise_level, "flow")
        kept = step.sigma_next - std**2 / (2 * step.sigma)
        slope = step.alpha_next * q + kept * f
        mean = step.alpha_next * p * mu + kept * e * mu + slope * mean
        variance = slope**2 * variance + std**2
        found.append((mean, variance))
    return found


def path_of(schedule: Schedule, noise_level: float, count: int, seed: int) -> list[Tensor]:
    """The latents of the sampler after each step."""
    generator = torch.Generator().manual_seed(seed)
    method, data = FlowGRPO(noise_level=noise_level), Gaussian()

    def randn_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    def mean(prediction: Prediction, step: Step) -> Tensor:
        return method.mean(prediction, step, schedule)

    noise = randn_like(torch.zeros(count, 1, 1, 1, dtype=torch.float64))
    with torch.no_grad():
        policy = method.policy(schedule)
        return [x.flatten() for *_, x in ancestral_rollout(data.denoise, policy, noise, randn_like, mean)]


def within(values: Tensor, mean: float, variance: float) -> bool:
    """Whether mean and variance of Gaussian values are these within three standard errors."""
    count = len(values)
    near = abs(float(values.mean()) - mean) < 3 * math.sqrt(variance / count)
    return near and abs(float(values.var()) - variance) < 3 * variance * math.sqrt(2 / count)


@pytest.mark.parametrize("noise_level", [0.7, 1.2])
def test_the_sampler_has_the_moments_of_its_steps(noise_level: float) -> None:
    paths = path_of(FLOW, noise_level, 100_000, 0)
    for values, (mean, variance) in zip(paths, moments(FLOW, noise_level), strict=True):
        assert within(values, mean, variance)


@pytest.mark.parametrize("noise_level", [0.7, 1.2])
def test_the_sde_has_the_marginals_of_the_flow(noise_level: float) -> None:
    """N(alpha mu, alpha^2 S^2 + sigma^2) at every level: of the samples at 200 steps, in the limit of many steps."""
    schedule, mu = even(200), float(Gaussian().mu.detach())
    for i in (49, 99, 149, 199):
        step = schedule.steps[i]
        expected = step.alpha_next * mu, step.alpha_next**2 * S**2 + step.sigma_next**2
        assert within(path_of(schedule, noise_level, 4000, 1)[i], *expected)
    errors = []
    for steps in (100, 200, 400):
        found = moments(even(steps), noise_level)
        (middle, variance), (last, last_variance) = found[steps // 2 - 1], found[-1]
        assert (middle, last) == pytest.approx((mu / 2, mu))
        assert last_variance == pytest.approx(S**2, rel=0.007)
        errors.append(abs(variance - (S**2 + 1) / 4))
    assert errors[2] < 0.006
    for more, fewer in pairwise(errors):
        assert fewer < 0.75 * more


class RawRewards(FlowGRPO):
    """Without a baseline and a scale, so that the gradient is that of the mean reward itself."""

    def update_advantages(self, batches: list[Batch], rewards: Tensor) -> Tensor:  # type: ignore[override]
        return rewards


@pytest.mark.parametrize(("window", "updates"), [(None, 0), (2, 1)])
def test_the_policy_gradient_is_unbiased(window: int | None, updates: int) -> None:
    """The derivative of the mean reward by mu through the random steps is known for a quadratic reward.

    It is the sum over the trained steps of what mu adds in that step to the mean of the image.
    """
    data, target = Gaussian(), 0.5
    mu = float(data.mu.detach())
    method = RawRewards(beta=0.0, window=window, window_updates=1)
    method.updates = updates
    random = range(4) if window is None else range(updates, updates + window)
    mean, slope = 0.0, 0.0
    for i, step in enumerate(FLOW.steps):
        p, q, e, f = data.coefficients(step)
        std = sde_std(step, method.noise_level, "flow") if i in random else 0.0
        kept = step.sigma_next - std**2 / (2 * step.sigma)
        added = step.alpha_next * p + kept * e
        mean = added * mu + (step.alpha_next * q + kept * f) * mean
        slope = (added if i in random else 0.0) + (step.alpha_next * q + kept * f) * slope
    expected = -2 * (mean - target) * slope

    estimates = []
    for seed in range(400):
        noise = torch.randn(250, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        method.updates = updates
        batch = batch_of(data.denoise, FLOW, None, noise, lambda x: -((x - target) ** 2).mean((1, 2, 3)), 10_000 + seed)
        data.mu.grad = None
        (losses,) = method.losses_per_step([batch])
        for loss in losses:
            (-loss).backward()
        assert data.mu.grad is not None
        estimates.append(float(data.mu.grad) * noise[0].numel() * len(random))
    values = torch.tensor(estimates, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values)))
    assert error < 0.1 * abs(expected)
    assert abs(float(values.mean()) - expected) < 3 * error


def gradients(method: PolicyGradient, batch: Batch, network: Network) -> list[Tensor]:
    """The gradient of each optimizer step; the weights grow by a hundredth before the next."""
    found = []
    for losses in method.losses_per_step([batch]):
        network.zero_grad()
        for loss in losses:
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        with torch.no_grad():
            network.last.weight.mul_(1.01)
    return found


@pytest.mark.parametrize("spread", ["update", "group"])
def test_the_loss_of_the_authors_by_hand(spread: str) -> None:
    """Means over elements, steps and images, both clips, groups of 3, and the divergence of the paper.

    For a second inner epoch on moved weights, where some ratios are out of their range on either side.
    """
    clip, bound, beta, level = 1e-4, 1.1, 0.3, 0.7
    noise = torch.randn(6, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    rewards = torch.tensor([3.0, -1.0, 0.5, 0.0, 1.0, -2.0], dtype=torch.float64)
    network, base = Network(), Network().requires_grad_(False)
    with torch.no_grad():
        base.last.weight.mul_(0.97)

    def through(net: Network):  # type: ignore[no-untyped-def]
        return lambda x, step: FLOW.to_prediction(net(x, step.timestep), x, step)

    method = FlowGRPO(inner_epochs=2, clip_range=clip, adv_clip_max=bound, beta=beta, noise_level=level, spread=spread)
    fresh = noises(len(FLOW), noise)
    batch = batch_of(through(network), FLOW, through(base), noise, lambda x: rewards)
    batch.images_per_prompt = 3
    with injected(randn=fresh):
        found = gradients(method, batch, network)

    groups = rewards.view(2, 3)
    std = groups.std(1, unbiased=False, keepdim=True) if spread == "group" else rewards.std(unbiased=False)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (std + 1e-4)).flatten().clamp(-bound, bound)
    assert (advantages.abs() == bound).any()
    before, after, x = Network(), Network(), noise
    path = []
    with torch.no_grad():
        after.last.weight.mul_(1.01)
        for step, z in zip(FLOW.steps[:4], fresh, strict=False):
            middle, std_dev = authors_step(before(x, step.timestep), x, step.sigma, step.sigma_next, LEVELS[1], level)
            path.append((step, x, middle + std_dev * z, middle, std_dev))
            x = path[-1][2]
    outside = []
    for net, got in zip((before, after), found, strict=True):
        for step, x, following, middle, std_dev in path:
            new, _ = authors_step(net(x, step.timestep), x, step.sigma, step.sigma_next, LEVELS[1], level)
            other, _ = authors_step(base(x, step.timestep), x, step.sigma, step.sigma_next, LEVELS[1], level)
            now, then = (torch.distributions.Normal(m, std_dev) for m in (new, middle))
            ratio = (now.log_prob(following) - then.log_prob(following)).mean((1, 2, 3)).exp()
            losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
            divergence = torch.distributions.kl_divergence(now, torch.distributions.Normal(other, std_dev))
            ((losses.mean() + beta * divergence.mean()) / 4).backward()
            outside.append(((ratio - 1).abs() > clip).double().mean())
        expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert relative(got, expected) < 1e-9
    assert method.metrics()["clip_fraction"] == pytest.approx(float(sum(outside) / len(outside)))
    assert sum(outside) > 0


@pytest.mark.parametrize("grid", ["leading", "v"])
def test_for_a_diffusion_model_it_samples_as_ddpo_at_noise_level_one(grid: str) -> None:
    class Plain(DDPO):
        def update_advantages(self, batches: list[Batch], rewards: Tensor) -> Tensor:  # type: ignore[override]
            return rewards

    network, schedule = Network(), GRIDS[grid]
    noise = torch.randn(4, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(method: PolicyGradient) -> Tensor:
        network.zero_grad()
        batch = batch_of(lambda x, s: schedule.to_prediction(network(x, s.timestep), x, s), schedule, noise=noise)
        (losses,) = method.losses_per_step([batch])
        for loss in losses:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    ddpo = gradient(Plain())
    assert relative(gradient(RawRewards(beta=0.0, noise_level=1.0)), ddpo) < 1e-12
    assert relative(gradient(RawRewards(beta=0.0, noise_level=0.5)), ddpo) > 1e-2


def test_settings_out_of_range_are_refused() -> None:
    for values, words in (
        ({"noise_level": 0.0}, "noise_level 0"),
        ({"spread": "prompt"}, "spread flow_grpo 'prompt' 'group'"),
        ({"window": 0}, "window 1 0"),
        ({"window_updates": 0}, "window_updates 1 0"),
        ({"window_stride": 0}, "window_stride 1 0"),
        ({"window_order": "rising"}, "window_order 'rising' 'random'"),
        ({"adv_clip_max": 0.0}, "adv_clip_max 0"),
        ({"beta": -1.0}, "beta -1"),
    ):
        with raises(DraftuneError, words):
            FlowGRPO(**values)  # type: ignore[arg-type]
    FlowGRPO(noise_level=1.4).check(FLOW)
    with raises(DraftuneError, "noise_level 1 1.4"):
        FlowGRPO(noise_level=1.4).check(GRIDS["clean"])
    with raises(DraftuneError, "window 4 5"):
        MixGRPO(window=5).check(FLOW)
    with raises(DraftuneError, "window 2 3"):
        MixGRPO(window=3).check(StepRange.parse("0.4-0.8").mark(FLOW))
