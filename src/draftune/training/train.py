"""`draftune.train`: one call from a model and a reward to a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftune.methods import Method
from draftune.settings import Settings
from draftune.training.callbacks import Callback
from draftune.training.result import Run
from draftune.training.setup import ModelLike, PromptsLike, RewardLike, Value
from draftune.training.trainer import Trainer


def train(
    model: ModelLike | None = None,
    reward: RewardLike | None = None,
    prompts: PromptsLike | None = None,
    *,
    method: str | Method | None = None,
    eval_rewards: RewardLike | None = None,
    settings: Settings | None = None,
    callbacks: Sequence[Callback] = (),
    **values: Value,
) -> Run:
    """Fine-tune a LoRA on a reward by backpropagation through sampling; the model carries the LoRA afterwards.

    The arguments are those of `Trainer`.

    Returns:
        The run's folder, metrics and evaluations.

    Raises:
        DraftuneError: something is missing or does not fit, or the run cannot continue.
    """
    arguments: dict[str, Any] = {
        "method": method,
        "eval_rewards": eval_rewards,
        "settings": settings,
        "callbacks": callbacks,
    }
    return Trainer(model, reward, prompts, **arguments | values).train()
