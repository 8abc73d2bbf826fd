"""Checks of a run: the rewards before training, and whether the first updates have an effect."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

from draftune.errors import DraftuneError
from draftune.evaluation.metrics import score_batches
from draftune.evaluation.reward_check import check_reward, tell_truncated
from draftune.models.tiny_decoder import check_likeness
from draftune.rewards.base import check_prompts
from draftune.runs.checkpoint import preserve_rng
from draftune.training.context import TrainContext
from draftune.training.gradient_check import AUDITED
from draftune.training.step import TrainStep
from draftune.utils.logging import logger

MIN_VISIBLE_CHANGE = 0.5 / 255
"""Smallest change of a pixel that 8 bits can show."""


class RunChecks:
    """Check the rewards before training, and the effect of the first updates."""

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.prompts = list(islice(cycle(context.prompts), 2))
        self.warned = False

    def check_rewards(self, shown: Sequence[str]) -> dict[str, dict[str, float]]:
        """Compute the rewards on two images of the base model, so that their errors appear before training.

        Args:
            shown: Prompts of the sample grids.

        Returns:
            What `check_reward` measured of each term of the training reward.

        Raises:
            DraftuneError: a reward fails, has no gradient, or does not fit the prompts.
        """
        c, s, device = self.context, self.context.settings, self.context.model.device
        asked = [*c.prompts, *(c.eval_prompts or ())]
        tell_truncated(asked, c.model, [c.reward, c.eval_rewards], s.negative_prompt)
        with c.processes.raise_on_all_ranks():
            check_prompts(c.reward, c.prompts)
            for reward in (c.reward, c.eval_rewards):
                try:
                    if reward is not None:
                        check_prompts(reward, c.eval_prompts or shown)
                except DraftuneError as error:
                    raise DraftuneError(f"the evaluation prompts (eval_prompts) do not fit: {error}") from error
        self.base_images = c.sample_images(self.prompts, range(2))
        with c.processes.raise_on_all_ranks():
            if c.model.tiny_decoder is not None:
                check_likeness(c.model, self.prompts, c.schedule, s.guidance_scale, s.negative_prompt)
            report = check_reward(c.reward, self.base_images.to(device), self.prompts, c.method.needs_reward_gradient)
            if c.eval_rewards is not None:
                evaluated = list(islice(cycle(c.eval_prompts or self.prompts), 2))
                score_batches(c.eval_rewards, self.base_images, evaluated, device)
        return report

    def check_gradients(self, train_step: TrainStep) -> None:
        """Warn once if the gradient was exactly 0 in the last updates, with the method's reason if it knows one."""
        if self.warned or train_step.without_gradient < min(AUDITED, self.context.settings.steps):
            return
        self.warned = True
        reason = train_step.why_constant or (
            "the losses do not depend on the LoRA now: look for clamps or saturation in the reward"
        )
        logger.warning(f"the gradient was exactly 0 in the last {train_step.without_gradient} updates: {reason}")

    @preserve_rng()
    def check_images_changed(self, done: int) -> None:
        """Warn if the first updates changed no image, although there was a gradient."""
        # The same batch as in `check_rewards`: batches of another size differ in the last digits.
        change = (self.context.sample_images(self.prompts, range(2)) - self.base_images).abs().max()
        if change < MIN_VISIBLE_CHANGE:
            logger.warning(
                f"after {done} updates the images are still those of the base model: raise the learning rate"
            )
