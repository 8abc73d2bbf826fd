"""Object insertion and removal, by the detection probabilities of OWL-ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from draftune.errors import DraftuneError
from draftune.prompts import is_blank, metadata
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import find_network
from draftune.utils.loading import Truncation, load_part, load_tokenizer, tokenized, truncation


class OwlViT(Reward):
    """Base class: OWL-ViT's probabilities that each of its boxes shows the query."""

    def __init__(self, query: str = "", model: str = "google/owlvit-base-patch32") -> None:
        super().__init__()
        self.query = query
        self.folder = find_network(model, "the reward's model=")

    def load(self) -> None:
        from transformers import CLIPTokenizerFast, OwlViTForObjectDetection

        self.model = load_part(OwlViTForObjectDetection, self.folder)
        self.tokenizer = load_tokenizer(CLIPTokenizerFast, self.folder, self.model.config.text_config.vocab_size)
        self.preprocess = Preprocess.from_folder(self.folder)

    def queries(self, prompts: Sequence[str]) -> list[str]:
        """Return the text to detect in each image: the setting, the prompt file's column "query", or the prompt."""
        queries = [self.query or metadata(prompt).get("query") or prompt for prompt in prompts]
        if any(map(is_blank, queries)):
            raise DraftuneError(
                f"{self.label} has no query for an empty prompt: set {self.label}(query=…), a column 'query' of the "
                "prompt file, or a prompt"
            )
        return queries

    def check(self, prompts: Sequence[str]) -> None:
        self.queries(prompts)

    @property
    def max_tokens(self) -> int:
        """The number of tokens after which a query is cut off, special tokens included."""
        return int(self.model.config.text_config.max_position_embeddings)

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        return [truncation(f"the reward {self.label!r}", self.tokenizer, self.queries(prompts), self.max_tokens)]

    def logits(self, images: Tensor, queries: Sequence[str]) -> Tensor:
        """Return the logit of each box [B, boxes]."""
        logits: Tensor = self.detect(images, queries).logits
        return logits[..., 0]

    def detect(self, images: Tensor, queries: Sequence[str]) -> Any:
        """Return the network's output: logits [B, boxes, 1] and boxes [B, boxes, 4]."""
        tokens = tokenized(self.tokenizer, queries, self.max_tokens).to(images.device)
        return self.model(
            pixel_values=self.preprocess(images), input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )

    def best_boxes(self, images: Tensor, prompts: Sequence[str]) -> list[tuple[float, float, float, float]]:
        """Return each image's best box: left, top, right, bottom in shares of the image's width and height."""
        output = self.detect(images, self.queries(prompts))
        best = output.logits[..., 0].argmax(1)
        boxes = output.pred_boxes[torch.arange(len(images)), best]
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1).clamp(0, 1)
        return [(left, top, right, bottom) for left, top, right, bottom in corners.tolist()]


@register("object_detection")
class ObjectDetection(OwlViT):
    """Object insertion: log-probability of the query in OWL-ViT's best box, log max p, below 0.

    `query`: what the image should show, such as "a photo of a strawberry"; unless set, the column "query" of the prompt
    file, or the prompt. `model`: an OWL-ViT folder or hub id. Source: Minderer et al., 2022, arXiv:2205.06230; how
    the paper aggregated the boxes is not known. ViT-B/32 and text encoder, 153 M parameters, 613 MB, Apache-2.0; input
    768x768, whatever the aspect ratio.
    Over-optimized: the object is pasted into the scene, or textures deceive the detector.
    """

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return logsigmoid(self.logits(images, self.queries(prompts)).amax(1))


@register("object_removal")
class ObjectRemoval(OwlViT):
    """Object removal: log-probability that no box of OWL-ViT shows the query, sum of log(1 - p), below 0.

    Settings, source and weights are those of `object_detection`. The sum is over all 576 boxes, so every trace of the
    object is penalized. Over-optimized: the scene disappears together with the object.
    """

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return logsigmoid(-self.logits(images, self.queries(prompts))).sum(1)
