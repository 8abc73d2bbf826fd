"""Optimisers, gradient filters and the gradient's noise, against closed forms and inside a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import PROMPTS, cut_off_after, lora, noisy_brightness, rows, train
from torch import Tensor, nn

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.experimental.optimizers import (
    FILTERS,
    MEKA,
    Extrapolate,
    StepTunedSGD,
    channel_mean,
    channel_sobolev,
    channel_sobolev_mean,
)
from draftune.experimental.optimizers.meka import GaussianEstimate, filtered, step_size
from draftune.rewards.online import OnlineReward
from draftune.runs.checkpoint import load_random_state, random_state
from draftune.training import gradient_noise as noise_file
from draftune.training.gradient_noise import GradientNoise
from draftune.training.optim import gradient_filters, make_filter, make_optimizer, optimizers
from draftune.training.state import load_train_state, train_state
from draftune.training.step import TrainStep
from draftune.training.trainer import Trainer
from draftune.utils.processes import Processes
from draftune.utils.tensors import save_tensors
from helpers.errors import mentions, raises

WIDTH = 2.0


def weights(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def closure(parameter: nn.Parameter, loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        parameter.grad = None
        value = loss(parameter)
        value.backward()
        return value

    return evaluate


def quadratic(curvature: float) -> Callable[[Tensor], Tensor]:
    return lambda w: curvature * w.square().sum() / 2


def forms(w: Tensor) -> Tensor:
    """Neither convex nor separable."""
    return (w.square().sum() + w.prod() + torch.sin(3 * w).sum()).square()


@pytest.mark.parametrize(
    ("curvature", "clipped", "free"), [(1.0, 1.0, 1.0), (4.0, 0.5, 0.25), (0.1, 2.0, 10.0), (-1.0, 2.0, 2.0)]
)
def test_the_step_is_tuned_to_the_curvature(curvature: float, clipped: float, free: float) -> None:
    for settings, wanted in (({}, clipped), ({"low": 1e-6, "high": 1e6}, free)):
        w = weights(1.0, -2.0)
        optimizer = StepTunedSGD([w], lr=0.1, **settings)
        optimizer.step(closure(w, quadratic(curvature)))
        assert optimizer.gamma == pytest.approx(wanted, rel=1e-9)


def test_step_tuned_remembers_older_curvature() -> None:
    w = weights(1.0)
    optimizer = StepTunedSGD([w], lr=0.1)
    found = []
    for _ in range(8):
        optimizer.step(closure(w, quadratic(1.0)))
        found.append(optimizer.gamma)
    assert found == pytest.approx([1.0, 0.739] + 6 * [0.5], abs=5e-4)


def test_step_tuned_with_one_gamma_is_sgd_with_two_steps_a_batch() -> None:
    tuned, plain = weights(0.3, -0.7, 1.1), weights(0.3, -0.7, 1.1)
    optimizer, sgd = StepTunedSGD([tuned], lr=0.02, low=1.0, high=1.0), torch.optim.SGD([plain], lr=0.02)
    for k in range(20):
        optimizer.step(closure(tuned, forms))
        sgd.param_groups[0]["lr"] = 0.02 / (k + 1) ** 0.501
        for _ in range(2):
            sgd.step(closure(plain, forms))
    assert torch.equal(tuned, plain)
    assert (plain - weights(0.3, -0.7, 1.1)).norm() > 0.1


def test_a_pair_of_steps_is_made_whole_or_not_at_all() -> None:
    w = weights(1.0, 2.0)
    optimizer = StepTunedSGD([w], lr=0.1)
    evaluate, calls = closure(w, forms), []

    def fails() -> Tensor:
        calls.append(w.detach().clone())
        if len(calls) == 2:
            raise ArithmeticError
        return evaluate()

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    assert not torch.equal(calls[0], calls[1])
    assert torch.equal(w, calls[0])
    assert optimizer.gamma == 1.0


@pytest.mark.parametrize(
    ("rate", "ahead", "radius"),
    [(1.5, 0.2, 0.918), (1.5, 0.3, 1.078), (0.5, 0.5, 0.707), (1.9, 0.04, 0.981), (1.9, 0.06, 1.019)],
)
def test_extrapolation_on_a_quadratic_has_the_rate_of_its_matrix(rate: float, ahead: float, radius: float) -> None:
    w = weights(1.0)
    optimizer = Extrapolate(torch.optim.SGD([w], lr=rate), ahead)
    history = []
    for _ in range(400):
        optimizer.step(closure(w, quadratic(1.0)))
        history.append(abs(float(w.detach())))
    # The largest over some steps: where the eigenvalues are complex, it turns as it shrinks.
    early, late = max(history[90:110]), max(history[380:400])
    assert (late / early) ** (1 / 290) == pytest.approx(radius, abs=2e-3)
    assert (radius < 1) == (ahead < 1 and rate < 2 * (1 - ahead))


@pytest.mark.parametrize(("ahead", "distance"), [(0.0, 4.33e7), (0.15, 3.93), (0.3, 1.12e-9)])
def test_extrapolation_does_not_spiral_out_of_a_game(ahead: float, distance: float) -> None:
    """min over x, max over y of x * y, from (1, 1); with the first gradient for h at the start, 3.75 and 1.01e-9."""
    w = weights(1.0, 1.0)
    optimizer = Extrapolate(torch.optim.SGD([w], lr=0.3), ahead)

    def game() -> None:
        x, y = w.detach()
        w.grad = torch.stack([y, -x])

    for _ in range(400):
        optimizer.step(game)
    assert float(w.detach().norm()) == pytest.approx(distance, rel=5e-3)


@pytest.mark.parametrize("name", ["sgd", "sgd(momentum=0.9, nesterov=True)", "adamw"])
def test_extrapolation_by_nothing_is_the_optimizer_inside(name: str) -> None:
    first, second = weights(0.3, -0.7, 1.1), weights(0.3, -0.7, 1.1)
    plain, around = make_optimizer(name, [first], 0.02), make_optimizer(f"extrapolate({name}, rate=0)", [second], 0.02)
    moved = make_optimizer(f"extrapolate({name}, rate=0.01)", [third := weights(0.3, -0.7, 1.1)], 0.02)
    for _ in range(20):
        for w, optimizer in ((first, plain), (second, around), (third, moved)):
            optimizer.step(closure(w, forms))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_extrapolation_in_nesterovs_form() -> None:
    """v' = u v - lr * h and w' = w + v', with h taken at w + u v - rate * the h before; it converges where told."""
    for rate in (0.05, 0.3, 1.0):
        for ahead in (0.0, 0.1, 0.2):
            w, x, v, h = weights(1.0), 1.0, 0.0, 0.0
            optimizer = Extrapolate(torch.optim.SGD([w], lr=rate, momentum=0.9), ahead, momentum=0.9)
            for i in range(600):
                h = x + 0.9 * v - ahead * h
                v = 0.9 * v - rate * h
                x += v
                optimizer.step(closure(w, quadratic(1.0)))
                if i < 50:
                    assert float(w) == pytest.approx(x, rel=1e-9, abs=1e-12)
            assert abs(float(w)) < 1e-9, (rate, ahead)


