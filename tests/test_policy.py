"""Methods beside the reward's gradient, in float64: the policy gradient, the KL penalty, Adjoint Matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_gradients import CLEAN, GRIDS, NOISE, Gaussian, Network, T, batch_of, clean_and_noise, relative
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.experimental.retention import Retention
from draftune.methods import (
    DDPO,
    DPOK,
    KL,
    AdjointMatching,
    DirectAlign,
    DraftK,
    DraftLV,
    FlowBPBridge,
    LeapAlign,
    Method,
)
from draftune.models import StableDiffusion
from draftune.sampling.schedule import Prediction, Schedule, Step, ddim_schedule
from helpers.draws import injected, noises
from helpers.errors import mentions, raises
from helpers.pipelines import add_random_lora, build_pipeline

FLOW_LEVELS = [1.0, 0.9, 0.7, 0.45, 0.2, 0.0]


def flow_steps(levels: Sequence[float] = FLOW_LEVELS) -> tuple[Step, ...]:
    return tuple(Step(i, 1 - s, s, 1 - n, n) for i, (s, n) in enumerate(pairwise(levels)))


class RawRewards(DDPO):
    """Without a baseline and a scale, so that the gradient is that of the mean reward itself."""

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        return rewards


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_the_policy_gradient_is_unbiased(fraction: float) -> None:
    """On Gaussian data with a quadratic reward the derivative of the mean reward by mu is known.

    The policy gradient's mean is that derivative divided by the elements of a latent times the random steps.
    """
    schedule, target, data = GRIDS["leading"], 0.5, Gaussian()
    mean, slope = 0.0, 0.0
    mu = float(data.mu.detach())
    for step in schedule.steps:
        p, q, e, f = data.coefficients(step)
        kept = math.sqrt(step.sigma_next**2 - step.ancestral_std**2)
        mean = step.alpha_next * (p * mu + q * mean) + kept * (e * mu + f * mean)
        slope = step.alpha_next * (p + q * slope) + kept * (e + f * slope)
    expected = -2 * (mean - target) * slope

    estimates = []
    for seed in range(400):
        noise = torch.randn(250, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        method = RawRewards(timestep_fraction=fraction)
        batch = batch_of(
            data.denoise, schedule, None, noise, lambda x: -((x - target) ** 2).mean((1, 2, 3)), 10_000 + seed
        )
        data.mu.grad = None
        (losses,) = method.losses_per_step([batch])
        for loss in losses:
            (-loss).backward()
        assert data.mu.grad is not None
        estimates.append(float(data.mu.grad) * noise[0].numel() * len(schedule))
    values = torch.tensor(estimates, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values)))
    assert error < 0.1 * abs(expected)
    assert abs(float(values.mean()) - expected) < 3 * error


def gradient(method: Method, network: Network, base: Network, schedule: Schedule, seed: int = 0) -> Tensor:
    """Of all the losses of one update, downhill."""
    network.zero_grad()

    def through(network: Network):  # type: ignore[no-untyped-def]
        return lambda x, step: schedule.to_prediction(network(x, step.timestep), x, step)

    for losses in method.losses_per_step([batch_of(through(network), schedule, through(base), seed=seed)]):
        for loss in losses:
            loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.fixture
def networks() -> tuple[Network, Network]:
    network, base = Network(), Network()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.9)
    return network, base.requires_grad_(False)


@pytest.mark.parametrize("grid", ["leading", "v"])
def test_dpok_adds_the_divergence_of_every_step(grid: str, networks: tuple[Network, Network]) -> None:
    network, base = networks
    schedule, beta = GRIDS[grid], 0.3
    fresh = noises(len(schedule), NOISE)
    with injected(randn=fresh * 2):
        ours = gradient(DPOK(beta=beta), network, base, schedule) - gradient(DDPO(), network, base, schedule)
    network.zero_grad()
    x = NOISE
    for step in schedule.steps:
        here, there = (
            clean_and_noise(net(x, step.timestep), x, step, schedule.prediction_type) for net in (network, base)
        )
        if step.ancestral_std == 0:
            break
        kept = math.sqrt(step.sigma_next**2 - step.ancestral_std**2)
        one, other = (step.alpha_next * clean + kept * noise for clean, noise in (here, there))
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(one, step.ancestral_std),
            torch.distributions.Normal(other.detach(), step.ancestral_std),
        )
        (beta * divergence.mean() / sum(step.ancestral_std > 0 for step in schedule.steps)).backward()
        x = (one + step.ancestral_std * fresh.pop(0)).detach()
    expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    assert relative(ours, expected) < 1e-9


def test_the_loss_of_the_authors_by_hand() -> None:
    """Every part of the formula: means over elements, steps and images, both clips, and the share of clipped ratios.

    -min(A w, A clip(w)) with A clipped to +-adv_clip_max and w of the mean log-probability, written out for a second
    inner epoch on moved weights, where some ratios are out of their range on either side.
    """
    schedule, clip, adv_clip_max = GRIDS["leading"], 1e-3, 0.9
    noise = torch.randn(6, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    network, rewards = Network(), torch.tensor([3.0, -1.0, 0.5, 0.0, 1.0, -2.0], dtype=torch.float64)
    method = DDPO(inner_epochs=2, clip_range=clip, adv_clip_max=adv_clip_max)

    def denoise(x: Tensor, step: Step) -> Prediction:
        return schedule.to_prediction(network(x, step.timestep), x, step)

    def mean_of(net: Network, x: Tensor, step: Step) -> Tensor:
        clean, eps = clean_and_noise(net(x, step.timestep), x, step, "epsilon")
        return step.alpha_next * clean + math.sqrt(step.sigma_next**2 - step.ancestral_std**2) * eps

    found, fresh = [], noises(len(schedule), noise)
    with injected(randn=fresh):
        for losses in method.losses_per_step([batch_of(denoise, schedule, None, noise, lambda x: rewards)]):
            network.zero_grad()
            for loss in losses:
                loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
            with torch.no_grad():
                network.last.weight.mul_(1.01)

    advantages = ((rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-6)).clamp(-adv_clip_max, adv_clip_max)
    assert (advantages.abs() == adv_clip_max).any()
    before, after, x = Network(), Network(), noise
    with torch.no_grad():
        after.last.weight.mul_(1.01)
        path = []
        for step, z in zip(schedule.steps, fresh, strict=True):
            middle = mean_of(before, x, step)
            following = middle + step.ancestral_std * z
            path.append((step, x, following, middle))
            x = following
    outside = []
    for net, got in zip((before, after), found, strict=True):
        for step, x, following, middle in path:
            old, new = (
                torch.distributions.Normal(m, step.ancestral_std).log_prob(following).mean((1, 2, 3))
                for m in (middle, mean_of(net, x, step))
            )
            ratio = (new - old).exp()
            losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
            (losses.mean() / len(schedule)).backward()
            outside.append(((ratio - 1).abs() > clip).double().mean())
        expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert relative(got, expected) < 1e-9
    share = float(sum(outside) / len(outside))
    assert method.metrics()["clip_fraction"] == pytest.approx(share)
    assert 0.05 < share < 0.45  # the first epoch's are all 1
    assert method.explain_zero_gradient() == ""


def updated(method: DDPO, rewards: Sequence[float], prompts: Sequence[str], moved: float = 0.0) -> float:
    """Run one update's optimizer steps with `rewards` [N] and return the last gradient; mu moves before the second."""
    data, schedule = Gaussian(), GRIDS["leading"]
    noise = torch.randn(len(rewards), 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = batch_of(data.denoise, schedule, None, noise, lambda x: torch.tensor(rewards))
    batch.prompts = batch.all_prompts = prompts
    for losses in method.losses_per_step([batch]):
        data.mu.grad = None
        for loss in losses:
            loss.backward()
        last = data.mu.grad
        data.mu.data += moved
    assert last is not None
    return float(last)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -7.3])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_rewards_give_no_gradient_and_are_named(value: float, count: int) -> None:
    """The mean of equal float32 numbers is not always that number."""
    method = DDPO()
    assert updated(method, [value] * count, ["a"] * count) == 0
    assert mentions(method.explain_zero_gradient(), count, f"{value:g}")


