"""Vision-language models as rewards: preprocessing, chats and log-odds as transformers' own processors have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from draftune import train
from draftune.errors import DraftuneError
from draftune.rewards import Reward, load_reward, parse_reward
from draftune.rewards.vlm import VisionLanguageModel
from draftune.rewards.vqa import VQA
from draftune.utils.images import from_pil
from draftune.utils.tensors import is_quantized_weight
from helpers.errors import raises
from helpers.published_weights import photographs
from helpers.quantized import dequantized
from helpers.vision_language import FAMILIES, official_inputs, save_vlm

ASKED = 'Does this figure show "a cat"? Please answer yes or no.'
CHATS = {
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    f"<|image_pad|><|vision_end|>{ASKED}<|im_end|>\n<|im_start|>assistant\n",
    "smol": f"<|im_start|>User:<image>{ASKED}<end_of_utterance>\nAssistant:",
}


class Folders(dict[str, Path]):
    """The folder of each family's model, which is saved on first use: `save_vlm` may skip the test of one family."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, family: str) -> Path:
        folder = self.root / family
        folder.mkdir(exist_ok=True)
        self[family] = save_vlm(folder, family)
        return self[family]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Folders(tmp_path_factory.mktemp("models"))


def chat(family: str) -> str:
    return CHATS["qwen" if "qwen" in family else "smol"]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_agree_with_the_official_processor(folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    network = AutoModelForImageTextToText.from_pretrained(folder).eval()
    reward = load_reward(VQA(model=str(folder)))
    against = load_reward(VQA(model=str(folder), against="No"))
    # The chat of SmolVLM ends without a space, so that the answer starts with one.
    space = "" if "qwen" in family else "\u0120"
    yes, no = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids([f"{space}Y", f"{space}N"])
    ours, theirs = [], []
    for image in photographs():
        with torch.no_grad():
            ours.append([float(r(from_pil(image), ["a cat"])) for r in (reward, against)])
            logits = network(**official_inputs(folder, image, chat(family))).logits[0, -1]
        p = logits.softmax(-1)[yes]
        theirs.append([float(p.log() - (1 - p).log()), float(logits[yes] - logits[no])])
    spread = np.std(theirs, 0)
    assert (spread > 1e-2).all()
    assert (np.abs(np.subtract(ours, theirs)).max(0) < 1e-3 * spread).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_the_derivative_of_the_score(folders: dict[str, Path], family: str) -> None:
    """In float64, on an image whose size stays: otherwise rounding to 8 bits has the gradient of the identity.

    The networks' norms, rotations and softmax compute in float32, which bounds the accuracy of the differences.
    """
    reward = load_reward(VQA(model=str(folders[family]), max_side=32)).double()
    image, direction = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image.requires_grad_()
    score = reward.score(image, ["a cat"])
    assert all(block.training for block in reward.vlm.blocks)
    assert len(reward.vlm.blocks) == (5 if "qwen" in family else 4)
    (gradient,) = torch.autograd.grad(score.sum(), image)
    with torch.no_grad():
        ahead, behind = (reward.score(image + step * direction, ["a cat"]) for step in (1e-3, -1e-3))
    assert not any(block.training for block in reward.vlm.blocks)
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind)[0] / 2e-3, rtol=1e-2, atol=1e-3)