def test_extrapolation_leaves_the_weights_where_a_gradient_fails() -> None:
    w = weights(1.0)
    optimizer = Extrapolate(torch.optim.SGD([w], lr=0.1), 0.5)
    optimizer.step(closure(w, quadratic(1.0)))
    before, seen = float(w), []

    def fails() -> None:
        seen.append(float(w))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    assert float(w) == before
    assert seen == [before - 0.5 * 1.0]


@pytest.mark.parametrize(
    "text",
    ["step_tuned_sgd", "extrapolate(adamw, rate=0.01)", "extrapolate(sgd(momentum=0.9), rate=0.01, momentum=0.9)"],
)
def test_a_state_that_was_saved_goes_on(text: str) -> None:
    w, again = (nn.Parameter(torch.tensor([0.3, -0.7, 1.1])) for _ in range(2))
    optimizer = make_optimizer(text, [w], 0.002)
    for i in range(9):
        if i == 5:
            other = make_optimizer(text, [again], 0.5)
            other.load_state_dict(deepcopy(optimizer.state_dict()))  # torch shares the tensors
            again.data = w.data.clone()
        if i >= 5:
            other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.002 / (i + 1)
            other.step(closure(again, forms))
        optimizer.step(closure(w, forms))
    assert w.isfinite().all()
    assert torch.equal(w, again)