def test_rewards_that_differ_between_prompts_alone_give_no_gradient_and_are_named() -> None:
    method = DDPO(min_count=2)
    assert updated(method, [0.1, 0.1, 0.7, 0.7], ["a", "a", "b", "b"]) == 0
    assert mentions(method.explain_zero_gradient(), "prompt rewards")
    assert updated(method, [0.1, 0.2, 0.7, 0.7], ["a", "a", "b", "b"]) != 0
    assert method.explain_zero_gradient() == ""


def test_ratios_that_are_all_clipped_are_named() -> None:
    """With one image above and one below the average, a jump of the mean puts every ratio on one side or the other."""
    # The rewards are the sign of what the jump makes of the ratio: then no ratio may go on.
    data, schedule = Gaussian(), Schedule((GRIDS["leading"].steps[2],))
    noise = torch.randn(8, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step, jump = schedule.steps[0], 1e-3
    method = DDPO(inner_epochs=2, clip_range=1e-9)

    def reward(x: Tensor) -> Tensor:
        middle = schedule_mean(data, noise, step)
        return (x - middle).flatten().sign()

    gradients = []
    for losses in method.losses_per_step([batch_of(data.denoise, schedule, None, noise, reward)]):
        data.mu.grad = None
        for loss in losses:
            loss.backward()
        assert data.mu.grad is not None
        gradients.append(float(data.mu.grad))
        before = method.explain_zero_gradient()
        data.mu.data += jump * step.ancestral_std
    assert gradients[0] != 0
    assert gradients[1] == 0
    assert "clip_range=1e-09" in before
    assert method.metrics()["clip_fraction"] == 0.5  # none in the first epoch, all in the second


def schedule_mean(data: Gaussian, x: Tensor, step: Step) -> Tensor:
    clean, eps = data.denoise(x, step)
    return (step.alpha_next * clean + math.sqrt(step.sigma_next**2 - step.ancestral_std**2) * eps).detach()


def test_wrappers_pass_on_what_the_method_reports() -> None:
    inner = DDPO()
    updated(inner, [1.0, 1.0], ["a", "a"])
    for around in (KL(inner, 0.1), Retention(inner, 1.0)):
        assert around.metrics() == {"clip_fraction": 0.0}
        assert around.explain_zero_gradient() == inner.explain_zero_gradient() != ""
        assert around.min_images_per_update == 2


def test_a_later_epoch_weighs_by_the_clipped_ratio() -> None:
    """One number, one random step: d loss / d mu by hand before and after mu has moved."""
    step = GRIDS["leading"].steps[2]
    schedule = Schedule((step,))
    data, clip = Gaussian(), 0.02
    p, q, e, f = data.coefficients(step)
    kept = math.sqrt(step.sigma_next**2 - step.ancestral_std**2)
    slope = step.alpha_next * p + kept * e
    noise = torch.randn(6, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    method = RawRewards(inner_epochs=3, clip_range=clip)
    gradients, seen = [], []

    def reward(x: Tensor) -> Tensor:
        seen.append(x.flatten())
        return torch.sin(3 * x).flatten()

    for losses in method.losses_per_step([batch_of(data.denoise, schedule, None, noise, reward)]):
        data.mu.grad = None
        for loss in losses:
            loss.backward()
        assert data.mu.grad is not None
        gradients.append(float(data.mu.grad))
        data.mu.data += 0.2 * step.ancestral_std
    assert len(seen) == 1  # the pictures are scored once

    mu = float(data.mu.detach()) - 3 * 0.2 * step.ancestral_std
    x, advantage = seen[0], torch.sin(3 * seen[0])
    means = [
        step.alpha_next * (p * m + q * noise.flatten()) + kept * (e * m + f * noise.flatten())
        for m in (mu, mu + 0.2 * step.ancestral_std, mu + 0.4 * step.ancestral_std)
    ]
    for got, mean in zip(gradients, means, strict=True):
        ratio = torch.exp(((x - means[0]) ** 2 - (x - mean) ** 2) / (2 * step.ancestral_std**2))
        # Where the clipped ratio is the smaller, nothing is left to gain.
        active = ~(((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip)))
        expected = -(advantage * active * ratio * (x - mean) / step.ancestral_std**2 * slope).mean()
        assert got == pytest.approx(float(expected), rel=1e-9)
    assert gradients[1] != pytest.approx(gradients[0], rel=0.01)


def test_the_policy_gradient_climbs_a_reward_without_a_gradient() -> None:
    """Steps of a quarter with their top at 0.5, from a mean of 0.3 + 2: nothing here can be differentiated."""
    data, schedule = Gaussian(), GRIDS["leading"]
    data.mu.data += 2.0
    optimizer, method = torch.optim.Adam([data.mu], lr=0.05), DDPO()
    means = []

    def reward(x: Tensor) -> Tensor:
        score = -((4 * x.detach().flatten()).round() / 4 - 0.5).abs()
        means.append(float(score.mean()))
        return score

    for i in range(60):
        noise = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for losses in method.losses_per_step([batch_of(data.denoise, schedule, None, noise, reward, i)]):
            optimizer.zero_grad()
            for loss in losses:
                loss.backward()
            optimizer.step()
    assert len(means) == 60
    assert means[0] < -1.5
    assert sum(means[-5:]) / 5 > -0.7  # what the spread of the pictures themselves leaves
    assert abs(float(data.mu.detach()) - 0.5) < 0.3


def test_advantages_are_those_of_the_prompt_once_it_is_known() -> None:
    method = DDPO(min_count=2, buffer_size=3)
    first = method.advantages(["a", "b"], torch.tensor([1.0, 5.0]))
    assert torch.allclose(first, torch.tensor([-1.0, 1.0]), atol=1e-4)  # of the batch, while nothing else is known
    second = method.advantages(["a", "b"], torch.tensor([3.0, 4.0]))
    assert torch.allclose(second, torch.tensor([1.0, -1.0]), atol=1e-4)
    again = DDPO(min_count=2, buffer_size=3)
    again.load_state_dict(method.state_dict())
    for _ in range(2):
        last = again.advantages(["a"], torch.tensor([6.0]))
    assert list(again.rewards["a"]) == [3.0, 6.0, 6.0]  # the oldest has gone
    assert float(last) == pytest.approx(1 / math.sqrt(2), abs=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "method", [DraftK(1), DraftK(3), DraftLV(2), LeapAlign(0.2), FlowBPBridge(3), DirectAlign()], ids=str
)
def test_the_penalty_is_the_distance_from_the_base_at_every_call_with_gradient(
    grid: str, method: Method, networks: tuple[Network, Network]
) -> None:
    network, base = networks
    schedule, beta = GRIDS[grid], 0.7
    ours = gradient(KL(method, beta), network, base, schedule) - gradient(method, network, base, schedule)
    network.zero_grad()
    calls: list[tuple[Tensor, Step]] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        if torch.is_grad_enabled():
            calls.append((x, step))
        return schedule.to_prediction(network(x, step.timestep), x, step)

    penalties = []
    for _ in method.losses([batch_of(denoise, schedule)]):
        pass
    for x, step in calls:
        penalties.append((network(x, step.timestep) - base(x, step.timestep)).square().sum() / NOISE.numel())
    (beta * sum(penalties)).backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    assert relative(ours, expected) < 1e-9


def test_the_penalty_through_a_pipeline(tmp_path: Path) -> None:
    """LoRA, guidance, checkpoints: the base is the network whose LoRA is off, whenever its checkpoints run again."""
    model = StableDiffusion(build_pipeline(tmp_path), "tiny")
    model.pipeline.unet.double()
    model.dtype = torch.float64
    parameters = add_random_lora(model)
    schedule = model.schedule(3)
    noise = model.noise(torch.Generator().manual_seed(0), 2)
    denoise, base = model.denoisers_for(["a", "b"], schedule, 3.0)
    with torch.no_grad():
        plain = build_pipeline(tmp_path / "again").unet.double()
        condition = model.encode(["a", "b"], "", True)
        step = schedule.steps[0]
        negative, positive = plain(torch.cat([noise, noise]), step.timestep, condition).sample.chunk(2)
        wanted = schedule.to_prediction(negative + 3.0 * (positive - negative), noise, step).noise
        assert torch.allclose(base(noise, step).noise, wanted, atol=1e-12)
        assert not torch.allclose(denoise(noise, step).noise, wanted, atol=1e-3)

    def ours(checkpointing: str) -> list[Tensor]:
        model.set_checkpointing(checkpointing)
        model.denoiser.zero_grad()
        batch = batch_of(denoise, schedule, base, noise, lambda x: 0 * x.mean((1, 2, 3)))
        for losses in KL(DraftK(2), 1.0).losses_per_step([batch]):
            for loss in losses:
                loss.backward()
        return [p.grad.clone() for p in parameters.values() if p.grad is not None]

    with torch.no_grad():
        x = noise
        for step in schedule.steps[:1]:
            clean, eps = denoise(x, step)
            x = step.alpha_next * clean + step.sigma_next * eps
    model.set_checkpointing("none")
    model.denoiser.zero_grad()
    penalty = torch.zeros((), dtype=torch.float64)
    plain.requires_grad_(False)
    for step in schedule.steps[1:]:
        clean, eps = denoise(x, step)
        negative, positive = plain(torch.cat([x, x]), step.timestep, condition).sample.chunk(2)
        there = schedule.to_prediction(negative + 3.0 * (positive - negative), x, step).noise
        penalty = penalty + (eps - there).square().mean()
        x = step.alpha_next * clean + step.sigma_next * eps
    penalty.backward()
    expected = [p.grad.clone() for p in parameters.values() if p.grad is not None]
    assert len(expected) == len(parameters)
    for checkpointing in ("denoiser", "blocks", "both", "none"):
        for got, want in zip(ours(checkpointing), expected, strict=True):
            assert relative(got, want) < 1e-9
    assert all(parameter.requires_grad for parameter in parameters.values())


class Tilted:
    """The exact denoiser of Gaussian data with a shift and a slope at every step, which are trained."""

    def __init__(self, steps: Sequence[Step], start: float = 0.0) -> None:
        self.data = Gaussian()
        self.data.mu.requires_grad_(False)
        # The last step is not random and not trained.
        values = [start] * (len(steps) - 1) + [0.0]
        self.shift, self.slope = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for _ in range(2))
        self.steps = steps

    def denoise(self, x: Tensor, step: Step) -> Prediction:
        i = self.steps.index(step)
        clean = self.data.denoise(x, step).clean + self.shift[i] + self.slope[i] * x
        return Prediction(clean, (x - step.alpha * clean) / step.sigma)

    def sampled(self) -> tuple[float, float]:
        """Mean and variance of x_0 as the ancestral sampler draws it, by recursion."""
        mean, variance = 0.0, 1.0
        for i, step in enumerate(self.steps):
            p, q, *_ = self.data.coefficients(step)
            a, b = p * float(self.data.mu) + self.shift[i].item(), q + self.slope[i].item()
            kept = math.sqrt(max(0.0, step.sigma_next**2 - step.ancestral_std**2)) / step.sigma
            gain = step.alpha_next * b + kept * (1 - step.alpha * b)
            mean = (step.alpha_next - kept * step.alpha) * a + gain * mean
            variance = gain**2 * variance + step.ancestral_std**2
        return mean, variance


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_adjoint_matching_ends_at_the_tilted_distribution(scale: float) -> None:
    """r(x) = c x on Gaussian data: p_base exp(scale r) is N(m + scale c v, v), m and v the base sampler's own."""
    steps, c = flow_steps(), 0.8
    base, tuned = Tilted(steps), Tilted(steps, start=0.05)
    method = AdjointMatching(scale, k=len(steps))
    optimizer = torch.optim.Adam([tuned.shift, tuned.slope], lr=0.05)
    schedule = Schedule(steps, "v_prediction")
    for i in range(600):
        noise = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        batch = batch_of(tuned.denoise, schedule, base.denoise, noise, lambda x: c * x.flatten(), seed=1000 + i)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 600)
        optimizer.zero_grad()
        for loss in method.losses([batch]):
            loss.backward()
        optimizer.step()
    mean, variance = base.sampled()
    got_mean, got_variance = tuned.sampled()
    assert got_mean == pytest.approx(mean + scale * c * variance, abs=1e-3)
    assert got_variance == pytest.approx(variance, rel=1e-3)


