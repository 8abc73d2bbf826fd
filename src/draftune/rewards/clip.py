"""CLIP-like rewards: the cosine between a picture and its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from draftune.errors import DraftuneError
from draftune.loading import load_part
from draftune.quiet import quiet
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import find_folder


class Clip(Reward):
    """A frozen transformers CLIPModel with its tokenizer and a differentiable preprocessing."""

    def __init__(self, model: str) -> None:
        super().__init__()
        from transformers import CLIPModel, CLIPTokenizer

        folder = find_folder(model, "the reward's model=")
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise DraftuneError(f"the CLIP model {model!r} has no tokenizer: tokenizer.json or vocab.json is wanted")
        try:
            self.preprocess = Preprocess.from_folder(folder)
            self.model = load_part(CLIPModel, folder)
            with quiet():
                self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise DraftuneError(f"no CLIP model in {model!r}: {error}") from error
        self.model.eval()

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D]."""
        pooled = self.model.vision_model(pixel_values=self.preprocess(images)).pooler_output
        return normalize(self.model.visual_projection(pooled), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D]; prompts longer than the model reads are cut."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(self.model.device)
        # The padding is hidden, as in OpenAI's code the text ends at its end token.
        pooled = self.model.text_model(input_ids=tokens.input_ids).pooler_output
        return normalize(self.model.text_projection(pooled), dim=-1)


class ClipScore(Reward):
    """Cosine of picture and prompt in a CLIP model, times its learned scale where `scaled`."""

    def __init__(self, model: str, scaled: bool = False) -> None:
        super().__init__()
        self.clip = Clip(model)
        self.scaled = scaled

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            texts = self.clip.embed_texts(prompts)
        cosine = (self.clip.embed_images(images) * texts).sum(-1)
        return cosine * self.clip.model.logit_scale.exp() if self.scaled else cosine


@register("clip")
def clip(model: str = "openai/clip-vit-large-patch14", scaled: bool = False) -> Reward:
    """CLIP score: cosine of picture and prompt, -1 to 1, with any CLIP checkpoint (folder or hub id).

    Radford et al., arXiv 2103.00020. Optimised hard it draws the prompt's words and textures; the paper saw image
    quality fall.
    """
    return ClipScore(model, scaled)


@register("emoji-clip")
def emoji_clip(scaled: bool = False) -> Reward:
    """CLIP score by the small CLIP of this package, trained on emoji and their names; for the embedded model."""
    return ClipScore("emoji-clip", scaled)