def metric(name: str, h: Tensor, k: Tensor, weight: float) -> Tensor:
    """The inner product by its definition; the derivative of the trigonometric polynomial through the rows."""
    size = len(h)
    frequencies = 2j * math.pi * torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    slopes = [torch.fft.fft(x, dim=0) * frequencies[:, None] for x in (h, k)]
    smooth = (slopes[0] * slopes[1].conj()).real.sum() / size**2
    means = (h.mean(0) * k.mean(0)).sum()
    if name == "channel_mean":
        return means + weight * ((h - h.mean(0)) * (k - k.mean(0))).sum(1).mean()
    return (means if name == "channel_sobolev_mean" else (h * k).sum(1).mean()) + weight * smooth


@pytest.mark.parametrize("name", FILTERS)
def test_a_filtered_gradient_is_the_gradient_in_its_metric(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    g, k = torch.randn(2, 16, 5, generator=generator, dtype=torch.float64)
    setting, weight = ("width", (WIDTH / 16) ** 2) if name == "channel_sobolev" else ("weight", WIDTH)
    apply = make_filter(f"{name}({setting}={WIDTH})")
    new = apply(g)
    assert float(metric(name, new, k, weight)) == pytest.approx(float((g * k).sum(1).mean()), abs=1e-12)
    assert float((new * g).sum()) > 0.1
    same = torch.ones(16, 1, dtype=torch.float64) * torch.randn(1, 5, generator=generator, dtype=torch.float64)
    assert apply(same) == pytest.approx(same, abs=1e-14)
    assert new.mean(0) == pytest.approx(g.mean(0), abs=1e-14)
    shuffled = torch.randperm(16, generator=generator)
    error = float((apply(g[shuffled]) - new[shuffled]).abs().max())
    if name == "channel_mean":
        assert error < 1e-14
        assert apply(g - g.mean(0)) == pytest.approx((g - g.mean(0)) / WIDTH, abs=1e-15)
    elif name == "channel_sobolev":
        assert error > 0.1
    else:
        assert float((make_filter(name)(g[shuffled]) - make_filter(name)(g)[shuffled]).abs().max()) > 0.1
    kernel = g.reshape(16, 5, 1, 1).float()
    assert apply(kernel) == pytest.approx(new.reshape(16, 5, 1, 1).float(), abs=1e-6)


def test_the_sobolev_filters_answer_an_impulse_with_their_kernels() -> None:
    size, weight = 4096, 0.01
    impulse = torch.zeros(size, 1, dtype=torch.float64)
    impulse[0] = size
    s = torch.arange(size, dtype=torch.float64) / size
    root = math.sqrt(weight)
    kernels = {
        "h1": torch.cosh((s - 0.5) / root) / (2 * root * math.sinh(1 / (2 * root))),
        "mean": 1 + (s.square() - s + 1 / 6) / (2 * weight),
    }
    answers = {
        "h1": channel_sobolev(impulse, width=root * size)[:, 0],
        "mean": channel_sobolev_mean(impulse, weight)[:, 0],
    }
    m = torch.arange(5)
    squares = (2 * math.pi * m).square()
    gains = {"h1": 1 / (1 + weight * squares), "mean": torch.where(m == 0, 1, 1 / (weight * squares.clamp(min=1)))}
    for name, kernel in kernels.items():
        assert (answers[name] - kernel).abs().max() < 0.02 * kernel.max()
        assert torch.fft.fft(kernel).real[:5] / size == pytest.approx(gains[name].double(), abs=1e-4)
        assert torch.fft.fft(answers[name]).real[:5] / size == pytest.approx(gains[name].double(), abs=1e-6)


def test_mekas_filter_averages_a_noisy_quadratics_gradients() -> None:
    """20 eigenvalues from 1e-3 to 1, one sample a step, alpha = 0.9 / L, many runs beside each other."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-3, 0, 20, dtype=torch.float64)
    covariance, alpha = curvature.square(), 0.9  # of the gradient, by coordinate

    def measured(w: Tensor) -> GaussianEstimate:
        sample = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        return GaussianEstimate(curvature * (w - sample), covariance.mean())

    # 20,000 runs tell the error to a hundredth; 200 of them go on.
    w = torch.full((20_000, 20), 3.0, dtype=torch.float64)
    plain = torch.full((200, 20), 3.0, dtype=torch.float64)
    found, step = measured(w), torch.zeros_like(w)
    for t in range(2000):
        if t == 50:
            w, step, found = w[:200], step[:200], GaussianEstimate(found.mean[:200], found.variance)
        if t:
            found = filtered(GaussianEstimate(found.mean + curvature * step, found.variance), measured(w))
        if t < 50:
            error = (found.mean - curvature * w).square().sum(1).mean() * (t + 1) / covariance.sum()
            assert 0.94 < float(error) < 1.05
            assert float(found.variance * (t + 1) / covariance.mean()) == pytest.approx(1, abs=1e-6)
        step = -alpha * found.mean
        w = w + step
        plain = plain - alpha * measured(plain).mean
    gaps = [float((curvature * x.square()).sum(1).mean() / 2) for x in (w, plain)]
    assert gaps == pytest.approx([1.0e-3, 0.69], rel=0.15)


def test_mekas_step_goes_less_far_where_less_is_known() -> None:
    # Where the loss is uncertain and its slope is known; with all three as small the step is 0.47.
    assert step_size(-2.0, 4.0, 1.0, 1e-12, 1e-12) == pytest.approx(0.5, rel=1e-9)
    sizes = [step_size(-2.0, 4.0, 1.0, 0.1, second) for second in (0.0, 1.0, 10.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.3 * sizes[-1]
    assert step_size(-2.0, -1.0, 1.0, 0.1, 0.0, most=7.0) == 7.0
    slope, curve, loss, first, second = -1.3, 0.7, 0.2, 0.4, 0.9
    grid = torch.linspace(1e-4, 10, 1_000_000, dtype=torch.float64)
    change = grid * slope + grid.square() * curve / 2
    spread = (2 * loss + grid.square() * first + grid**4 * second / 4).sqrt()
    assert step_size(slope, curve, loss, first, second) == pytest.approx(float(grid[(change / spread).argmin()]), 1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_meka_needs_no_learning_rate(adaptive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-2, 0, 10, dtype=torch.float64)
    w = weights(*[3.0] * 10)
    optimizer = MEKA([w], adaptive=adaptive)
    gap = [float((curvature * w.detach().square()).sum() / 2)]
    for _ in range(80):
        sample = torch.randn(8, 10, generator=generator, dtype=torch.float64)
        optimizer.step(lambda sample=sample: (curvature * (w - sample).square()).sum(1) / 2)
        gap.append(float((curvature * w.detach().square()).sum() / 2))
    assert gap[0] > 10
    assert max(gap) < 1.5 * gap[0]
    assert sum(gap[-20:]) / 20 < 0.03
    with raises(DraftuneError, "loss 2"):
        optimizer.step(lambda: w.sum())


def test_meka_predicts_its_gradient_by_second_derivatives() -> None:
    """Without noise between the samples, the filter's mean is the gradient itself after every step."""
    w = weights(0.5, -0.4)
    optimizer = MEKA([w], lr=0.01)
    for _ in range(3):
        start = w.detach().clone()
        optimizer.step(lambda: quadratic(2.0)(w).repeat(2))
        assert optimizer.whole("mean") == pytest.approx(2 * start, abs=1e-12)
        assert w.detach() == pytest.approx(start * 0.98, abs=1e-12)


def test_signal_to_noise_is_that_of_the_batches() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2, 2))}
    generator = torch.Generator().manual_seed(0)
    mean, signals, noises = torch.linspace(-1, 1, 7), [], []
    noise = GradientNoise(parameters)
    for _ in range(2000):
        for parameter in parameters.values():
            parameter.grad = None
        noise.clear()
        batches = mean + 2 * torch.randn(4, 7, generator=generator)
        for batch in batches:
            for parameter, part in zip(parameters.values(), batch.split([3, 4]), strict=True):
                part = part.view_as(parameter) / 4
                parameter.grad = part.clone() if parameter.grad is None else parameter.grad + part
            noise.add()
        noise.measure()
        trace = batches.var(0).sum() / 4
        assert noise.ratio == pytest.approx(float((batches.mean(0).square().sum() - trace) / trace), rel=1e-3, abs=1e-4)
        signals.append(noise.recent[-1][0])
        noises.append(noise.recent[-1][1])
    assert sum(signals) / 2000 == pytest.approx(float(mean.square().sum()), rel=0.08)
    assert sum(noises) / 2000 == pytest.approx(7 * 4 / 4, rel=0.03)
    noise.clear()
    noise.add()
    noise.measure()
    assert math.isnan(noise.ratio)


