"""A reward's threshold: what is above it counts, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from draftune.errors import DraftuneError
from draftune.experimental.threshold_smoothing import smooth_step
from draftune.rewards.base import Reward, register


class Above(Reward):
    """1 where a reward is `level` or more, else 0; in a block of `smoothed`, σ((reward − level) / (spread · width))."""

    def __init__(self, reward: Reward, level: float, spread: float = 1.0) -> None:
        super().__init__()
        if not 0 < spread < math.inf:
            raise DraftuneError(f"spread of reward above must be above 0, not {spread}")
        self.reward, self.level, self.spread = reward, level, spread
        self.label = f"above({reward.label})"

    def load(self) -> None:
        self.reward.ready()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return smooth_step((self.reward(images, prompts) - self.level) / self.spread)


@register("above")
def above(reward: Reward, level: float, spread: float = 1.0) -> Reward:
    """1 where a reward is `level` or more, else 0: `above(emoji-aesthetic, level=6, spread=1.5)`, with `--smoothing`.

    `spread`: how much the reward differs from picture to picture, so that one width of smoothing fits all thresholds.
    Without `--smoothing` it has no gradient. Where the wrapped reward has one, to climb that is the plain way; the
    threshold says that more than enough is worth nothing. Weights and sizes of pictures are those of the wrapped one;
    it is over-optimised as that is, up to the level.
    """
    return Above(reward, level, spread)