def test_a_score_depends_on_its_image_and_prompt_only(folders: dict[str, Path]) -> None:
    reward = load_reward(VQA(model=str(folders["qwen3_vl"])))
    reward.set_chunk_size(3)
    images, prompts = torch.rand(3, 3, 48, 40), ["a cat", "two dogs and a bird", "x"]
    together = reward(images, prompts)
    alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert len({float(reward(images[:1], [prompt])) for prompt in prompts}) == 3
    fixed = load_reward(VQA("Are both hands correct?", model=str(folders["qwen3_vl"])))
    assert float(fixed(images[:1], ["a cat"])) == float(fixed(images[:1], [""]))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bf16_give_scores_in_float32(folders: dict[str, Path], family: str) -> None:
    whole, half = (load_reward(VQA(model=str(folders[family]), against="No"), p) for p in ("no", "bf16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    frequencies = {name: buffer.dtype for name, buffer in half.named_buffers() if "inv_freq" in name}
    assert frequencies
    assert set(frequencies.values()) == {torch.float32}
    images = torch.cat([from_pil(image.resize((48, 48))) for image in photographs()[:9]])
    exact, rounded = (reward(images, ["a cat"] * 9) for reward in (whole, half))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, rounded.bfloat16().float())
    assert (exact - rounded).abs().max() < 0.5 * exact.std()
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(half(images, ["a cat"] * 9).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_weights_in_4_bits(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    """The gradient is that of the numbers that the weights stand for, and near that of the unquantized ones."""
    folder = shutil.copytree(folders[family], tmp_path / "model")
    network = AutoModelForImageTextToText.from_pretrained(folder)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data /= 4  # larger random weights amplify every rounding
    network.save_pretrained(folder)
    images = torch.cat([from_pil(image.resize((48, 48))) for image in photographs()[:9]]).requires_grad_()

    def gradient(reward: Reward) -> torch.Tensor:
        scores = reward(images, ["a cat"] * 9)
        assert scores.dtype == torch.float32
        return torch.autograd.grad(scores.sum(), images)[0].flatten()

    whole, packed, exact = (load_reward(VQA(model=str(folder), against="No"), p) for p in ("no", "bnb_4bit", "bf16"))
    layers = {name: layer for name, layer in exact.named_modules() if type(layer) is torch.nn.Linear}
    quantized = {name for name in layers if is_quantized_weight(packed.get_submodule(name).weight)}
    assert layers.keys() - quantized == {"vlm.model.lm_head"}
    for name in quantized:
        layers[name].weight.data = dequantized(packed.get_submodule(name))
    assert torch.allclose(gradient(packed), gradient(exact))
    assert 0.85 < torch.cosine_similarity(gradient(packed), gradient(whole), dim=0) < 1


def test_what_can_not_be_scored_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with raises(DraftuneError, "SmolVLM", "model="):
        parse_reward("vqa")
    folder = str(folders["qwen2_vl"])
    with raises(DraftuneError, "precision", "fp8"):
        load_reward(VQA(model=folder), "fp8")
    with raises(DraftuneError, "max_side", "-1"):
        VQA(model=folder, max_side=-1)
    with raises(DraftuneError, "question"):
        VQA(" ", model=folder)
    with raises(DraftuneError, "clip"):
        VQA(model="emoji_clip")
    with raises(DraftuneError, "'Yes' and 'You'"):
        load_reward(VQA(answer="Yes", against="You", model=folder))
    reward = load_reward(VQA(model=folder))
    with raises(DraftuneError, "<|image_pad|>"):
        reward(torch.rand(1, 3, 32, 32), ["a <|image_pad|>"])
    with raises(DraftuneError, "empty"):
        reward(torch.rand(1, 3, 32, 32), [""])
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    (copied / "chat_template.jinja").unlink()
    with raises(DraftuneError, "chat template"):
        load_reward(VQA(model=str(copied)))


def test_max_side_bounds_the_input(folders: dict[str, Path]) -> None:
    image = torch.rand(1, 3, 64, 64)
    assert VisionLanguageModel.from_folder(folders["qwen3_vl"]).images(image)[1] == (8, 8)
    assert VisionLanguageModel.from_folder(folders["qwen3_vl"], max_side=32).images(image)[1] == (4, 4)
    assert VisionLanguageModel.from_folder(folders["smolvlm"]).images(image)[0].shape == (5, 3, 32, 32)
    assert VisionLanguageModel.from_folder(folders["smolvlm"], max_side=32).images(image)[0].shape == (1, 3, 32, 32)


def test_a_question_trains_the_embedded_model(folders: dict[str, Path], tmp_path: Path) -> None:
    reward = f"vqa(question='Is it red?', model={json.dumps(str(folders['smolvlm']))}, max_side=32)"
    settings = {"steps": 2, "num_inference_steps": 2, "batch_size": 2, "log_images_steps": 0, "eval_prompts": ""}
    result = train("emoji", reward, prompts=["pizza", "sun"], output=str(tmp_path / "run"), **settings)
    assert [row["grad_norm"] > 0 for row in result.metrics] == [True, True]
    assert result.metrics[0]["reward"] != result.metrics[1]["reward"]