def test_noise_above_the_signal_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    noise = GradientNoise({})
    for i in range(3 * noise_file.WINDOW):
        noise.recent.append((0.5, 2.0))
        noise.warn()
        assert len(caplog.messages) == (i >= noise_file.WINDOW - 1)
    assert mentions(caplog.messages[0], 4)


def made(folder: Path, output: Path, reward: Any = noisy_brightness, **values: Any) -> TrainStep:
    """The updates of a run whose LoRA does something already."""
    settings = {"steps": 4, "num_inference_steps": 2, "batch_size": 2, "reward_batch_size": 2, "guidance_scale": 1.0}
    settings |= {"prefix_reuse_steps": 1, "method": "draft_lv(n=1)", "learning_rate": 0.01}
    trainer = Trainer(str(folder), reward, prompts=PROMPTS, output=str(output), **(settings | values))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.train_step.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return trainer.train_step


OPTIMISED: list[dict[str, Any]] = [
    {"optimizer": "step_tuned_sgd", "learning_rate": 3.0},
    {"optimizer": "extrapolate(adamw, rate=0.1)", "method": "kl(draft_k(k=2))", "prefix_reuse_steps": 2},
    {"optimizer": "extrapolate(sgd(momentum=0.9), rate=1, momentum=0.9)", "learning_rate": 3.0},
]


