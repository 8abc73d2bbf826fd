"""ImageReward: BLIP encodes the image, cross-attends to it from the prompt, and an MLP scores the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftune.errors import gather
from draftune.rewards.aesthetic import Head
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import KeyMap, find_file, find_tokenizer
from draftune.utils.loading import Truncation, build_part, load_tokenizer, tokenized, truncation

FILE = "ImageReward.pt"
# The mean and standard deviation of the raw score on the authors' validation set.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LONGEST_PROMPT = 35

VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 16,
    "image_size": 224,
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "encoder_hidden_size": 1024,
}
TEXT |= {"intermediate_size": 3072, "vocab_size": 30524, "layer_norm_eps": 1e-12}

BLIP = KeyMap(
    (r"vision\.embeddings\.class_embedding", "blip.visual_encoder.cls_token", ""),
    (r"vision\.embeddings\.position_embedding", "blip.visual_encoder.pos_embed", ""),
    (r"vision\.embeddings\.patch_embedding\.(\w+)", r"blip.visual_encoder.patch_embed.proj.\1", ""),
    (r"vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.(\w+)", r"blip.visual_encoder.blocks.\1.attn.qkv.\2", ""),
    (
        r"vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.(\w+)",
        r"blip.visual_encoder.blocks.\1.attn.proj.\2",
        "",
    ),
    (r"vision\.encoder\.layers\.(\d+)\.layer_norm(\d)\.(\w+)", r"blip.visual_encoder.blocks.\1.norm\2.\3", ""),
    (r"vision\.encoder\.layers\.(\d+)\.mlp\.(.+)", r"blip.visual_encoder.blocks.\1.mlp.\2", ""),
    (r"vision\.post_layernorm\.(\w+)", r"blip.visual_encoder.norm.\1", ""),
    (r"text\.(.+)", r"blip.text_encoder.\1", ""),
    (r"head\.(.+)", r"mlp.\1", ""),
)
# The projections are for BLIP's contrastive loss; position_ids is range(512).
UNUSED = r"blip\.(vision_proj|text_proj)\.\w+|blip\.text_encoder\.embeddings\.position_ids"


class ImageReward(Reward):
    """The published score, standardized as by its authors. Other configs than the published ones are for tests."""

    reads_prompts = True

    def __init__(
        self, weights: str, tokenizer: str, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT
    ) -> None:
        super().__init__()
        hub = ("zai-org/ImageReward", FILE)
        self.path, self.folder = gather(
            lambda: find_file(weights, "the reward's weights=", hub),
            lambda: find_tokenizer(tokenizer, "the reward's tokenizer="),
        )
        self.configs = vision, text

    def load(self) -> None:
        from transformers import BertTokenizerFast, BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision, text = BlipVisionConfig(**self.configs[0]), BlipTextConfig(**self.configs[1])
        with torch.device("meta"):
            parts = {"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False)}
            shapes = nn.ModuleDict({**parts, "head": Head(text.hidden_size)})
        state = BLIP.read(shapes, self.path, UNUSED)
        own = {
            part: {name.removeprefix(f"{part}."): t.float() for name, t in state.items() if name.startswith(f"{part}.")}
            for part in shapes
        }
        self.vision = build_part(BlipVisionModel, vision, own["vision"])
        self.text = build_part(BlipTextModel, text, own["text"], add_pooling_layer=False)
        self.head = Head(text.hidden_size)
        self.head.load_state_dict(own["head"])
        # BLIP adds two tokens to BERT's vocabulary, which scoring does not use.
        self.tokenizer = load_tokenizer(BertTokenizerFast, self.folder, text.vocab_size, at_least=text.vocab_size - 2)
        self.preprocess = Preprocess(vision.image_size, vision.image_size, center="round")

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        return [truncation(f"the reward {self.label!r}", self.tokenizer, prompts, LONGEST_PROMPT)]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = tokenized(self.tokenizer, prompts, LONGEST_PROMPT).to(images.device)
        patches = self.vision(pixel_values=self.preprocess(images)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches
        ).last_hidden_state
        return (self.head(read[:, 0]) - MEAN) / STD


@register("imagereward")
def imagereward(weights: str = FILE, tokenizer: str = "google-bert/bert-base-uncased") -> Reward:
    """ImageReward: predicts human preference for an image of the prompt, about -2 to 2, standardized by its authors.

    `weights`: the path of the published ImageReward.pt, or of its tensors as .safetensors; `tokenizer`: a folder or hub
    id with BERT's uncased vocabulary. Source: Xu et al., 2023, arXiv:2304.05977, zai-org/ImageReward on the hub. BLIP
    ViT-L and BERT-base, 446 M parameters, 1.8 GB, Apache-2.0; input 224x224, the center square; 35 tokens of text.
    Over-optimized: the prompt's objects are repeated and the background becomes flat.
    """
    return ImageReward(weights, tokenizer)
