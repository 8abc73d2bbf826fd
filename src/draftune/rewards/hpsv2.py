"""Human Preference Score v2: an OpenCLIP ViT-H/14 fine-tuned on human preferences, in transformers' CLIP."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from draftune.errors import DraftuneError, gather, require
from draftune.rewards.base import Reward, register
from draftune.rewards.clip import ClipEncoder
from draftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, normalized
from draftune.rewards.weights import KeyMap, find_file, find_tokenizer
from draftune.utils.loading import Truncation, build_part, load_tokenizer, truncation

FILES = {2.0: "HPS_v2_compressed.pt", 2.1: "HPS_v2.1_compressed.pt"}

# OpenCLIP's ViT-H-14. It has the exact GELU; OpenAI's models have an approximation.
VIT_H_14: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
    },
}


def tower(ours: str, published: str) -> list[tuple[str, str, str]]:
    """Return the rules for one transformer; OpenCLIP stacks the query, key and value projections in one tensor."""
    ours, published = rf"{ours}\.encoder\.layers\.(\d+)\.", rf"{published}transformer.resblocks.\1."
    return [
        (ours + r"self_attn\.q_proj\.(\w+)", published + r"attn.in_proj_\2", "1/3"),
        (ours + r"self_attn\.k_proj\.(\w+)", published + r"attn.in_proj_\2", "2/3"),
        (ours + r"self_attn\.v_proj\.(\w+)", published + r"attn.in_proj_\2", "3/3"),
        (ours + r"self_attn\.out_proj\.(\w+)", published + r"attn.out_proj.\2", ""),
        (ours + r"layer_norm(\d)\.(\w+)", published + r"ln_\2.\3", ""),
        (ours + r"mlp\.fc1\.(\w+)", published + r"mlp.c_fc.\2", ""),
        (ours + r"mlp\.fc2\.(\w+)", published + r"mlp.c_proj.\2", ""),
    ]


OPEN_CLIP = KeyMap(
    *tower("vision_model", "visual."),
    *tower("text_model", ""),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding", ""),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight", ""),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding", ""),
    (r"vision_model\.pre_layrnorm\.(\w+)", r"visual.ln_pre.\1", ""),
    (r"vision_model\.post_layernorm\.(\w+)", r"visual.ln_post.\1", ""),
    (r"visual_projection\.weight", "visual.proj", "transposed"),
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight", ""),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding", ""),
    (r"text_model\.final_layer_norm\.(\w+)", r"ln_final.\1", ""),
    (r"text_projection\.weight", "text_projection", "transposed"),
    ("logit_scale", "logit_scale", ""),
)


class LongestEdge(Preprocess):
    """HPSv2's preprocessing: resizes the longest edge to `size` and pads with black.

    It resizes floats, without rounding to 8 bits, and antialiases, as torchvision does since 0.17.
    """

    def __call__(self, images: Tensor) -> Tensor:
        assert isinstance(self.size, int)
        scale = self.size / max(images.shape[-2:])
        height, width = (max(1, round(n * scale)) for n in images.shape[-2:])
        if (height, width) != images.shape[-2:]:
            images = interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        images = pad(images, (left, self.size - width - left, top, self.size - height - top))
        return normalized(images, CLIP_MEAN, CLIP_STD)


class HPSv2(Reward):
    """Cosine of image and prompt. `config`: the CLIP config of transformers; others than ViT-H/14 are for tests."""

    reads_prompts = True

    def __init__(self, weights: str, tokenizer: str, config: dict[str, Any] = VIT_H_14) -> None:
        super().__init__()
        require("ftfy", "the reward hpsv2", "hpsv2")
        hub = ("xswu/HPSv2", weights) if weights in FILES.values() else None
        self.path, self.folder = gather(
            lambda: find_file(weights, "the reward's weights=", hub),
            lambda: find_tokenizer(tokenizer, "the reward's tokenizer="),
        )
        self.config = config

    def load(self) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

        config = CLIPConfig(**self.config)
        with torch.device("meta"):
            shapes = CLIPModel(config)
        state = OPEN_CLIP.read(shapes, self.path)
        count = config.text_config.vocab_size
        tokenizer = load_tokenizer(CLIPTokenizerFast, self.folder, count, at_least=count)
        preprocess = LongestEdge(config.vision_config.image_size)
        self.clip = ClipEncoder(build_part(CLIPModel, config, state), tokenizer, preprocess)

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        texts = [cleaned(prompt) for prompt in prompts]
        return [truncation(f"the reward {self.label!r}", self.clip.tokenizer, texts, self.clip.max_tokens)]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.cosine(images, [cleaned(prompt) for prompt in prompts])


def cleaned(prompt: str) -> str:
    """Normalize a prompt as OpenCLIP's tokenizer does: fix mojibake and quotes, unescape HTML, lower the case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


@register("hpsv2")
def hpsv2(version: float = 2.1, weights: str = "", tokenizer: str = "openai/clip-vit-large-patch14") -> Reward:
    """Human Preference Score v2.0 or v2.1: cosine of image and prompt, about 0.15 to 0.4.

    `version`: 2.0 or 2.1; `weights`: the path of the published .pt, or of its tensors as .safetensors, instead of the
    hub's file; `tokenizer`: a folder or hub id with CLIP's vocabulary.
    Source: Wu et al., 2023, arXiv:2306.09341, xswu/HPSv2 on the hub. OpenCLIP ViT-H/14, 986 M parameters, 3.9 GB in
    float32, Apache-2.0; input 224x224, the whole image with black bars.
    Over-optimized: glossy, saturated, over-detailed images.
    """
    if version not in FILES:
        raise DraftuneError(f"version of reward hpsv2 must be 2.0 or 2.1, not {version}")
    return HPSv2(weights or FILES[version], tokenizer)