def test_the_adjoint_gradient_by_hand(networks: tuple[Network, Network]) -> None:
    """The lean adjoint as one product of the base's Jacobians along the path, by autograd through the whole of it."""
    network, base = networks
    schedule, scale = GRIDS["leading"], 3.0
    fresh = noises(T, NOISE)
    with injected(randn=fresh):
        ours = gradient(AdjointMatching(scale, k=T), network, base, schedule)
    from test_gradients import reward

    def mean(net: Network, x: Tensor, step: Step) -> Tensor:
        clean, noise = clean_and_noise(net(x, step.timestep), x, step, "epsilon")
        return step.alpha_next * clean + math.sqrt(step.sigma_next**2 - step.ancestral_std**2) * noise

    path = [NOISE]
    with torch.no_grad():
        for step, z in zip(schedule.steps, fresh, strict=True):
            path.append(mean(network, path[-1], step) + step.ancestral_std * z)
    network.zero_grad()
    for i, step in enumerate(schedule.steps):
        # x_0 as a function of the state after step i, along the base's steps, through the very states of the path.
        following = path[i + 1].clone().requires_grad_()
        x = following
        for there, later in zip(schedule.steps[i + 1 :], path[i + 2 :], strict=True):
            x = mean(base, x, there)
            x = x + (later - x).detach()
        (adjoint,) = torch.autograd.grad(-scale * reward(x).sum(), following)
        shift = mean(network, path[i], step) - mean(base, path[i], step).detach()
        ((shift / step.ancestral_std + step.ancestral_std * adjoint) ** 2 / 2).sum((1, 2, 3)).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert relative(ours, expected) < 1e-10


def test_halves_takes_its_steps_from_both_parts_of_the_trajectory() -> None:
    """k // 2 of the first 60 %, the others of the rest, each step of a part alike: the authors' choice of steps."""
    schedule, generator, count = ddim_schedule(CLEAN, 20), torch.Generator().manual_seed(0), 3000
    random = [i for i, step in enumerate(schedule.steps) if step.ancestral_std]
    method, drawn = AdjointMatching(k=5, choice="halves"), torch.zeros(20)
    for _ in range(count):
        steps = method.sample_steps(schedule, generator)
        assert (len(steps), sum(i < 12 for i in steps)) == (5, 2)
        drawn[sorted(steps)] += 1
    late = [i for i in random if i >= 12]
    expected = torch.tensor([2 / 12 if i < 12 else 3 / len(late) * (i in late) for i in range(20)])
    assert ((drawn / count - expected).abs() <= 3.5 * (expected * (1 - expected) / count).sqrt()).all()
    with raises(DraftuneError, "choice adjoint_matching 'half' 'halves'"):
        AdjointMatching(choice="half")
