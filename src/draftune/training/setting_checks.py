"""Checks of the settings of a run that need no file of the model or of a reward."""

from __future__ import annotations

from collections import defaultdict

from draftune.errors import DraftuneError, unknown
from draftune.evaluation.criterion import DENOISER_MSE, DIVERSITY, EVAL_PREFIX, PIXEL_L1, parse_criterion
from draftune.evaluation.metrics import has_diversity
from draftune.methods import Method
from draftune.models.quantization import BACKENDS, check_quantization
from draftune.rewards import Reward
from draftune.runs.logs import COUNTERS, EVALUATIONS, NOT_SCORES
from draftune.settings import Settings
from draftune.training.continued import ContinuedRun
from draftune.training.fsdp import fsdp_requested
from draftune.training.optim import check_optimizer
from draftune.training.prefix_mode import check_prefix
from draftune.training.trackers import installed_trackers


def check_settings(settings: Settings, method: Method, loaded: bool = False) -> dict[str, float]:
    """Check what needs no file of the model or of a reward.

    Args:
        settings: The settings.
        method: The training method.
        loaded: Whether the model is loaded already.

    Returns:
        The weights of the columns in `metric_for_best_model`.

    Raises:
        DraftuneError: settings do not fit each other, the method or the installed packages.
    """
    if settings.early_stopping_patience and not (settings.validation_steps and settings.eval_prompts):
        raise DraftuneError(
            "early_stopping_patience counts evaluations: it needs --eval-prompts and --validation-steps"
        )
    columns = parse_criterion(settings.metric_for_best_model) if settings.metric_for_best_model else {}
    check_method(settings, method)
    check_quantization(settings.quantization, settings.mixed_precision, loaded)
    if settings.reward_precision in BACKENDS:
        check_quantization(settings.reward_precision, "no", name="reward_precision")
    check_optimizer(settings, method)
    installed_trackers(settings)
    return columns


def check_method(settings: Settings, method: Method) -> None:
    """Raise DraftuneError for settings that the method does not support."""
    s, name = settings, f"the method {settings.method!r}"
    if s.mixed_precision == "fp16" and not method.supports_fp16:
        raise DraftuneError(f"{name} does not work in fp16: use bf16 or no")
    images = s.batch_size * s.gradient_accumulation_steps
    if images < method.min_images_per_update:
        raise DraftuneError(
            f"{name} compares the rewards of an update with each other: batch_size times gradient_accumulation_steps "
            f"must be at least {method.min_images_per_update}, not {images}"
        )
    check_groups(s, method)
    check_prefix(s, method)
    if s.offload and (s.quantization != "none" or s.compile or fsdp_requested()):
        raise DraftuneError("offload does not work with --quantization, --compile or FSDP: leave them out")
    if s.tiny_decoder and not method.needs_reward_gradient:
        raise DraftuneError(f"{name} uses no gradient of the reward: leave out tiny_decoder")


def check_groups(s: Settings, method: Method) -> None:
    """Raise DraftuneError unless the groups of images of one prompt fill an update, and are what the method needs."""
    size, name = s.num_images_per_prompt, f"the method {s.method!r}"
    if size < method.min_images_per_prompt:
        raise DraftuneError(
            f"{name} compares the images of a prompt: num_images_per_prompt must be at least "
            f"{method.min_images_per_prompt}, not {size}; with a --batch-size that is a multiple of it"
        )
    images = s.batch_size * s.gradient_accumulation_steps
    if images % size:
        raise DraftuneError(
            f"num_images_per_prompt={size} must divide the images of an update, batch_size times "
            f"gradient_accumulation_steps, which are {images}"
        )
    if method.whole_groups_per_batch and s.batch_size % size:
        raise DraftuneError(
            f"{name} compares images within a batch: num_images_per_prompt={size} must divide batch_size, which is "
            f"{s.batch_size}"
        )


def check_weights(reward: Reward) -> None:
    """Raise DraftuneError if all parts of a reward have the weight 0, or cancel."""
    totals: dict[str, float] = defaultdict(float)
    for weight, part in reward.terms:
        totals[part.expression or str(id(part))] += weight
    if not any(totals.values()):
        raise DraftuneError(f"all weights of the reward {reward.label!r} are 0 or cancel: there is nothing to train on")


def check_columns(
    settings: Settings,
    columns: dict[str, float],
    reward: Reward,
    eval_rewards: Reward | None,
    past: ContinuedRun | None,
) -> None:
    """Check the names of the columns of the evaluations.

    Args:
        settings: The settings.
        columns: The columns of `metric_for_best_model`.
        reward: The reward.
        eval_rewards: The evaluation rewards.
        past: The LoRA that training starts from.

    Raises:
        DraftuneError: a reward has the name of another column, or the evaluations will not have one of `columns`.
    """
    own = [reward.label, *reward.named_terms]
    judged = [f"{EVAL_PREFIX}{label}" for label in eval_rewards.named_terms] if eval_rewards is not None else []
    others = (*COUNTERS[EVALUATIONS], *NOT_SCORES, PIXEL_L1, DENOISER_MSE, DIVERSITY)
    if taken := [name for name in (*own, *judged) if name in others]:
        raise DraftuneError(f"a reward has the name {taken[0]!r}, which is another column of the logs: rename it")
    known = [*own, *(past.columns if past is not None else ()), *judged, PIXEL_L1, DENOISER_MSE]
    if eval_rewards is not None and has_diversity(eval_rewards, settings.num_validation_images):
        known.append(DIVERSITY)
    for column in columns:
        if column not in known:
            raise unknown("column of the evaluations", column, dict.fromkeys(known))
