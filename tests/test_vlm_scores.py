"""HPSv3 and UnifiedReward on small random weights in their published formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_published import published_layout
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from draftune.errors import DraftuneError
from draftune.rewards import load_reward, parse_reward
from draftune.rewards.hpsv3 import INSTRUCTION, KEYS, QWEN2_VL_7B, HPSv3, head
from draftune.rewards.unifiedreward import QUESTION, UnifiedReward
from draftune.utils.images import from_pil
from helpers.errors import raises
from helpers.published_weights import photographs
from helpers.vision_language import hpsv3_output, official_inputs, save_hpsv3, save_vlm, text_config

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
# The tokens are 256 bytes, two of a space and a letter, eight special ones, and <|Reward|>.
CONFIG: dict[str, Any] = {
    "text_config": text_config(267, rope_scaling=ROPE, rope_theta=1e4),
    "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14},
    "vision_start_token_id": 261,
    "vision_end_token_id": 262,
    "image_token_id": 264,
    "video_token_id": 265,
}


def test_hpsv3_agrees_with_its_package(tmp_path: Path) -> None:
    weights, tokenizer = save_hpsv3(tmp_path, CONFIG)
    tensors = load_file(weights)
    reward = load_reward(HPSv3(str(weights), str(tokenizer), CONFIG), "no")
    assert isinstance(reward, HPSv3)
    ours, theirs, scores = [], [], []
    for i, image in enumerate(photographs()):
        prompt = ("a cat", "dogs, and {birds}")[i % 2]
        with torch.no_grad():
            ours.append(reward.distribution(from_pil(image), [prompt])[0].numpy())
            scores.append(float(reward(from_pil(image), [prompt])))
            text = INSTRUCTION.replace("{text_prompt}", prompt)
            theirs.append(hpsv3_output(tensors, CONFIG, tokenizer, image, text).numpy())
    spread = np.std(theirs, 0)
    assert (spread > 1e-3).all()
    assert (np.abs(np.subtract(ours, theirs)).max(0) < 1e-3 * spread).all()
    assert scores == [float(mean) for mean, _ in ours]


def test_hpsv3_in_bf16_has_a_float32_head_and_a_gradient(tmp_path: Path) -> None:
    weights, tokenizer = save_hpsv3(tmp_path, CONFIG)
    reward = HPSv3(str(weights), str(tokenizer), CONFIG).load_weights()
    assert {p.dtype for p in reward.vlm.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}  # type: ignore[union-attr]
    images = torch.rand(2, 3, 40, 64, requires_grad=True)
    scores = reward(images, ["a cat", "a dog"])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert scores.dtype == torch.float32
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_the_published_layout(tmp_path: Path) -> None:
    """The file has the names of the package's class with transformers 4.45, and the small one those of its blocks."""
    layout = published_layout("hpsv3")
    with torch.device("meta"):
        network = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**QWEN2_VL_7B))
        assert KEYS.layout(nn.ModuleDict({"network": network, "head": head(3584)})) == layout
    weights, _ = save_hpsv3(tmp_path, CONFIG)
    deeper = re.compile(r"visual\.blocks\.[1-9]|model\.layers\.([2-9]|1\d)")
    assert load_file(weights).keys() == {name for name in layout if not deeper.match(name)}


def test_hpsv3_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with raises(DraftuneError, "HPSv3", "weights="):
        parse_reward("hpsv3")
    weights, tokenizer = save_hpsv3(tmp_path, CONFIG)
    with raises(DraftuneError, "<|Reward|>"):
        HPSv3(str(weights), str(tokenizer), CONFIG).load_weights()(torch.rand(1, 3, 28, 28), ["<|Reward|>"])


@pytest.mark.parametrize("axis", ["alignment", "style"])
def test_unifiedreward_is_the_expected_score_in_the_published_answer(tmp_path: Path, axis: str) -> None:
    folder = save_vlm(tmp_path / "model", "qwen2_5_vl")
    network = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digits = tokenizer.convert_tokens_to_ids(list("12345"))
    reward = load_reward(UnifiedReward(axis, str(folder)), "no")

    def expected(image: Image.Image, text: str) -> float:
        logits = network(**official_inputs(folder, image, text)).logits[0, -1]
        return sum((i + 1) * float(p) for i, p in enumerate(logits[digits].softmax(0)))

    ours, theirs = [], []
    for image in photographs():
        question = QUESTION.replace("{prompt}", "a cat")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text.endswith("Text Caption: [a cat]<|im_end|>\n<|im_start|>assistant\n")
        with torch.no_grad():
            text += "Alignment Score (1-5): "
            if axis == "style":
                text += f"{round(expected(image, text))}\nCoherence Score (1-5): "
                text += f"{round(expected(image, text))}\nStyle Score (1-5): "
            theirs.append(expected(image, text))
            ours.append(float(reward(from_pil(image), ["a cat"])))
    assert np.std(theirs) > 1e-2
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-3 * np.std(theirs)


def test_unifiedreward_has_a_gradient_and_refuses_other_axes(tmp_path: Path) -> None:
    folder = str(save_vlm(tmp_path / "model", "qwen2_5_vl"))
    with raises(DraftuneError, "axis", "beauty"):
        UnifiedReward("beauty", folder)
    with raises(DraftuneError, "UnifiedReward", "model="):
        parse_reward("unifiedreward")
    reward = UnifiedReward("coherence", folder).load_weights()
    images = torch.rand(2, 3, 40, 64, requires_grad=True)
    scores = reward(images, ["a cat", "a dog"])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert scores.dtype == torch.float32
    assert ((scores > 1) & (scores < 5)).all()
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()
