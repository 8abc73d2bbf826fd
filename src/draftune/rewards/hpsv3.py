"""Human Preference Score v3: Qwen2-VL-7B with a head that predicts the mean and the spread of human preference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError, gather
from draftune.rewards.base import Reward, register
from draftune.rewards.vlm import VisionLanguageModel, dtype_of, read_tokenizer
from draftune.rewards.vlm_images import QwenImages
from draftune.rewards.weights import KeyMap, find_file, find_tokenizer
from draftune.utils.loading import build_part

FILE = "HPSv3.safetensors"
TOKEN = "<|Reward|>"
"""The token that the authors added to the vocabulary; the head reads its state."""
INSTRUCTION = (Path(__file__).parent.parent / "assets" / "hpsv3-instruction.txt").read_text(encoding="utf-8")
"""The question that the model was trained with; {text_prompt} stands for the prompt."""
PIXELS = 256 * 28 * 28
"""Pixels of a resized image, as near as multiples of 28 allow."""

# Qwen2-VL-7B-Instruct, with one token more in its vocabulary.
QWEN2_VL_7B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151658,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "hidden_size": 3584,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}

# The authors saved their model with transformers 4.45, whose names were shorter.
KEYS = KeyMap(
    (r"network\.model\.visual\.(.+)", r"visual.\1", ""),
    (r"network\.model\.language_model\.(.+)", r"model.\1", ""),
    (r"head\.(.+)", r"rm_head.\1", ""),
    (r"network\.lm_head\.weight", "lm_head.weight", ""),
)


def head(width: int) -> nn.Sequential:
    """Return the head: mean and logarithm of the standard deviation."""
    hidden = nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05)
    return nn.Sequential(*hidden, nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))


class HPSv3(Reward):
    """The mean that the published model predicts. Other configs than the published one are for tests."""

    reads_prompts = True
    precision, converts_itself = "bf16", True

    def __init__(self, weights: str, tokenizer: str, config: dict[str, Any] = QWEN2_VL_7B) -> None:
        super().__init__()
        self.path, self.folder = gather(
            lambda: find_file(weights, "the reward's weights=", ("MizzenAI/HPSv3", FILE)),
            lambda: find_tokenizer(tokenizer, "the reward's tokenizer="),
        )
        self.config = config

    def load(self) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        config = Qwen2VLConfig(**self.config)
        width, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
        with torch.device("meta"):
            shapes = nn.ModuleDict({"network": Qwen2VLForConditionalGeneration(config), "head": head(width)})
        state = KEYS.read(shapes, self.path)
        self.head = head(width)
        self.head.load_state_dict({name: state.pop(f"head.{name}").float() for name in self.head.state_dict()})
        state = {name.removeprefix("network."): tensor for name, tensor in state.items()}
        network = build_part(Qwen2VLForConditionalGeneration, config, state, dtype=dtype_of(self.precision))
        tokenizer = read_tokenizer(self.folder, vocabulary)
        tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
        self.token = tokenizer.convert_tokens_to_ids(TOKEN)
        if not self.token < vocabulary:
            raise DraftuneError(f"the tokenizer in {str(self.folder)!r} has more tokens than {str(self.path)!r}")
        vision = config.vision_config
        sides = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        images = QwenImages(*sides, min_pixels=PIXELS, max_pixels=PIXELS)
        self.vlm = VisionLanguageModel(network, tokenizer, images, self.precision)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.distribution(images, prompts)[:, 0]

    def distribution(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the mean of the preference for each image and the logarithm of its standard deviation [B, 2]."""
        results = []
        for image, prompt in zip(images, prompts, strict=True):
            text = self.vlm.prompt(INSTRUCTION.replace("{text_prompt}", prompt))
            # The authors' class calls transformers 4.45's model without positions, which are then sequential.
            ids, states = self.vlm.hidden(image[None], text, sequential=True)
            places = [place for place, token in enumerate(ids.tolist()) if token == self.token]
            if len(places) != 1:
                raise DraftuneError(f"a prompt must not contain {TOKEN!r}, which the reward hpsv3 reads")
            results.append(self.head(states[places[0]].float()))
        return torch.stack(results)


@register("hpsv3")
def hpsv3(weights: str = FILE, tokenizer: str = "Qwen/Qwen2-VL-7B-Instruct") -> Reward:
    """Human Preference Score v3: how people rate an image of the prompt; the mean of a predicted normal distribution.

    `weights`: the path of the published HPSv3.safetensors; `tokenizer`: a folder or hub id with Qwen2-VL's tokenizer
    and chat template. The network computes in bf16, as by its authors, unless `--reward-precision` is `no`; the head
    and the score are float32.
    Source: Ma et al., 2025, arXiv:2508.03789, MizzenAI/HPSv3 on the hub. Qwen2-VL-7B, 8.3 B parameters, 16.6 GB in
    bf16, MIT license; input about 200,704 pixels with the image's aspect ratio. Compared with the class of the
    package hpsv3 1.0.0 in transformers 4.45.2 on small random weights; never run on the published ones.
    Over-optimized: not known.
    """
    return HPSv3(weights, tokenizer)
