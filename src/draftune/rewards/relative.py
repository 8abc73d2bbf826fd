"""The relative reward of SRPO: what good words in the prompt raise, compared with bad words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from draftune.errors import DraftuneError
from draftune.prompts import is_blank
from draftune.registry.factories import check_range
from draftune.rewards.base import FunctionReward, Reward, register, sub_rewards

MAX_STRENGTH = 1e6
"""Largest `strength`; far above it float32 forgets the score with the bad words."""


@register("relative")
class Relative(Reward):
    """Any reward r that reads prompts, relative to bad words: (1 + strength) r("good. prompt") - r("bad. prompt").

    Example: `relative(hpsv2, good="Natural lighting", bad="CG render")`. What r rewards whatever the prompt says
    cancels, up to `strength` times its score. Scale: the difference of two scores of r, plus `strength` times the
    score; `strength` 0: the difference alone. Cost: twice that of r. Weights and input size are those of r.
    Over-optimized: as r, more slowly; the good words themselves appear where r reads text in images.
    Source: SRPO (Shen et al., arXiv:2509.06942) and the authors' code (Tencent-Hunyuan/SRPO, fastvideo/SRPO.py), whose
    strength is 0.1 to 0.25 by noise level. It has four good words, such as "Real" and "Detailed", one an update.
    """

    reads_prompts = True

    def __init__(self, reward: Reward, good: str, bad: str, strength: float = 0.1) -> None:
        super().__init__()
        check_range("reward relative", strength=(strength, 0, MAX_STRENGTH))
        for name, words in {"good": good, "bad": bad}.items():
            if is_blank(words):
                raise DraftuneError(f"{name} of reward relative must have words, not {words!r}")
        if good == bad:
            raise DraftuneError(f"good and bad of reward relative must differ, and both are {good!r}")
        for _, part in reward.terms:
            if not any(
                inner.reads_prompts or isinstance(inner, FunctionReward) for inner in sub_rewards(part).values()
            ):
                raise DraftuneError(f"relative compares two prompts, and {part.label!r} reads none: add it outside")
        self.reward, self.good, self.bad, self.strength = reward, good, bad, strength
        self.label = f"relative({reward.label})"

    def load(self) -> None:
        self.reward.load_weights()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        good, bad = ([f"{words}. {prompt}" for prompt in prompts] for words in (self.good, self.bad))
        return (1 + self.strength) * self.reward(images, good) - self.reward(images, bad)
