"""Object insertion and removal: OWL-ViT says how sure it is that a picture shows what a text names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import logsigmoid

from draftune.errors import DraftuneError
from draftune.prompts import is_blank, metadata
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import find_network
from draftune.utils.loading import Truncation, load_part, load_tokenizer, tokenized, truncation


class OwlViT(Reward):
    """The log-probability that a picture shows the query, or that it does not.

    OWL-ViT gives a probability p to each of its boxes. The picture shows the query as surely as its best box does:
    log max p. It shows none if every box is empty: the sum of log (1 - p) over all boxes, so that every trace of the
    object is pushed down at once. How the paper aggregated the boxes is not known.
    """

    def __init__(self, query: str, model: str, present: bool) -> None:
        super().__init__()
        self.query = query
        self.present = present
        self.folder = find_network(model, "the reward's model=")

    def load(self) -> None:
        from transformers import CLIPTokenizerFast, OwlViTForObjectDetection

        self.model = load_part(OwlViTForObjectDetection, self.folder)
        self.tokenizer = load_tokenizer(CLIPTokenizerFast, self.folder, self.model.config.text_config.vocab_size)
        self.preprocess = Preprocess.from_folder(self.folder)

    def queries(self, prompts: Sequence[str]) -> list[str]:
        """What to look for: the setting, or else the prompt file's column "query", or else the prompt itself."""
        queries = [self.query or metadata(prompt).get("query") or prompt for prompt in prompts]
        if any(map(is_blank, queries)):
            raise DraftuneError(
                f"{self.label} looks for nothing where the prompt is empty: {self.label}(query=…), a column 'query' of "
                "the prompt file, or a prompt"
            )
        return queries

    def check(self, prompts: Sequence[str]) -> None:
        self.queries(prompts)

    @property
    def max_tokens(self) -> int:
        """How many tokens of a query it reads, the special ones included."""
        return int(self.model.config.text_config.max_position_embeddings)

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        return [truncation(f"the reward {self.label!r}", self.tokenizer, self.queries(prompts), self.max_tokens)]

    def logits(self, images: Tensor, queries: Sequence[str]) -> Tensor:
        """How sure the model is of each box [B, boxes], before the sigmoid."""
        tokens = tokenized(self.tokenizer, queries, self.max_tokens).to(images.device)
        found: Tensor = self.model(
            pixel_values=self.preprocess(images), input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).logits
        return found[..., 0]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        logits = self.logits(images, self.queries(prompts))
        return logsigmoid(logits.amax(1)) if self.present else logsigmoid(-logits).sum(1)


@register("detect")
def detect(query: str = "", model: str = "google/owlvit-base-patch32") -> Reward:
    """Object insertion: log-probability of the best box that OWL-ViT finds for a query, below 0.

    `query`: what the picture should show, such as "a photo of a strawberry"; without it, the column "query" of the
    prompt file, or the prompt. `model`: an OWL-ViT folder or hub id. Source: Minderer et al., arXiv 2205.06230.
    ViT-B/32 and text encoder, 153 M parameters, 613 MB, Apache-2.0; input 768x768, the aspect is not kept.
    Over-optimised it pastes the object in without regard for the scene, or finds textures that fool the detector.
    """
    return OwlViT(query, model, present=True)


@register("remove")
def remove(query: str = "", model: str = "google/owlvit-base-patch32") -> Reward:
    """Object removal: log-probability that none of OWL-ViT's boxes shows the query, below 0.

    Settings, source and weights are those of `detect`; each of the 576 boxes counts.
    Over-optimised it removes the scene along with the object.
    """
    return OwlViT(query, model, present=False)
