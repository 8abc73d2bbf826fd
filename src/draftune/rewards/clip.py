"""CLIP-like rewards: the cosine similarity of an image and its prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from draftune.errors import DraftuneError
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import find_network
from draftune.settings import PROMPT
from draftune.utils.loading import Truncation, load_part, load_tokenizer, tokenized, truncation

FAMILIES = ("clip", "siglip")


class ClipEncoder(nn.Module):
    """A transformers CLIPModel or SiglipModel with its tokenizer and a differentiable preprocessing."""

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    @classmethod
    def from_folder(cls, folder: Path) -> ClipEncoder:
        """Load a saved model. Raises DraftuneError for one of another kind, or that can't be read."""
        from transformers import AutoTokenizer, CLIPModel, CLIPTokenizerFast, SiglipModel

        family = model_type(folder)
        if family not in FAMILIES:
            raise DraftuneError(f"{str(folder)!r} is a {family} model; {' and '.join(FAMILIES)} are supported")
        model = load_part(CLIPModel if family == "clip" else SiglipModel, folder)
        kind = CLIPTokenizerFast if family == "clip" else AutoTokenizer
        tokenizer = load_tokenizer(kind, folder, model.config.text_config.vocab_size)
        return cls(model, tokenizer, Preprocess.from_folder(folder))

    @property
    def width(self) -> int:
        """The length of an embedding."""
        config = self.model.config
        return int(getattr(config, "projection_dim", 0) or config.vision_config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """The number of tokens after which a text is cut off, special tokens included."""
        return int(self.model.config.text_config.max_position_embeddings)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return normalized embeddings [B, D]."""
        pooled = self.model.vision_model(pixel_values=self.preprocess(images)).pooler_output
        project = getattr(self.model, "visual_projection", nn.Identity())
        return normalize(project(pooled), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return normalized embeddings [B, D]; prompts of more than `max_tokens` are cut off."""
        tokens = tokenized(self.tokenizer, prompts, self.max_tokens)
        # No attention mask: CLIP pools at the end token, which does not attend to the padding after it, and SigLIP was
        # trained without a mask.
        pooled = self.model.text_model(input_ids=tokens.input_ids.to(self.model.device)).pooler_output
        project = getattr(self.model, "text_projection", nn.Identity())
        return normalize(project(pooled), dim=-1)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine similarity of each image and its prompt [B]."""
        with torch.no_grad():
            texts = self.embed_texts(prompts)
        return (self.embed_images(images) * texts).sum(-1)


def model_type(folder: Path) -> str:
    """Return the `model_type` in a folder's config.json. Raises DraftuneError if there is none."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DraftuneError(f"{str(folder / 'config.json')!r} is not the config of a model: {error!r}") from error


@register("clip")
class ClipScore(Reward):
    """CLIP score: cosine of image and prompt, -1 to 1 (0.2 to 0.35 on real pairs), any CLIP or SigLIP model.

    `model`: a folder or hub id in transformers' format; `scaled`: the model's own logit instead of the cosine;
    `template`: the text that is compared, with `{prompt}` for each image's prompt, such as "a photo of {prompt}".
    Source: Radford et al., 2021, arXiv:2103.00020; Zhai et al., 2023, arXiv:2303.15343. The default: ViT-L/14, 428 M
    parameters, 1.7 GB in float32, MIT license; input 224x224, the center square.
    Over-optimized: the prompt's words and textures all over the image; the paper saw image quality decrease.
    """

    def __init__(
        self, model: str = "openai/clip-vit-large-patch14", scaled: bool = False, template: str = PROMPT
    ) -> None:
        super().__init__()
        self.folder = find_network(model, "the reward's model=")
        self.scaled, self.template = scaled, template
        self.reads_prompts = PROMPT in template

    def load(self) -> None:
        self.clip = ClipEncoder.from_folder(self.folder)

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        texts = self.texts(prompts)
        return [truncation(f"the reward {self.label!r}", self.clip.tokenizer, texts, self.clip.max_tokens)]

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts in the words of the template."""
        return [self.template.replace(PROMPT, prompt) for prompt in prompts]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = self.clip.cosine(images, self.texts(prompts))
        if not self.scaled:
            return cosine
        model = self.clip.model
        return cosine * model.logit_scale.exp() + getattr(model, "logit_bias", 0.0)


@register("pickscore")
def pickscore(model: str = "yuvalkirstain/PickScore_v1") -> Reward:
    """PickScore: predicts which image people prefer for the prompt; a CLIP ViT-H logit, about 15 to 26.

    `model`: a folder or hub id in transformers' format, with tokenizer and preprocessor config beside the weights.
    Source: Kirstain et al., 2023, arXiv:2305.01569. ViT-H/14, 986 M parameters, 3.9 GB in float32, MIT license; input
    224x224, the center square.
    Over-optimized: saturated, detailed, centered subjects that look alike.
    """
    return ClipScore(model, scaled=True)


@register("emoji_clip")
def emoji_clip(scaled: bool = False, template: str = PROMPT) -> Reward:
    """CLIP score by this package's small CLIP, trained on emoji and their names; for the embedded model.

    Cosine, -1 to 1; `scaled`: the model's logit; `template`: the text, such as "3d {prompt}" for a style. 2.7 M
    parameters, 5 MB, Apache-2.0; input 128x128; see its model card.
    Over-optimized: the most characteristic part of the name is exaggerated.
    """
    return ClipScore("emoji_clip", scaled, template)


def openai_preprocess(encoder: ClipEncoder) -> ClipEncoder:
    """Return the encoder with the cropping of OpenAI's code, which differs by one pixel from transformers' cropping."""
    encoder.preprocess = replace(encoder.preprocess, center="round")
    return encoder
