"""The relative reward: (1 + strength) r(good words) - r(bad words)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.prompts.sets import emoji
from draftune.rewards import Reward, load_reward
from draftune.rewards.base import FunctionReward, check_prompts
from draftune.rewards.relative import Relative
from helpers.errors import raises

WORDS = 'good="cat face", bad="pizza"'


def test_it_is_the_difference_of_two_prompts() -> None:
    asked: list[list[str]] = []

    def length(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked.append(list(prompts))
        return images.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])

    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    reward = Relative(FunctionReward(length), "Real", "Oily render", strength=0.5).load_weights()
    reward.set_chunk_size(2)
    scores = reward(images, ["a cat", "dog"])
    assert asked == [["Real. a cat", "Real. dog"], ["Oily render. a cat", "Oily render. dog"]]
    weights = torch.tensor([1.5 * 11 - 18, 1.5 * 9 - 16])
    assert torch.allclose(scores, images.mean((1, 2, 3)) * weights)
    scores.sum().backward()
    assert images.grad is not None
    assert torch.allclose(images.grad, (weights / 48)[:, None, None, None].expand_as(images))


def test_it_is_the_authors_dot_product_for_clip() -> None:
    """Their code multiplies the image's features by (1 + k) times the good text's minus the bad text's."""
    images, prompts = torch.rand(3, 3, 64, 64), emoji("common")[:3]
    reward = load_reward(f"relative(emoji_clip, {WORDS}, strength=0.25)")
    assert isinstance(reward, Relative)
    clip = reward.reward.clip  # type: ignore[union-attr]
    with torch.no_grad():
        good, bad = (clip.embed_texts([f"{words}. {p}" for p in prompts]) for words in ("cat face", "pizza"))
        expected = (clip.embed_images(images) @ (1.25 * good - bad).T).diagonal()
        assert torch.allclose(reward(images, prompts), expected, atol=1e-6)
    assert reward.label == "relative(emoji_clip)"


def test_each_score_depends_on_its_own_image_and_prompt() -> None:
    images, prompts = torch.rand(3, 3, 64, 64), emoji("common")[:3]
    reward = load_reward(f"relative(emoji_clip, {WORDS}) + 0.1*brightness")
    together = reward(images, prompts)
    each = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, each, atol=1e-6)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("relative(brightness, good=a, bad=b)", "relative 'brightness' prompts"),
        ("relative(emoji_clip + 0.1*brightness, good=a, bad=b)", "relative 'brightness' prompts"),
        ("relative(emoji_clip, good=a)", "relative bad"),
        ("relative(emoji_clip, good=a, bad=' ')", "bad relative"),
        ("relative(emoji_clip, good=a, bad=a)", "good bad relative 'a'"),
        ("relative(emoji_clip, good=a, bad=b, strength=-1)", "strength relative -1"),
        ("relative(good=a, bad=b)", "relative reward"),
    ],
)
def test_mistakes_are_refused(expression: str, words: str) -> None:
    with raises(DraftuneError, words):
        load_reward(expression)


def test_blank_prompts_are_refused() -> None:
    reward: Reward = load_reward(f"relative(emoji_clip, {WORDS})")
    with raises(DraftuneError, "relative(emoji_clip) 1 2"):
        check_prompts(reward, ["a cat", " "])


def test_srpo_trains_the_embedded_model(tmp_path: Path) -> None:
    run = draftune.train(
        "emoji",
        f"relative(emoji_clip, {WORDS})",
        method="direct_align",
        prompts=emoji("common")[:2],
        steps=2,
        batch_size=2,
        num_inference_steps=6,
        prefix_reuse_steps=2,
        eval_prompts="",
        eval_rewards=None,
        log_images_steps=0,
        num_log_prompts=1,
        output=str(tmp_path / "run"),
    )
    assert [row["reward_queries"] for row in run.metrics] == [4, 8]
    assert all(row["grad_norm"] > 0 for row in run.metrics)
