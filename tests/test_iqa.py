"""Metrics of pyiqa as rewards, with a stand-in that has the interface of pyiqa 0.1.16."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftune import train
from draftune.errors import DraftuneError
from draftune.rewards import load_reward, parse_reward
from draftune.rewards.iqa import NO_BACKWARD, ImageQuality, tell_license
from draftune.utils.weightless import without_weights
from helpers.errors import raises

METRICS = {"musiq": "NR", "arniqa": "NR", "niqe": "NR", "fid": "NR", "clipscore": "NR", "lpips": "FR"}


class Metric(nn.Module):
    """Mean of an image times a weight, as a column [B, 1]; as pyiqa's, it sets whether there is a gradient."""

    def __init__(self, name: str, as_loss: bool, loss_reduction: str, device: Any, **options: Any) -> None:
        super().__init__()
        assert loss_reduction == "none"
        self.lower_better = name in ("arniqa", "niqe")
        self.as_loss = as_loss
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, target: Tensor) -> Tensor:
        self.calls.append(tuple(target.shape))
        with torch.set_grad_enabled(self.as_loss):
            return self.weight * target.mean((1, 2, 3))[:, None]


@pytest.fixture(autouse=True)
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    def list_models(mode: str | None = None) -> list[str]:
        return sorted(name for name, kind in METRICS.items() if mode in (None, kind))

    stand_in = SimpleNamespace(list_models=list_models, create_metric=Metric)
    monkeypatch.setitem(sys.modules, "pyiqa", stand_in)
    return stand_in


def test_higher_is_better_whatever_the_metric() -> None:
    images = torch.rand(3, 3, 8, 8)
    means = images.mean((1, 2, 3))
    torch.testing.assert_close(load_reward("iqa(metric=musiq)")(images, [""] * 3), 3 * means)
    torch.testing.assert_close(load_reward("iqa(metric=arniqa)")(images, [""] * 3), -3 * means)


def test_the_gradient_is_that_of_the_metric_and_its_weights_are_frozen() -> None:
    reward = load_reward("iqa(metric=arniqa)")
    images = torch.rand(2, 3, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["", ""]).sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, -3 / 192))
    assert isinstance(reward, ImageQuality)
    assert reward.metric.calls == [(1, 3, 8, 8)] * 2
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_metrics_without_a_backward_pass_are_for_evaluation_and_zeroth_order() -> None:
    with raises(DraftuneError, "'niqe'", "zeroth_order", "gradient=False"):
        parse_reward("iqa(metric=niqe)")
    images = torch.rand(2, 3, 16, 16)
    expected = -3 * images.mean((1, 2, 3))
    reward = load_reward("iqa(metric=niqe, gradient=False)")
    torch.testing.assert_close(reward(images, ["", ""]), expected)
    with raises(DraftuneError, "no gradient"):
        reward(images.clone().requires_grad_(), ["", ""])
    estimated = load_reward("zeroth_order(iqa(metric=niqe, gradient=False), basis=grid, directions=4)")
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(estimated(leaf, ["", ""]).sum(), leaf)
    assert (gradient.mean((1, 2, 3)) < 0).all()
    assert len(set(NO_BACKWARD)) == len(NO_BACKWARD)


def test_other_metrics_are_refused_by_name() -> None:
    for metric in ("lpips", "fid", "clipscore"):
        with raises(DraftuneError, metric, "one image"):
            parse_reward(f"iqa(metric={metric})")
    with raises(DraftuneError, "musik", "musiq"):
        parse_reward("iqa(metric=musik)")


def test_missing_packages_and_weights_are_said_in_the_constructor(
    monkeypatch: pytest.MonkeyPatch, pyiqa: SimpleNamespace
) -> None:
    def unreachable(*args: Any, **options: Any) -> Any:
        raise OSError("no connection")

    pyiqa.create_metric = unreachable
    with raises(DraftuneError, "musiq", "no connection"):
        parse_reward("iqa(metric=musiq)")
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with raises(DraftuneError, "pip install pyiqa"):
        parse_reward("iqa(metric=musiq)")


def test_the_license_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tell_license.cache_clear()
    with caplog.at_level(logging.WARNING):
        parse_reward("iqa(metric=musiq) + iqa(metric=arniqa)")
    assert [("Noncommercial" in record.getMessage()) for record in caplog.records] == [True]


def test_it_is_built_without_weights_but_not_counted() -> None:
    with without_weights():
        reward = load_reward("iqa(metric=musiq)")
        with raises(DraftuneError, "--count"):
            reward(torch.rand(1, 3, 8, 8), [""])


def test_a_metric_trains_the_embedded_model(tmp_path: Path) -> None:
    settings = {"steps": 3, "num_inference_steps": 2, "batch_size": 2, "log_images_steps": 0, "eval_prompts": ""}
    result = train("emoji", "iqa(metric=musiq)", prompts=["sun"], output=str(tmp_path / "run"), seed=0, **settings)
    assert all(row["grad_norm"] > 0 for row in result.metrics)
