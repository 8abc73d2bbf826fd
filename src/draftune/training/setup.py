"""Set up a run: resolve the settings, check what is cheap to check, then load the rewards and the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from draftune.errors import DraftuneError, gather, unknown
from draftune.evaluation.criterion import DENOISER_MSE, DIVERSITY, EVAL_PREFIX, PIXEL_L1, parse_criterion
from draftune.evaluation.metrics import has_diversity, normalized_weights
from draftune.lora import freeze_lora
from draftune.methods import Method, load_method
from draftune.models import DiffusionModel, load_model
from draftune.models.loading import local_pipeline
from draftune.models.quantization import BACKENDS, check_quantization
from draftune.models.tiny_decoder import find_small_decoder, load_small_decoder
from draftune.prompts import split_prompts
from draftune.published import Defaults
from draftune.recommended import SAMPLING, fit_to_steps
from draftune.rewards import Reward, WeightedSum, parse_reward
from draftune.rewards.online import require_trained
from draftune.runs.logs import COUNTERS, EVALUATIONS, NOT_SCORES
from draftune.runs.run_dir import RunFolder
from draftune.sampling.schedule import Schedule
from draftune.sampling.step_range import StepRange
from draftune.settings import Settings
from draftune.training.context import TrainContext
from draftune.training.continued import ContinuedRun, resolve_continued_run
from draftune.training.distributed import accelerator, processes_of, warn_ignored_launcher_options
from draftune.training.fsdp import fsdp_requested, shard
from draftune.training.optim import check_optimizer
from draftune.training.placement import to_device
from draftune.training.prefix_mode import check_prefix, check_prefix_sampler
from draftune.training.rating import check_rating
from draftune.training.trackers import installed_trackers
from draftune.utils.logging import logger
from draftune.utils.model_options import ModelOptions, is_checkpoint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ModelLike: TypeAlias = "str | Path | DiffusionModel | DiffusionPipeline"
RewardLike: TypeAlias = "str | Reward | Callable[..., Tensor]"
PromptsLike: TypeAlias = "str | Path | Sequence[str]"
Value: TypeAlias = "str | int | float | bool | None"


def prepare(
    model: ModelLike | None,
    reward: RewardLike | None,
    prompts: PromptsLike | None,
    method: str | Method | None,
    eval_rewards: RewardLike | None,
    settings: Settings | None,
    values: dict[str, Any],
) -> TrainContext:
    """Check and load everything that a run needs. Nothing is written yet. See `Trainer` for the arguments.

    Raises:
        DraftuneError: something is missing or does not fit, reported as early as possible.
    """
    if model is not None and not isinstance(model, (str, Path, DiffusionModel)):
        model = load_model(model)
    named = {"model": model, "reward": reward, "prompts": prompts, "eval_rewards": eval_rewards, "method": method}
    values = values | {name: describe(value) for name, value in named.items() if value is not None}
    settings = resolve_settings(model, settings, values)
    source = settings.prompts if prompts is None or isinstance(prompts, (str, Path)) else list(prompts)
    texts, held_out = split_prompts(source, settings.eval_prompts or "", settings.seed)
    eval_texts = held_out or None
    method = method if isinstance(method, Method) else load_method(settings.method)
    best_columns = check_settings(settings, method, isinstance(model, DiffusionModel))
    past = resolve_continued_run(settings)
    if past is not None and past.kept:
        from draftune.experimental.retention import Retention

        method = Retention(method, settings.retain_weight)
        if not settings.reward_normalization_samples:
            logger.warning(
                f"--retain-weight {settings.retain_weight:g} is relative to the scale of the reward: "
                "--reward-normalization-samples 32 makes its standard deviation 1"
            )
    if not isinstance(model, DiffusionModel) and not is_checkpoint(settings.model):
        local_pipeline(settings.model)  # refuses a mistyped name before anything is said of rewards
    # transformers loads weights differently once torch.distributed is initialized: do it before anything is loaded.
    made = accelerator(settings)
    processes = processes_of(made)
    warn_ignored_launcher_options(settings)
    with processes.raise_on_all_ranks():
        contents: dict[str, Sequence[str]] = {"prompts": texts, "eval_prompts": eval_texts or []}
        if past is not None:
            contents |= {"retain_prompts": past.kept, "init_lora": [past.checksum]}
        # The weights of all rewards are located before any network is loaded.
        evaluated = eval_rewards or settings.eval_rewards
        attempts: list[Callable[[], Any]] = [
            lambda: parse_reward(settings.reward if reward is None else reward),
            lambda: parse_reward(evaluated) if evaluated else None,
            lambda: RunFolder(settings, contents, processes),
        ]
        score, judge, folder = gather(*attempts)
        check_weights(score)
        check_rating(settings, score, processes.count)
        if settings.reward_normalization_samples:
            require_trained(score)
        check_columns(settings, best_columns, score, judge, past)
        decoder = find_small_decoder(settings.tiny_decoder) if settings.tiny_decoder else None
        if not isinstance(model, DiffusionModel):
            # The text encoders are loaded where prompts are encoded, in `to_device`.
            model = load_model(
                settings.model if model is None else model,
                settings.mixed_precision,
                settings.quantization,
                made.device,
                text_encoders=False,
                **ModelOptions.of(settings)._asdict(),
            )
        model.tiny_decoder = load_small_decoder(decoder, model) if decoder else None
    folder.check_shared()
    with processes.raise_on_all_ranks():
        sharded = fsdp_requested() and processes.count > 1
        context = TrainContext(
            settings=replace(folder.settings, model=model.name),
            folder=folder,
            accelerator=made,
            method=method,
            model=model,
            pixel_clamp=model.pixel_clamp,
            schedule=set_up_model(settings, model, method, [*texts, *(eval_texts or ())], past),
            reward=score,
            eval_rewards=judge,
            prompts=texts,
            eval_prompts=eval_texts,
            continued_run=past,
        )
        to_device(context, sharded)
    if sharded:
        shard(model, made.device, processes.count)
    for name in ("validation_steps", "metric_for_best_model"):
        if getattr(settings, name) and not eval_texts:
            logger.warning(f"{name}={getattr(settings, name)} has no effect: there are no evaluation prompts")
    return context


def resolve_settings(model: ModelLike | None, settings: Settings | None, values: dict[str, Any]) -> Settings:
    """Return the settings with `values` in them, and the recommended values of model and method for the rest."""
    base = asdict(settings) if settings else {}
    if settings is None and isinstance(model, DiffusionModel):
        # The name of a loaded model may be no folder that Settings can look into.
        base = {name: model.recommended[name] for name in Defaults._fields}
        base["method"] = fit_to_steps(base["method"], values.get("num_inference_steps"))
    values = {name: value for name, value in values.items() if name not in SAMPLING or value is not None}
    return Settings.from_mapping(base | values)


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


def describe(value: Any) -> str:
    """Return the text that config.yaml stores for an object that was passed in Python."""
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"{len(value)} prompts given in Python"
    if isinstance(value, Method):
        return type(value).__name__
    names = (getattr(value, attribute, None) for attribute in ("name", "expression", "label", "__name__"))
    return str(next(filter(None, names), "given"))


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


def set_up_model(
    s: Settings, model: DiffusionModel, method: Method, prompts: Sequence[str], past: ContinuedRun | None
) -> Schedule:
    """Set the model's size, timesteps and pixel clamp, and freeze the LoRA that training starts from.

    Returns:
        The sampling schedule.

    Raises:
        DraftuneError: model, method, prompts and settings do not fit each other.
    """
    if past is not None:
        freeze_lora(model, past.lora, s.skip_text_encoder_lora)
        prompts = [*prompts, *past.kept, *past.prompts]
    model.check_prompts(prompts, s.negative_prompt)
    model.set_size(s.height, s.width)
    model.set_sampler_options(s.timestep_spacing, s.set_alpha_to_one)
    if past is not None:
        past.compare(model.sampler_options)
    model.pixel_clamp = s.pixel_clamp
    model.lora_steps = StepRange.parse(s.lora_steps)
    schedule = model.schedule(s.num_inference_steps)
    method.check(schedule)
    check_trained_steps(s, method, schedule)
    check_prefix_sampler(s, model, schedule)
    return schedule


def check_trained_steps(s: Settings, method: Method, schedule: Schedule) -> None:
    """Raise DraftuneError if no step of `lora_steps` can get a gradient from the method."""
    if not method.trained_steps(schedule):
        tuned = [i for i, step in enumerate(schedule.steps) if step.tuned]
        reached, count = method.steps_with_gradient(schedule), len(schedule)
        raise DraftuneError(
            f"lora_steps={s.lora_steps} holds the steps {tuned[0]} to {tuned[-1]} of {count}, counted from 0, but the "
            f"method {s.method!r} only trains {min(reached)} to {max(reached)}: extend the range, or use draft or "
            f"draft_k(k={count - tuned[-1]})"
        )


def with_normalized_reward(context: TrainContext) -> TrainContext:
    """Divide each term of the reward by its standard deviation over images of the base model.

    A resumed run takes the weights from its checkpoint. `reward_normalization_samples` is the number of images.

    Returns:
        The context with the new reward. Its settings have the weights in the reward's expression, for config.yaml.
    """
    s, processes, device = context.settings, context.processes, context.model.device
    if (weights := context.folder.reward_weights) is None:
        prompts = list(islice(cycle(context.prompts), s.reward_normalization_samples))
        images = context.sample_images(prompts, range(s.reward_normalization_samples))
        with processes.raise_on_all_ranks():
            weights = normalized_weights(context.reward, images, prompts, device)
    # Processes may differ in the last digits.
    weights = processes.broadcast(weights)
    reward = WeightedSum([(weight, part) for weight, (_, part) in zip(weights, context.reward.terms, strict=True)])
    reward.set_chunk_size(s.reward_batch_size)
    return replace(
        context,
        reward=reward,
        settings=replace(s, reward=reward.expression or reward.label, reward_normalization_samples=0),
    )
