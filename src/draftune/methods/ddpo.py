"""DDPO and DPOK: policy gradients, which need no gradient of the reward."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, register
from draftune.methods.draft import check_min
from draftune.methods.policy_gradient import PolicyGradient


@register("ddpo")
@dataclass
class DDPO(PolicyGradient):
    """DDPO: policy gradient that raises the probability of images with a reward above their prompt's average.

        l = mean over elements of log N(x_s; mean(x_t), tau^2 I),   w = exp(l - l_old)
        loss = mean over batch and trained steps of  -min(A w, A clip(w, 1 - clip_range, 1 + clip_range))

    Black et al., 2023, arXiv:2305.13301 (DDPO-IS, with PPO's clipping). The means are those of the authors' code
    (kvablack/ddpo-pytorch, ddim_with_logprob.py line 190 and train.py lines 74-79 and 539-551). Images come from the
    ancestral sampler (DDIM with eta = 1). A last step that ends at sigma = 0 is deterministic and is not trained. For
    fresh images and A = r, the expected gradient is that of -E[r], divided by a latent's elements times the random
    steps.

    The advantage A is the reward standardized by the mean and standard deviation of its prompt's last rewards. T
    denoiser calls without gradient, then one with gradient for each trained step and inner epoch. The reward needs no
    gradient. Use it if the reward is not differentiable and queries are cheap.

    Attributes:
        inner_epochs: Optimizer steps on the same images, 1 or more. w differs from 1 from the second on. Default: 1.
        clip_range: Clipping range of the importance ratio w, above 0. Default: 1e-4.
        timestep_fraction: Fraction of the random steps in the loss, sampled for each image batch and epoch, above 0
            and at most 1. Default: 1.
        beta: Weight of the KL divergence to the base model at each trained step, as a mean over elements and steps,
            0 or more. Default: 0.
        buffer_size: Number of last rewards of a prompt in its statistics, at least `min_count`. Default: 32.
        min_count: Rewards that a prompt needs for its own statistics, 2 or more. With fewer, all rewards of the
            update are used. Default: 16.
        adv_clip_max: Bound of the advantage's magnitude, above 0. Default: 5.
    """

    buffer_size: int = 32
    min_count: int = 16
    adv_clip_max: float = 5.0
    rewards: dict[str, deque[float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_min("min_count", self.min_count, 2)
        check_min("buffer_size", self.buffer_size, self.min_count)
        if not self.adv_clip_max > 0:
            raise DraftuneError(f"adv_clip_max must be above 0, got {self.adv_clip_max}")

    def update_advantages(self, batches: Sequence[Batch], rewards: Tensor) -> Tensor:
        return self.advantages([prompt for batch in batches for prompt in batch.all_prompts], rewards)

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Standardize rewards [N] by the statistics of their prompts and clip them; update these statistics."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        scaled = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            known = self.rewards[prompt]
            seen = rewards.new_tensor(list(known)) if len(known) >= self.min_count else rewards
            # The mean of equal numbers may differ from them by rounding, and Adam would scale that difference up.
            equal = (seen == reward).all()
            scaled.append(torch.where(equal, 0, (reward - seen.mean()) / (seen.std(unbiased=False) + 1e-6)))
        return torch.stack(scaled).clamp(-self.adv_clip_max, self.adv_clip_max)

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": {prompt: list(rewards) for prompt, rewards in self.rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards = {prompt: deque(seen, self.buffer_size) for prompt, seen in state["rewards"].items()}


@register("dpok")
@dataclass
class DPOK(DDPO):
    """DPOK: policy gradient with a KL divergence to the base model at every step, `ddpo` with `beta` above 0.

        loss = loss of ddpo + beta * mean over elements and steps of  |mean(x_t) - mean_base(x_t)|^2 / (2 tau^2)

    Fan et al., 2023, arXiv:2305.16381. As `ddpo`, with one base call without gradient for each trained step. Use it
    instead of `ddpo` if images lose diversity.

    The default of `beta`, 0.01, is `kl_weight` in the authors' code (google-research/dpok, train_online_pg.py and the
    README's run for one prompt; 0.1 for many prompts). The authors' code differs in four points. It multiplies the
    reward by `reward_weight` (10 and 1000) and does not standardize it. Its divergence is the mean squared difference
    of the predicted noises, without the step's factor. It clamps the ratio on both sides. Its baseline is a learned
    value function.

    Attributes:
        beta: Weight of the KL divergence, 0 or more. Default: 0.01. Other attributes as in `ddpo`.
    """

    beta: float = 0.01
