"""A person's taste as a reward: the fit, its held-out accuracy, and the reward that is built on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.rewards import load_reward, parse_reward
from draftune.rewards.bradley_terry import FOLDS, Accuracy, cross_validate, fit, loss
from draftune.rewards.comparisons import (
    Comparison,
    comparison,
    image_path,
    missing_images,
    moved,
    placed,
    read_comparisons,
    reduced,
    write_comparisons,
)
from draftune.rewards.taste import Taste
from draftune.utils.images import save_image, to_pil
from draftune.utils.weightless import without_weights
from helpers.errors import raises


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("count", "width"), [(30, 4), (12, 40), (1, 3)])
@pytest.mark.parametrize("ridge", [1e-3, 0.3, 30.0])
def test_the_fit_is_the_minimum(count: int, width: int, ridge: float) -> None:
    differences = 3 * normal(count, width)
    weight = fit(differences, ridge)
    at = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at, differences, ridge), at)
    assert gradient.abs().max() < 1e-7

    def objective(w: np.ndarray) -> float:
        x = differences.numpy()
        return float(np.logaddexp(0, -x @ w).sum() + ridge / 2 * w @ w)

    found = minimize(objective, np.zeros(width), tol=1e-10)
    assert objective(weight.numpy()) <= found.fun + 1e-9
    assert np.allclose(weight, found.x, atol=1e-3)
    # Strictly convex: the loss is higher everywhere around.
    for step in normal(20, width, seed=1):
        assert loss(weight + 0.01 * step, differences, ridge) > loss(weight, differences, ridge)


def test_the_interval_is_wilsons() -> None:
    # Wilson, 1927: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    z, n, p = 1.959963984540054, 40, 30 / 40
    center, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = [(center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)]
    assert list(Accuracy(30, 40).interval) == pytest.approx(expected)
    assert Accuracy(30, 40).above_chance
    assert not Accuracy(24, 40).above_chance  # 60 %, but from 45 to 74 %
    assert not Accuracy(0, 10).above_chance


def test_answers_by_chance_are_refused_and_a_taste_is_found() -> None:
    """Of 100 files answered by a coin, at most one in 20 passes; 2.5 % are expected."""
    passed = 0
    for seed in range(100):
        passed += cross_validate(normal(40, 16, seed=seed), range(40), 0.3).above_chance
    assert passed <= 5
    likes, differences = normal(16, seed=7), normal(200, 16, seed=8)
    wins = differences * (differences @ likes).sign()[:, None]
    accuracy = cross_validate(wins, range(200), 0.3)
    assert accuracy.count == 200
    assert accuracy.correct > 170


def test_two_answers_about_one_pair_are_held_out_together() -> None:
    """Every pair is answered three times, by a coin and alike: with two of them at hand, the third is known."""
    pairs, differences = [i // 3 for i in range(90)], normal(30, 64).repeat_interleave(3, 0)
    assert cross_validate(differences, range(90), 0.3).correct > 80
    accuracy = cross_validate(differences, pairs, 0.3)
    assert accuracy.count == 30
    assert not accuracy.above_chance
    # Opposite answers about a pair predict nothing.
    assert cross_validate(torch.cat([differences, -differences]), [*pairs, *pairs], 0.3).correct == 0


def test_each_prediction_is_by_a_fit_without_its_comparison() -> None:
    differences = normal(23, 5)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    correct = 0
    for fold in range(FOLDS):
        held_out = order % FOLDS == fold
        correct += int((differences[held_out] @ fit(differences[~held_out], 2.0) > 0).sum())
    assert cross_validate(differences, range(23), 2.0).correct == correct


def rated(folder: Path, count: int, prefers: Callable[[Tensor], float], size: int = 16) -> Path:
    """Write comparisons of random images, the preferred of which has the higher value of `prefers`."""
    path, rows = folder / "mine.csv", []
    for i in range(count):
        row = placed(comparison("a cat", "skip", "emoji", None, (2 * i, 2 * i + 1), {}), path)
        images = (torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(i)) / 2).round(decimals=2)
        images[i % 2] += 0.5 * torch.rand((), generator=torch.Generator().manual_seed(1000 + i))
        for name, image in zip(row.images, to_pil(images), strict=True):
            save_image(image, image_path(path, name))
        choice = "left" if prefers(images[0]) > prefers(images[1]) else "right"
        rows.append(replace(row, choice=choice))
    write_comparisons(path, rows)
    return path


def brightness(image: Tensor) -> float:
    return float(image.mean())


def coin(image: Tensor) -> float:
    return hash(float(image[0, 0, 0])) % 1000


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rated(tmp_path_factory.mktemp("rated"), 40, brightness)


def taste(path: Path, more: str = "") -> Taste:
    reward = load_reward(f"taste(ratings='{path}', model=emoji_clip{more})")
    assert isinstance(reward, Taste)
    return reward


def test_a_taste_for_bright_images_scores_bright_images_higher(ratings: Path) -> None:
    reward = taste(ratings)
    assert reward.accuracy is not None
    assert reward.accuracy.correct >= 30
    dark, bright = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.7)
    scores = reward(torch.cat([dark, bright]), ["", ""])
    assert scores[1] > scores[0]
    # The unit: log-odds of being preferred to the mean rated image, by the fit of all comparisons.
    rows = read_comparisons(ratings)
    differences, mean = reward.differences(ratings, rows)
    assert differences.square().sum(1).mean() == pytest.approx(1)
    weight = fit(differences, 0.3) / reward.scale
    expected = (reward.clip.embed_images(torch.cat([dark, bright])).double() - mean) @ weight
    assert torch.allclose(scores.double(), expected, atol=1e-5)
    embeddings = torch.stack([reward.embeddings[image_path(ratings, name)] for row in rows for name in row.images])
    assert float(((embeddings - mean) @ weight).mean()) == pytest.approx(0, abs=1e-9)


def test_its_gradient_is_that_of_the_formula_and_images_are_independent(ratings: Path) -> None:
    reward = taste(ratings)
    reward.double()
    images = torch.rand(
        2, 3, 128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    with torch.enable_grad():
        (own,) = torch.autograd.grad(reward.score(images, ["", ""]).sum(), images)
        (alone,) = torch.autograd.grad(reward.score(images[:1], [""]).sum(), images)
    assert torch.allclose(own[:1], alone[:1], atol=1e-9)
    assert not alone[1].any()
    direction = normal(*images.shape, seed=3)
    with torch.no_grad():  # at 128 pixels nothing is resized or rounded
        step = 1e-5 * direction
        change = reward.score(images + step, ["", ""]) - reward.score(images - step, ["", ""])
    assert float(change.sum() / 2e-5) == pytest.approx(float((own * direction).sum()), rel=1e-4)


def test_answers_by_a_coin_are_refused(tmp_path: Path) -> None:
    path = rated(tmp_path, 30, coin)
    with raises(DraftuneError, "taste 30 95 mine.csv"):
        taste(path)


def test_the_fit_does_not_depend_on_the_sides_or_the_skipped(ratings: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    turned = {"left": "right", "right": "left"}
    rows = [
        replace(row, choice=turned[row.choice], left_image=row.right_image, right_image=row.left_image)
        for row in moved(read_comparisons(ratings), ratings, other)
    ]
    write_comparisons(other, [*rows, replace(rows[0], choice="skip", left_image="none.png")])
    assert torch.allclose(taste(other).weight, taste(ratings).weight, atol=1e-6)


def test_wrong_files_are_refused_before_anything_is_loaded(ratings: Path, tmp_path: Path) -> None:
    rows = read_comparisons(ratings)
    path = tmp_path / "wrong.csv"
    expression = f"taste(ratings='{path}', model=emoji_clip)"
    with raises(DraftuneError, "wrong.csv 'draftune rate'"):
        parse_reward(expression)
    write_comparisons(path, moved(rows, ratings, path)[:9])
    with raises(DraftuneError, "wrong.csv 9 10"):
        parse_reward(expression)
    write_comparisons(path, rows)
    with raises(DraftuneError, f"80 {rows[0].left_image} --restore-images"):
        parse_reward(expression)
    for text, words in (
        ("prompt,choice,left_image\na,left,b\n", "right_image line 2"),
        ("prompt,choice,left_image,right_image\na,both,b,c\n", "line 2 left right skip 'both'"),
        ("image,score\na,1\n", "prompt"),
    ):
        path.write_text(text)
        with raises(DraftuneError, words, path):
            parse_reward(expression)
    with raises(DraftuneError, "ridge taste 0"):
        parse_reward(f"taste(ratings='{ratings}', model=emoji_clip, ridge=0)")
    with raises(DraftuneError, "model nowhere"):
        parse_reward(f"taste(ratings='{ratings}', model=nowhere)")


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    hostile = 'a "cat", <b>\nnext line'
    rows = [
        placed(comparison(hostile, choice, "runs/x", 40, (3, 4), {"negative_prompt": "é,;"}), path)
        for choice in ("left", "right", "skip")
    ]
    write_comparisons(path, rows)
    assert read_comparisons(path) == rows
    assert rows[0].images == (rows[0].left_image, rows[0].right_image)
    assert rows[1].images == (rows[0].right_image, rows[0].left_image)
    assert rows[0].left_image.startswith("a-images/")
    # An image's name depends on all that it is sampled by.
    others = [comparison("b", "left", "m", u, s, k) for u, s, k in ((1, (3, 4), {}), (2, (3, 4), {}), (1, (5, 4), {}))]
    assert len({row.left_image for row in others}) == 3
    assert len({row.right_image for row in others}) == 2
    write_comparisons(path, [])
    assert not path.exists()
    own = Comparison("p", "left", "", "", "", "", "", "x.png", "y.png")
    assert missing_images(path, [own]) == ["x.png", "y.png"]
    large = to_pil(torch.rand(1, 3, 8, 1024))[0]
    assert reduced(large).size == (512, 4)


def test_it_counts_without_weights(ratings: Path) -> None:
    with without_weights():
        reward = load_reward(f"taste(ratings='{ratings}', model=emoji_clip)")
    assert sum(parameter.numel() for parameter in reward.parameters()) > 10**6


def test_its_clip_is_that_of_the_clip_score(ratings: Path) -> None:
    """What is fitted are the embeddings that `emoji_clip` compares, whose preprocessing is tested there."""
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, known = (reward.clip.embed_images(images) for reward in (taste(ratings), load_reward("emoji_clip")))
    assert torch.equal(own, known)
