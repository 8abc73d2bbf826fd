"""DiffusionNFT in float64: the authors' formula by hand, its direction on Gaussian data, and the old LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from test_gradients import GRIDS, Gaussian, Network, batch_of, clean_and_noise, relative
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods import Batch, DiffusionNFT
from draftune.methods import diffusion_nft as module
from draftune.sampling.sampler import Denoiser, rollout
from draftune.sampling.schedule import Prediction, Schedule, Step
from helpers.climbing import check_it_climbs
from helpers.draws import injected, noises
from helpers.errors import raises

LEVELS = [1.0, 0.9, 0.7, 0.45, 0.2, 0.0]
FLOW = Schedule(tuple(Step(i, 1 - s, s, 1 - n, n) for i, (s, n) in enumerate(pairwise(LEVELS))), "flow")
REWARDS = torch.tensor([3.0, -1.0, 0.5, 0.0, 1.0, -2.0], dtype=torch.float64)


def through(network: Network, schedule: Schedule) -> Denoiser:
    return lambda x, step: schedule.to_prediction(network(x, step.timestep), x, step)


def scaled(factor: float) -> Network:
    network = Network()
    with torch.no_grad():
        network.last.weight.mul_(factor)
    return network


def group_batch(network: Network, base: Network, schedule: Schedule, rewards: Callable[[Tensor], Tensor]) -> Batch:
    noise = torch.randn(6, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    batch = batch_of(through(network, schedule), schedule, through(base, schedule), noise, rewards)
    batch.images_per_prompt, batch.parameters = 3, dict(network.named_parameters())
    return batch


def authors_loss(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor,
    xt: Tensor,
    x0: Tensor,
    t: float,
    r: Tensor,
    beta: float,
    bound: float,
    kl: float,
) -> Tensor:
    """The loss of one timestep in train_nft_sd3.py, of velocities."""
    axes = (1, 2, 3)
    terms = []
    for prediction in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
        x0_prediction = xt - t * prediction
        weight = (x0_prediction - x0).detach().abs().mean(axes, keepdim=True).clip(min=0.00001)
        terms.append(((x0_prediction - x0) ** 2 / weight).mean(axes))
    policy = r * terms[0] / beta + (1 - r) * terms[1] / beta
    return (policy * bound).mean() + kl * ((v - v_ref) ** 2).mean()


@pytest.mark.parametrize("kl", [0.0, 0.2])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_loss_of_the_authors_by_hand(beta: float, kl: float) -> None:
    """With an old LoRA of its own, which samples the images, in the second of two optimizer steps."""
    bound, old = 1.1, scaled(0.95)
    network, base = scaled(0.95), scaled(0.8).requires_grad_(False)
    method = DiffusionNFT(beta=beta, kl_weight=kl, adv_clip_max=bound, inner_epochs=2)
    batch = group_batch(network, base, FLOW, lambda x: REWARDS)
    fresh = noises(2 * len(FLOW), batch.noise)
    found = []
    with injected(randn=fresh):
        for losses in method.losses_per_step([batch]):
            network.zero_grad()
            for loss in losses:
                loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
            with torch.no_grad():
                network.last.weight.mul_(1.1)

    groups = REWARDS.view(2, 3)
    advantages = (groups - groups.mean(1, keepdim=True)) / (REWARDS.std(unbiased=False) + 1e-4)
    r = (advantages.flatten().clamp(-bound, bound) / bound) / 2 + 0.5
    assert r.min() == 0
    with torch.no_grad():
        x0 = rollout(through(old, FLOW), FLOW.steps, batch.noise)
    for i, net in enumerate((scaled(0.95), scaled(0.95 * 1.1))):
        for step, noise in zip(FLOW.steps, fresh[5 * i : 5 * i + 5], strict=True):
            xt, t = (1 - step.sigma) * x0 + step.sigma * noise, step.timestep
            v, v_old, v_ref = net(xt, t), old(xt, t).detach(), base(xt, t)
            (authors_loss(v, v_old, v_ref, xt, x0, step.sigma, r, beta, bound, kl) / 5).backward()
        expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert relative(found[i], expected) < 1e-9
    assert torch.equal(network.last.weight, (0.95 * Network().last.weight) * 1.1 * 1.1)


@pytest.mark.parametrize("grid", GRIDS)
def test_other_prediction_types_mix_their_own_outputs(grid: str) -> None:
    """Mixing the outputs of the network, as the authors mix velocities, is mixing the predicted images."""
    schedule, beta, old = GRIDS[grid], 0.3, Network()
    network, base = Network(), Network().requires_grad_(False)
    method = DiffusionNFT(beta=beta, kl_weight=0.0)
    method.old.start(dict(network.named_parameters()))
    with torch.no_grad():
        network.last.weight.mul_(1.1)
    batch = group_batch(network, base, schedule, lambda x: REWARDS)
    fresh = noises(len(schedule), batch.noise)
    with injected(randn=fresh):
        for losses in method.losses_per_step([batch]):
            for loss in losses:
                loss.backward()
    found = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    network.zero_grad()
    groups = REWARDS.view(2, 3)
    r = ((groups - groups.mean(1, keepdim=True)) / (REWARDS.std(unbiased=False) + 1e-4)).flatten() / 10 + 0.5
    with torch.no_grad():
        x0 = rollout(through(old, schedule), schedule.steps, batch.noise)
    for step, noise in zip(schedule.steps, fresh, strict=True):
        xt = step.alpha * x0 + step.sigma * noise
        output, before = network(xt, step.timestep), old(xt, step.timestep).detach()
        terms = []
        for mixed in (beta * output + (1 - beta) * before, (1 + beta) * before - beta * output):
            error = clean_and_noise(mixed, xt, step, schedule.prediction_type)[0] - x0
            terms.append(error.square().mean((1, 2, 3)) / error.detach().abs().mean((1, 2, 3)))
        ((r * terms[0] + (1 - r) * terms[1]).mean() * 5 / beta / len(schedule)).backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    assert relative(found, expected) < 1e-9


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_the_direction_is_that_of_the_theory(monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    """On Gaussian data with R = 1/2 + c x_0, of latents of one element, the mean gradient by mu has a closed form.

    d loss / d mu = 10 p E[(2 R - 1) sign(x_hat - x_0)] at each step, with x_hat = p mu + q x_t the old prediction and
    u = x_hat - x_0 = p (mu - x_0) + q sigma eps. By Stein, E[x_0 sign(u)] = E[x_0] E[sign(u)] + 2 f(0) cov(x_0, u),
    with f the density of u.
    """
    c, data = 0.05, Gaussian()
    monkeypatch.setattr(module, "group_advantages", lambda rewards, *_: 10 * rewards)  # so that R = 1/2 + reward
    mu = float(data.mu.detach())
    shift, slope = 0.0, 1.0
    for step in FLOW.steps:
        p, q, e, f = data.coefficients(step)
        kept = step.alpha_next * q + step.sigma_next * f
        shift, slope = (step.alpha_next * p + step.sigma_next * e) * mu + kept * shift, kept * slope
    expected = 0.0
    for step in FLOW.steps:
        p, q, _, _ = data.coefficients(step)
        center, spread = p * (mu - shift), math.hypot(p * slope, q * step.sigma)
        density = math.exp(-((center / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
        product = shift * math.erf(center / spread / math.sqrt(2)) - 2 * p * slope**2 * density
        expected += 10 * p * 2 * c * product / len(FLOW)

    estimates, method = [], DiffusionNFT(kl_weight=0.0, timestep_fraction=fraction)
    for seed in range(200):
        noise = torch.randn(500, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        batch = batch_of(data.denoise, FLOW, None, noise, lambda x: c * x.flatten(), 10_000 + seed)
        batch.images_per_prompt = 2
        data.mu.grad = None
        (losses,) = method.losses_per_step([batch])
        for loss in losses:
            loss.backward()
        assert data.mu.grad is not None
        estimates.append(float(data.mu.grad))
    values = torch.tensor(estimates, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values)))
    assert expected < 0  # downhill is towards a larger mean
    assert error < 0.1 * abs(expected)
    assert abs(float(values.mean()) - expected) < 3 * error


def test_it_climbs_a_reward_without_a_gradient() -> None:
    check_it_climbs(DiffusionNFT(kl_weight=0.0), FLOW, 8)


def authors_decay(step: int, decay_type: int) -> float:
    flat, uprate, uphold = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}[decay_type]
    return 0.0 if step < flat else min((step - flat) * uprate, uphold)


def test_the_decay_is_that_of_the_authors() -> None:
    own = {
        0: DiffusionNFT(decay_rate=0.0),
        1: DiffusionNFT(),
        2: DiffusionNFT(decay_start=75, decay_rate=0.0075, decay_max=0.999),
    }
    for kind, method in own.items():
        for step in (0, 1, 74, 75, 76, 200, 208, 209, 499, 500, 501, 10_000):
            method.optimizer_steps = step
            assert method.decay == pytest.approx(authors_decay(step, kind), abs=1e-12), (kind, step)


def test_the_old_lora_samples_and_follows() -> None:
    """Images of an update come from the old LoRA, which moves by the decay after all of its optimizer steps."""
    network, base = Network(), Network().requires_grad_(False)
    method = DiffusionNFT(inner_epochs=2, decay_rate=0.2, decay_max=0.7)
    expected, scored = {name: p.detach().clone() for name, p in network.named_parameters()}, []

    def reward(x: Tensor) -> Tensor:
        scored.append(x)
        return REWARDS

    for update in range(1, 4):
        batch = group_batch(network, base, FLOW, reward)
        for losses in method.losses_per_step([batch]):
            for loss in losses:
                loss.backward()
            with torch.no_grad():
                network.last.weight.add_(0.1)
        old = Network()
        old.load_state_dict(expected)
        assert torch.equal(scored[-1], rollout(through(old, FLOW), FLOW.steps, batch.noise).detach())
        decay = min(0.2 * 2 * update, 0.7)
        for name, parameter in network.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
            assert torch.allclose(method.old.weights[name], expected[name], atol=1e-14)
        expected = {name: weight.clone() for name, weight in method.old.weights.items()}
    assert method.state_dict()["optimizer_steps"] == 6


def test_equal_rewards_are_named() -> None:
    method, network = DiffusionNFT(kl_weight=0.0), Network()
    batch = group_batch(network, network, FLOW, lambda x: torch.full((6,), 0.1, dtype=torch.float64))
    for losses in method.losses_per_step([batch]):
        for loss in losses:
            loss.backward()
        assert "0.1" in method.explain_zero_gradient()
    assert network.last.weight.grad is not None
    assert float(network.last.weight.grad.abs().max()) < 1e-12  # both policies pull alike


def test_settings_out_of_range_are_refused() -> None:
    for values, words in (
        ({"beta": 0.0}, "beta 0"),
        ({"kl_weight": -1.0}, "kl_weight -1"),
        ({"inner_epochs": 0}, "inner_epochs 1 0"),
        ({"timestep_fraction": 0.0}, "timestep_fraction 0"),
        ({"spread": "prompt"}, "spread diffusion_nft 'prompt' 'group'"),
        ({"adv_clip_max": 0.0}, "adv_clip_max 0"),
        ({"decay_start": -1}, "decay_start 0 -1"),
        ({"decay_rate": -0.1}, "decay_rate 0 -0.1"),
        ({"decay_max": 1.0}, "decay_max 1"),
    ):
        with raises(DraftuneError, words):
            DiffusionNFT(**values)  # type: ignore[arg-type]


def test_samples_have_no_graph() -> None:
    seen: list[bool] = []
    network = Network()

    def denoise(x: Tensor, step: Step) -> Prediction:
        seen.append(torch.is_grad_enabled())
        return FLOW.to_prediction(network(x, step.timestep), x, step)

    batch = group_batch(network, network, FLOW, lambda x: REWARDS)
    batch.denoise = denoise
    for losses in DiffusionNFT(timestep_fraction=0.4).losses_per_step([batch]):
        for loss in losses:
            loss.backward()
    assert seen == [False] * 5 + [False, True] * 2