@pytest.mark.parametrize("values", OPTIMISED, ids=lambda values: values["optimizer"])
def test_updates_go_on_bit_for_bit(pipeline_folder: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    updates, again = (made(pipeline_folder, tmp_path, **values) for _ in range(2))
    start = {name: parameter.detach().clone() for name, parameter in updates.parameters.items()}
    found = []
    for step in (1, 2, 3, 4):
        found.append(updates.run(step))
        if step == 2:
            state, tensors = train_state(updates)
            save_tensors(tmp_path / "tensors.safetensors", tensors)
            state, random = json.loads(json.dumps(state)), random_state()
    load_train_state(again, state, load_file(tmp_path / "tensors.safetensors"))
    load_random_state(*random)
    for row in found[2:]:
        assert again.run(int(row["step"])) | {"train_seconds": 0} == row | {"train_seconds": 0}
    for name, parameter in updates.parameters.items():
        assert torch.equal(parameter, again.parameters[name])
        assert not torch.equal(parameter, start[name])


def test_a_run_goes_on_bit_for_bit(pipeline_folder: Path, tmp_path: Path) -> None:
    values = {
        "checkpointing_steps": 1,
        "validation_steps": 0,
        "eval_prompts": "",
        "steps": 3,
        "optimizer": "step_tuned_sgd",
    }
    values |= {
        "guidance_scale": 1.0,
        "num_inference_steps": 2,
        "learning_rate": 10.0,
        "gradient_filter": "channel_sobolev(width=3)",
        "log_gradient_snr": True,
    }
    values |= {"gradient_accumulation_steps": 2, "method": "draft_k(k=1)", "max_grad_norm": 0.0}
    whole = train(pipeline_folder, tmp_path / "whole", **values)
    with pytest.raises(KeyboardInterrupt):
        # The trial of the reward and the grid call it once each, an update 2 * 2 times.
        train(pipeline_folder, tmp_path / "cut", cut_off_after(2 + 4 + 3), **values)
    assert [row["step"] for row in rows(tmp_path / "cut", "metrics.jsonl")] == [1]
    resumed = train(pipeline_folder, tmp_path / "cut", **values)
    first, second = lora(whole.folder), lora(resumed.folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(whole.folder, "metrics.jsonl") == rows(resumed.folder, "metrics.jsonl")
    assert all(math.isfinite(row["gradient_snr"]) for row in whole.metrics)


class Pupil(OnlineReward):
    """The brightness, which counts the batches that it learns from."""

    lessons = 0

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))

    def learn(self, images: Tensor, prompts: Any, expected: Tensor | None) -> None:
        self.lessons += 1

    def carried(self) -> dict[str, Tensor]:
        return {}


