"""Signal, noise and bias of gradients: estimates against closed forms, and the choice by progress per second."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from test_prefix_reuse import trainer, weights
from torch import Tensor

from draftune.training.allocation import BATCH_SIZES, Candidate, best, measure, table
from draftune.training.optim import RNGReplay
from draftune.training.prefix_reuse import gradient_of


def candidate(pairs: list[tuple[Tensor, Tensor]], images: int = 1) -> Candidate:
    made = Candidate("draft_k(k=1)", images)
    for gradient, full in pairs:
        made.add(gradient, full)
    return made


def test_estimates_are_unbiased() -> None:
    """Over all equally likely sequences of three samples of a known distribution, their means are its moments."""
    torch.manual_seed(0)
    gradients, fulls = torch.randn(2, 4, 5, dtype=torch.float64)
    sequences = itertools.product(range(4), repeat=3)
    made = [candidate([(gradients[i], fulls[i]) for i in sequence], images=2) for sequence in sequences]
    mean, full = gradients.mean(0), fulls.mean(0)
    assert sum(one.signal for one in made) / len(made) == pytest.approx(float(mean @ mean))
    # A sample is the mean of two images: one image has twice its variance.
    assert sum(one.noise for one in made) / len(made) == pytest.approx(2 * float(gradients.var(0, correction=0).sum()))
    along = [one.between(one.total, one.full_total, one.products) for one in made]
    assert sum(along) / len(made) == pytest.approx(float(mean @ full))


def test_progress_is_the_cosine_of_a_noisy_gradient() -> None:
    """A linear model with Gaussian noise: the gradient of an image is N(m, s^2 I), that of the full one N(G, s^2 I)."""
    generator, size, std = torch.Generator().manual_seed(0), 64, 0.5
    mean, full = torch.randn(2, size, generator=generator, dtype=torch.float64)
    full = mean + 0.5 * full
    noise = std * torch.randn(4000, 2, size, generator=generator, dtype=torch.float64)
    made = candidate([(mean + a, full + b) for a, b in noise])
    cosine = float(mean @ full / (mean.norm() * full.norm()))
    assert made.cosine == pytest.approx(cosine, abs=0.01)
    assert made.noise / made.signal == pytest.approx(size * std**2 / float(mean @ mean), rel=0.02)
    for batch in (1, 4):
        sampled = mean + std / batch**0.5 * torch.randn(4000, size, generator=generator, dtype=torch.float64)
        measured = (sampled @ full / full.norm()).mean() / sampled.square().sum(1).mean().sqrt()
        assert made.progress(batch) / float(full.norm()) == pytest.approx(float(measured), abs=0.02)


@pytest.mark.parametrize(("fixed", "expected"), [(0.0, 1), (1.0, 1), (4.0, 4), (50.0, 8)])
def test_the_best_batch_is_that_of_the_largest_progress_per_second(fixed: float, expected: int) -> None:
    """Noise far above the signal: sqrt(B) / (fixed + B) is largest at B = fixed."""
    large = candidate([(torch.tensor([1.0 + e, 1.0]), torch.tensor([1.0, 1.0])) for e in (1e3, -1e3, 1e3, -1e3)])
    large.times = {1: [fixed + 1, fixed + 1], 8: [fixed + 8]}
    assert large.seconds(3) == pytest.approx(fixed + 3)
    slow = candidate([(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))] * 4)
    slow.times = {size: [1e6 * value[0]] for size, value in large.times.items()}
    chosen, size = best([slow, large])
    assert chosen is large
    assert size == expected
    assert table([slow, large]).splitlines()[3].split("|")[6 + BATCH_SIZES.index(size)].strip() == "1.00"


def test_measuring_changes_nothing(pipeline_folder: Path, tmp_path: Path) -> None:
    """The sums are those of the gradients of the next prompts; the updates after it are those of a run without it."""
    measured, plain = (trainer(pipeline_folder, tmp_path / name, prefix_reuse_cosine=0.0) for name in "ab")
    for made in (measured, plain):
        made.train_step.run(1)
    updates = measured.train_step
    updates.replace_pending()
    plain.train_step.replace_pending()
    state, queue = updates.generator.get_state(), list(updates.prompt_sampler.queue)
    one = measure(updates, 3, ("draft_k(k=2)", "draft_k(k=1)"))[1]
    assert (one.count, sorted(one.times), len(one.times[8])) == (3, [1, 8], 2)
    object.__setattr__(updates.context.settings, "batch_size", 1)
    total = torch.zeros(())
    for _ in range(3):
        item = updates.next_input(updates.prompt_sampler)
        total = total + gradient_of(updates, 1, item, RNGReplay(updates.generator))
    assert (total - one.total).norm() < 1e-12 * total.norm()
    assert math.isfinite(one.progress(4))
    object.__setattr__(updates.context.settings, "batch_size", 2)
    updates.generator.set_state(state)
    updates.prompt_sampler.queue = queue
    updates.optimizer.zero_grad()
    for made in (measured, plain):
        made.train_step.run(2)
    assert torch.equal(weights(measured), weights(plain))
