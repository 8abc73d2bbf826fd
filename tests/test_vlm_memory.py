"""Counted memory of vision-language rewards: that of a real call with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_vlm_scores import CONFIG

from draftune.rewards import Reward, load_reward
from draftune.rewards.hpsv3 import HPSv3
from draftune.rewards.unifiedreward import UnifiedReward
from draftune.rewards.vqa import VQA
from draftune.training.memory_count import Numberless, storage_bytes
from draftune.utils.memory import peak_memory
from draftune.utils.tensors import stored_tensors
from draftune.utils.weightless import make_fake, without_weights
from helpers.vision_language import FAMILIES, save_hpsv3, save_vlm


def gradient(reward: Reward) -> torch.Tensor:
    images = torch.rand(1, 3, 96, 64, requires_grad=True)
    return torch.autograd.grad(reward(images, ["a cat"]).sum(), images)[0]


def check_count(build: Callable[[], Reward], precision: str | None = None) -> None:
    """Compare the bytes of the weights, and the peak of a score with its gradient, with those of a real call."""
    real = load_reward(build(), precision)
    gradient(real)  # fills the caches of resizing
    with without_weights() as mode:
        counted = load_reward(build(), precision)
        stored = [storage_bytes(t for p in r.parameters() for t in stored_tensors(p)) for r in (counted, real)]
        assert stored[0] == stored[1]
        with mode, Numberless() as memory:
            make_fake(counted)
            memory.live = memory.peak = 0
            gradient(counted)
    assert memory.peak == pytest.approx(peak_memory(lambda: gradient(real)), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_of_a_question(tmp_path: Path, family: str) -> None:
    folder = str(save_vlm(tmp_path / "model", family))
    check_count(lambda: VQA(model=folder))


def test_the_count_of_quantized_weights(tmp_path: Path) -> None:
    folder = str(save_vlm(tmp_path / "model", "qwen3_vl"))
    check_count(lambda: VQA(model=folder), "bnb_4bit")


def test_the_count_of_unifiedreward(tmp_path: Path) -> None:
    """Its scores of other axes become part of the text."""
    folder = str(save_vlm(tmp_path / "model", "qwen2_5_vl"))
    check_count(lambda: UnifiedReward("style", folder))


def test_the_count_of_hpsv3_needs_no_weights(tmp_path: Path) -> None:
    weights, tokenizer = map(str, save_hpsv3(tmp_path, CONFIG))
    check_count(lambda: HPSv3(weights, tokenizer, CONFIG))