def test_online_rewards_learn_once_from_a_batch(pipeline_folder: Path, tmp_path: Path) -> None:
    """Not again where an optimizer evaluates the gradient twice, or the cosine of two gradients is measured."""
    values = {"gradient_accumulation_steps": 2, "method": "draft_k(k=1)", "learning_rate": 1.0}
    for more in ({"optimizer": "step_tuned_sgd"}, {"optimizer": "sgd", "prefix_reuse_cosine": 0.9}):
        pupil = Pupil()
        updates = made(pipeline_folder, tmp_path, pupil, **values | more)
        for step in (1, 2):
            updates.run(step)
        assert pupil.lessons == 4


def test_a_pair_of_steps_has_the_same_batch_noise_and_chance(pipeline_folder: Path, tmp_path: Path) -> None:
    """Without a learning rate both evaluations are the same, copies with fresh noise and a random reward included."""
    seen: list[tuple[Tensor, Tensor]] = []

    def reward(images: Tensor, prompts: Any) -> Tensor:
        score = images.mean((1, 2, 3)) * torch.rand(len(images))
        seen.append((images.detach().clone(), score.detach()))
        return score

    for rate in (0.0, 30.0):
        values = {"optimizer": "step_tuned_sgd", "gradient_accumulation_steps": 2, "learning_rate": rate}
        updates = made(pipeline_folder, tmp_path, reward, **values)
        found = updates.run(1)
        assert (found["reward_queries"], len(seen)) == (16, 8)
        pairs = list(zip(seen[:4], seen[4:], strict=True))
        assert [torch.equal(first[0], again[0]) for first, again in pairs] == [rate == 0] * 4
        assert rate or all(torch.equal(first[1], again[1]) for first, again in pairs)
        assert found["reward"] == pytest.approx(float(torch.cat([seen[0][1], seen[2][1]]).mean()))
        # The copies have noise of their own, the second batch too, and the next update another.
        updates.run(2)
        pictures = [images for images, _ in seen[:4] + seen[8:12]]
        assert not any(torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
        seen.clear()


def test_extrapolation_by_nothing_changes_no_run(pipeline_folder: Path, tmp_path: Path) -> None:
    found = []
    for optimizer in ("adamw", "extrapolate(adamw, rate=0)", "extrapolate(adamw, rate=1e4)"):
        updates = made(pipeline_folder, tmp_path, optimizer=optimizer, prefix_reuse_steps=2)
        metrics = []
        for step in (1, 2, 3):
            torch.manual_seed(step)  # for the reward
            metrics.append(updates.run(step) | {"train_seconds": 0})
        found.append((metrics, torch.cat([p.detach().flatten() for p in updates.parameters.values()])))
    (plain, first), (same, second), (other, third) = found
    assert plain == same
    assert torch.equal(first, second)
    assert plain[0] == other[0]  # there is no gradient before the first
    assert plain[1]["reward"] != other[1]["reward"]
    assert not torch.equal(first, third)


def test_the_filter_is_for_output_channels_and_comes_before_clipping(pipeline_folder: Path, tmp_path: Path) -> None:
    def bright(images: Tensor, prompts: Any) -> Tensor:
        return 1000 * images.mean((1, 2, 3))

    grads, limit = [], 1e-3
    for gradient_filter in ("", "channel_mean(weight=4)"):
        values = {"optimizer": "sgd", "max_grad_norm": limit, "gradient_filter": gradient_filter}
        updates = made(pipeline_folder, tmp_path, bright, **values)
        norm = updates.run(1)["grad_norm"]
        clipped = torch.cat([parameter.grad.flatten() for parameter in updates.parameters.values()]).norm()
        assert float(clipped) == pytest.approx(limit, rel=1e-2)
        assert norm > 5 * limit
        grads.append({name: parameter.grad * norm / clipped for name, parameter in updates.parameters.items()})
    for name, gradient in grads[0].items():
        wanted = channel_mean(gradient, 4.0) if ".lora_B." in name else gradient
        scale = float(gradient.abs().max())
        assert grads[1][name] == pytest.approx(wanted, rel=1e-3, abs=1e-3 * scale), name


def test_noise_is_measured_between_the_means_over_processes() -> None:
    own, others = torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, 2.0], [-1.0, 4.0]])

    class Two(Processes):
        def gather(self, own: Tensor) -> Tensor:
            return torch.cat([own, others.sum(0)[None] if noise.measuring else others[[noise.count]]])

    class Measured(GradientNoise):
        measuring = False

    parameter = nn.Parameter(torch.zeros(2))
    noise = Measured({"w": parameter}, Two(0, 2))
    parameter.grad = torch.zeros(2)
    for gradient in own:
        parameter.grad = parameter.grad + gradient
        noise.add()
    noise.measuring = True
    noise.measure()
    batches = (own + others) / 2
    trace = float(batches.var(0).sum()) / 2
    assert noise.ratio == pytest.approx((float(batches.mean(0).square().sum()) - trace) / trace)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adam"}, "'adam' 'adamw'"),
        ({"optimizer": "sgd + adamw"}, "sgd + adamw"),
        ({"optimizer": "sgd(momentun=0.9)"}, "momentun momentum"),
        ({"optimizer": "sgd(momentum=0.9, nesterov=1)"}, "nesterov sgd 1"),
        ({"optimizer": "sgd(momentum=-1)"}, "sgd ValueError momentum"),
        ({"optimizer": "extrapolate"}, "extrapolate"),
        ({"optimizer": "extrapolate(adamw)"}, "extrapolate rate"),
        ({"optimizer": "extrapolate(adamw, rate=-1)"}, "rate 0"),
        ({"optimizer": "extrapolate(step_tuned_sgd, rate=1)"}, "extrapolate closure"),
        ({"optimizer": "adamw(sgd)"}, "adamw 'sgd'"),
        ({"optimizer": "step_tuned_sgd(low=3)"}, "low high"),
        ({"optimizer": "step_tuned_sgd(beta=1)"}, "beta 0 1"),
        ({"optimizer": "step_tuned_sgd", "mixed_precision": "fp16"}, "step_tuned_sgd fp16"),
        ({"optimizer": "step_tuned_sgd", "method": "ddpo"}, "ddpo adamw sgd"),
        ({"gradient_filter": "channel-means"}, "'channel-means' 'channel_mean'"),
        ({"gradient_filter": "channel_mean(weight=0)"}, "weight channel_mean 0"),
        ({"gradient_filter": "channel_mean(sgd)"}, "channel_mean sgd"),
        ({"log_gradient_snr": True}, "log_gradient_snr 2"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with raises(DraftuneError, message):
        Trainer("nowhere", "nothing", output=str(tmp_path / "run"), **values)
    assert not (tmp_path / "run").exists()


def test_optimizer_of_a_user_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch.optim import SGD\n"
        "class Half(SGD):\n"
        "    def __init__(self, params, lr, part=0.5):\n        super().__init__(params, lr=lr * part)\n"
        "def nothing(params, lr):\n    return 3\n"
        "def negated(gradient, by=1.0):\n    return -by * gradient\n"
    )
    w = weights(2.0)
    optimizer = make_optimizer(f"'{tmp_path}/mine.py:Half'(part=0.25)", [w], 1.0)
    optimizer.step(closure(w, quadratic(1.0)))
    assert float(w) == 1.5
    with raises(DraftuneError, "int Optimizer"):
        make_optimizer(f"{tmp_path}/mine.py:nothing", [w], 1.0)
    assert make_filter(f"'{tmp_path}/mine.py:negated'(by=2)")(torch.ones(2, 1)).tolist() == [[-2], [-2]]


def test_they_are_listed_and_have_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "experimental" / "optimizers.md").read_text()
    for what, table in (("optimizers", optimizers()), ("filters", gradient_filters())):
        assert main(["list", what]) == 0
        printed = capsys.readouterr().out
        for name in table:
            assert f"\n  {name} " in printed
            assert f"`{name}" in page
    assert main(["list", "step_tuned_sgd"]) == 0
    assert capsys.readouterr().out.startswith("step_tuned_sgd(nu: float = 2.0, beta: float = 0.9,")
