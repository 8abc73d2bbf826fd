"""A question as a reward: how sure a vision-language model is of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.prompts import is_blank
from draftune.rewards.base import Reward, register
from draftune.rewards.vlm import VisionLanguageModel, find_model

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""The question of VQAScore."""


@register("vqa")
class VQA(Reward):
    """Any question as a reward: the log-odds of an answer by a vision-language model; 0 is undecided, any real number.

    `question`: the question; `{prompt}` becomes each image's prompt. `answer`: only its first token counts. `against`:
    another answer; empty compares with all other tokens. `model`: a folder or hub id in transformers' format of
    Qwen2-VL, Qwen2.5-VL, Qwen3-VL, SmolVLM or Idefics3; it computes in bf16 with `--reward-precision bf16` or
    `bnb_4bit`; scores are float32. `max_side`: at most so many pixels squared, for SmolVLM the longest side; 0 keeps
    the model's own.
    With p the probability of the first token of the answer: log p - log(1 - p), or log p(answer) - log p(against).
    With the default question the sigmoid of the score is VQAScore, P("Yes"), by this model instead of its authors'.
    Source: Lin et al., 2024, arXiv:2404.01291; Marafioti et al., 2025, arXiv:2504.05299. The default: SmolVLM-500M,
    Apache-2.0; input up to 2048x2048 in squares of 512x512 and as a whole, which `max_side=512` makes one square.
    Over-optimized: never run on published weights, so not known.
    """

    converts_itself = True

    def __init__(
        self,
        question: str = QUESTION,
        answer: str = "Yes",
        against: str = "",
        model: str = "HuggingFaceTB/SmolVLM-500M-Instruct",
        max_side: int = 0,
    ) -> None:
        super().__init__()
        for name, text in {"question": question, "answer": answer}.items():
            if is_blank(text):
                raise DraftuneError(f"{name} of reward vqa must not be empty")
        self.question, self.answers = question, [answer, *([against] if against else [])]
        self.reads_prompts = "{prompt}" in question
        self.max_side = checked_side(max_side)
        self.folder = find_model(model)

    def load(self) -> None:
        self.vlm = VisionLanguageModel.from_folder(self.folder, self.precision, self.max_side)
        self.tokens = answer_tokens(self.vlm, self.vlm.prompt(self.question), self.answers)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = [self.vlm.prompt(self.question.replace("{prompt}", prompt)) for prompt in prompts]
        return torch.stack([self.log_odds(image[None], text) for image, text in zip(images, texts, strict=True)])

    def log_odds(self, image: Tensor, text: str) -> Tensor:
        """Return the log-odds of the answer after a chat."""
        if len(self.tokens) == 2:
            answer, against = self.vlm.next_token(image, text, self.tokens)
            return answer - against
        logits = self.vlm.next_token(image, text)
        others = torch.arange(len(logits), device=logits.device) != self.tokens[0]
        return logits[self.tokens[0]] - logits.where(others, -torch.inf).logsumexp(0)


def answer_tokens(vlm: VisionLanguageModel, text: str, answers: Sequence[str]) -> list[int]:
    """Return the first tokens of answers after a chat. Raises DraftuneError if two are the same."""
    space = "" if text[-1:].isspace() else " "  # SmolVLM's chat ends with a colon
    tokens = [vlm.first_token(text, space + answer) for answer in answers]
    if len(set(tokens)) < len(tokens):
        raise DraftuneError(f"the answers {' and '.join(map(repr, answers))} begin with the same token")
    return tokens


def checked_side(max_side: int) -> int:
    """Return the setting `max_side`. Raises DraftuneError unless it is a whole number of at least 0."""
    if isinstance(max_side, bool) or not isinstance(max_side, int) or max_side < 0:
        raise DraftuneError(f"max_side must be a whole number of pixels, or 0 for the model's own, not {max_side}")
    return max_side
