"""Set up a run: resolve the settings, check what is cheap to check, then load the rewards and the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from draftune.errors import DraftuneError, gather
from draftune.evaluation.metrics import normalized_weights
from draftune.lora import freeze_lora, remove_lora
from draftune.methods import Method, load_method
from draftune.models import DiffusionModel, load_model
from draftune.models.loading import local_pipeline
from draftune.models.tiny_decoder import find_small_decoder, load_small_decoder
from draftune.prompts import split_prompts
from draftune.published import Defaults
from draftune.recommended import SAMPLING, fit_to_steps
from draftune.rewards import Reward, WeightedSum, parse_reward
from draftune.rewards.online import require_trained
from draftune.runs.run_dir import RunFolder
from draftune.sampling.schedule import Schedule
from draftune.sampling.step_range import StepRange
from draftune.settings import Settings
from draftune.training.context import TrainContext
from draftune.training.continued import ContinuedRun, resolve_continued_run
from draftune.training.distributed import accelerator, processes_of, warn_ignored_launcher_options
from draftune.training.fsdp import fsdp_requested, shard
from draftune.training.placement import to_device
from draftune.training.prefix_mode import check_prefix_sampler
from draftune.training.rating import check_rating
from draftune.training.setting_checks import check_columns, check_settings, check_weights
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
    folder.check_shared()
    with restored_on_error(model), processes.raise_on_all_ranks():
        model.tiny_decoder = load_small_decoder(decoder, model) if decoder else None
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
    # The embedded model has evaluation rewards by default.
    unused = ["validation_steps", "metric_for_best_model", *(["eval_rewards"] if model.name != "emoji" else [])]
    for name in unused if not eval_texts else ():
        if getattr(settings, name):
            logger.warning(f"{name}={getattr(settings, name)} has no effect: there are no evaluation prompts")
    return context


@contextmanager
def restored_on_error(model: DiffusionModel) -> Iterator[None]:
    """Undo after an error in the block what a run changes in the caller's model, so that the call can be repeated."""
    clamp, before = model.pixel_clamp, set(getattr(model.denoiser, "peft_config", ()))
    try:
        yield
    except BaseException:
        model.tiny_decoder, model.pixel_clamp = None, clamp
        if not before:
            remove_lora(model)
        raise


def resolve_settings(model: ModelLike | None, settings: Settings | None, values: dict[str, Any]) -> Settings:
    """Return the settings with `values` in them, and the recommended values of model and method for the rest."""
    base = asdict(settings) if settings else {}
    if settings is None and isinstance(model, DiffusionModel):
        # The name of a loaded model may be no folder that Settings can look into.
        base = {name: model.recommended[name] for name in Defaults._fields}
        base["method"] = fit_to_steps(base["method"], values.get("num_inference_steps"))
    values = {name: value for name, value in values.items() if name not in SAMPLING or value is not None}
    return Settings.from_mapping(base | values)


def describe(value: Any) -> str:
    """Return the text that config.yaml stores for an object that was passed in Python."""
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"{len(value)} prompts given in Python"
    if isinstance(value, Method):  # a resumed run compares the settings of the method too
        return repr(value) if is_dataclass(value) else type(value).__name__
    names = (getattr(value, attribute, None) for attribute in ("name", "expression", "label", "__name__"))
    return str(next(filter(None, names), "given"))


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
