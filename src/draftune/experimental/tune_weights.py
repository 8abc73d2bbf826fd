"""Tune the weights of LoRAs and the guidance scale on a reward, without any gradient of the reward or the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError, gather
from draftune.evaluation.eval_spec import arg_or_run_setting
from draftune.evaluation.metrics import interval, score_batches
from draftune.evaluation.reward_check import tell_truncated
from draftune.experimental.zeroth_order import Estimator
from draftune.lora import set_lora_scales
from draftune.models import DiffusionModel
from draftune.prompts import load_prompts
from draftune.rewards import Reward, load_reward, parse_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.online import require_trained
from draftune.runs.load import check_same_steps, load_base, load_base_with_loras, override, resolve_loras
from draftune.runs.merge import check_weights
from draftune.settings import Settings
from draftune.training.data import PromptSampler, sampled_first
from draftune.utils.devices import fork_rng
from draftune.utils.model_options import NO_OPTIONS, ModelOptions
from draftune.utils.tables import write_csv, write_json

GUIDANCE = "guidance_scale"
SEEDS = 2**31


@dataclass(frozen=True)
class Parameter1D:
    """A tuned number with its bounds. Raises DraftuneError if it does not start between them."""

    name: str
    """Source of a LoRA, or `guidance_scale`."""
    start: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise DraftuneError(f"the bounds of {self.name!r} must be two numbers, the lower first")
        if not self.low <= self.start <= self.high:
            raise DraftuneError(
                f"{self.name!r} must start between its bounds {self.low:g} and {self.high:g}, got {self.start:g}"
            )

    def at(self, place: float) -> float:
        """Convert a position in the unit interval to a value between the bounds."""
        return self.low + (self.high - self.low) * place

    @property
    def place(self) -> float:
        """The start as a position in the unit interval."""
        return (self.start - self.low) / (self.high - self.low)


@dataclass
class WeightSearch:
    """Result of `tune_weights`."""

    parameters: list[Parameter1D]
    values: dict[str, float]
    """Tuned values by name."""
    steps: list[dict[str, float]]
    """For each step the mean reward of its images, the values after it, and the reward queries so far.

    The mean reward is NaN if no number was sampled in the step.
    """
    before: Tensor
    """Rewards [N] at the start, of prompts and seeds that the search did not use."""
    after: Tensor
    """Rewards [N] at `values`, of the same prompts and seeds."""
    queries: int
    """Number of scored images."""

    @property
    def difference(self) -> tuple[float, float, float]:
        """Mean of `after - before` and the bounds of its 95% confidence interval."""
        gains = (self.after - self.before).double()
        return float(gains.mean()), *interval(gains)

    @property
    def weights(self) -> list[tuple[str, float]]:
        """Tuned LoRA weights as pairs (source, weight), as `merge_loras` takes them."""
        return [(name, value) for name, value in self.values.items() if name != GUIDANCE]

    def write(self, folder: Path) -> None:
        """Write the result to `folder`/weights.json and the steps to `folder`/steps.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "steps.csv", self.steps)
        gain, low, high = self.difference
        result: dict[str, Any] = {
            "values": self.values,
            "start": {parameter.name: parameter.start for parameter in self.parameters},
        }
        result |= {"before": float(self.before.mean()), "after": float(self.after.mean()), "difference": gain}
        write_json(folder / "weights.json", result | {"interval": [low, high], "reward_queries": self.queries})


def tune_weights(
    loras: Sequence[tuple[str, float]],
    reward: str | Reward | Callable[..., Any],
    prompts: str | list[str] | None = None,
    *,
    model: str | None = None,
    weight_bounds: tuple[float, float] = (0.0, 1.5),
    guidance_bounds: tuple[float, float] | None = None,
    steps: int = 20,
    batch_size: int = 4,
    num_parameters: int = 4,
    fd_step: float = 0.1,
    learning_rate: float = 0.05,
    num_images: int = 16,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    device: str = "auto",
    mixed_precision: str | None = None,
    quantization: str | None = None,
    reward_precision: str | None = None,
    skip_text_encoder: bool = False,
    options: ModelOptions = NO_OPTIONS,
    progress: bool = False,
) -> WeightSearch:
    """Maximize the mean reward over the weights of LoRAs and the guidance scale by finite differences and Adam.

        dR/dw_i ~ (R(w + h e_i) - R(w - h e_i)) / (2 h),  R = mean reward of the step's prompts and seeds

    Both sides of a difference use the same prompts and seeds (common random numbers), new ones in each step. The
    result is the mean of the iterates of the last half of the steps (Polyak averaging). It is then compared with the
    start on other prompts and seeds.

    Args:
        loras: Sources with their initial weights, such as ("runs/a", 0.7).
        reward: Any reward; no gradient is needed.
        prompts: Prompts or a prompt set. Default: those of the first LoRA's run.
        model: The base model; required without a LoRA.
        weight_bounds: Bounds of each LoRA's weight.
        guidance_bounds: Bounds of the guidance scale, at least 1; None does not tune it.
        steps: Number of Adam steps.
        batch_size: Images at each evaluated point.
        num_parameters: Expected number of differences in a step. If there are more numbers to tune, these are sampled
            in proportion to the magnitude of their past differences (`Estimator`).
        fd_step: h, as a fraction of the range between the bounds, above 0 and below 0.5.
        learning_rate: Adam's, as a fraction of that range, above 0 and below 1.
        num_images: Images of the final comparison, at least 2.
        reward_precision: Precision of the reward's weights, see `load_in_precision`.
        options: Where the base model's files come from, besides its name.

    Raises:
        DraftuneError: A setting is not allowed, the LoRAs belong to different models, or the reward is not finite.
    """
    if steps < 1 or batch_size < 1 or num_images < 2:
        raise DraftuneError(
            "steps and batch_size must be at least 1 and num_images at least 2, "
            f"got {steps}, {batch_size} and {num_images}"
        )
    if not (0 < fd_step < 0.5 and 0 < learning_rate < 1):
        raise DraftuneError(
            "fd_step must be above 0 and below 0.5 and learning_rate above 0 and below 1, "
            f"got {fd_step} and {learning_rate}"
        )
    check_sources(loras, model, guidance_bounds)
    sources = resolve_loras([source for source, _ in loras], model, skip_text_encoder, options)
    if len(bases := list(dict.fromkeys(source.base for source in sources))) > 1:
        raise DraftuneError(f"the LoRAs belong to {bases[0]!r} and {bases[1]!r}; if these are one model, set --model")
    check_same_steps([source.source for source in sources])
    settings = sources[0].settings if sources else Settings(model=model or "", **options._asdict())
    settings = override(
        settings,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        mixed_precision=mixed_precision,
        quantization=quantization,
    )
    parameters = [Parameter1D(source, weight, *weight_bounds) for source, weight in loras]
    if guidance_bounds:
        parameters.append(Parameter1D(GUIDANCE, settings.guidance_scale, *guidance_bounds))
    loaders: list[Callable[[], Any]] = [
        lambda: require_trained(parse_reward(reward)),
        lambda: arg_or_run_setting("prompts", prompts, settings.prompts, load_prompts),
    ]
    score, texts = gather(*loaders)
    check_prompts(load_reward(score, reward_precision), texts)
    if sources:
        adapters = {f"lora-{i}": replace(source, settings=settings) for i, source in enumerate(sources)}
        loaded = load_base_with_loras(adapters, device)
    else:
        loaded, chosen = load_base(settings, device)
        loaded.to(chosen, settings.mixed_precision)
    loaded.check_prompts(texts, settings.negative_prompt)
    tell_truncated(texts, loaded, [score], settings.negative_prompt)
    most = max([settings.guidance_scale, *(guidance_bounds or ())])
    loaded.cache_prompts(sampled_first(texts, steps * batch_size + num_images, seed), settings.negative_prompt, most)
    evaluator = WeightEvaluator(loaded, score.to(loaded.device), parameters, texts, settings, seed)
    start = torch.tensor([parameter.place for parameter in parameters])
    place, iterates = start.clone(), []
    rows: list[dict[str, float]] = []
    estimator = Estimator(coordinates=min(num_parameters, len(parameters)))
    optimizer = torch.optim.Adam([place], learning_rate, maximize=True)
    bar = tqdm(range(1, steps + 1), desc="tune-weights", unit="step", disable=not progress)
    for i in bar:
        batch, mean = evaluator.sample_batch(batch_size), math.nan

        def mean_rewards(places: Tensor) -> Tensor:
            nonlocal mean
            means = evaluator.rewards(places, *batch).mean(1)  # noqa: B023
            mean = float(means.mean())
            return means

        # The clamp keeps both points of every difference within the bounds.
        inner = place.clamp(fd_step, 1 - fd_step)
        place.grad = estimator(mean_rewards, inner, fd_step, generator=evaluator.generator)
        optimizer.step()
        place.clamp_(0, 1)
        iterates.append(place.clone())
        rows.append({"step": i, "reward": mean, **evaluator.named(place), "reward_queries": evaluator.queries})
        bar.set_postfix(reward=f"{mean:.3f}")
    end = torch.stack(iterates[len(iterates) // 2 :]).mean(0)
    before, after = evaluator.rewards(torch.stack([start, end]), *evaluator.sample_batch(num_images))
    return WeightSearch(parameters, evaluator.named(end), rows, before, after, evaluator.queries)


def check_sources(
    loras: Sequence[tuple[str, float]], model: str | None, guidance_bounds: tuple[float, float] | None
) -> None:
    """Raise DraftuneError if there is nothing to tune, no model, a LoRA twice, or a bound or weight out of range."""
    sources = [source for source, _ in loras]
    if not loras and guidance_bounds is None:
        raise DraftuneError("there is nothing to tune: give LoRAs, or bounds of the guidance (--guidance-bounds 1,10)")
    if not loras and model is None:
        raise DraftuneError("--model is required without a LoRA")
    if repeated := [source for source in sources if sources.count(source) > 1]:
        raise DraftuneError(f"the LoRA {repeated[0]!r} is given twice")
    if guidance_bounds is not None and not guidance_bounds[0] >= 1:
        raise DraftuneError(f"--guidance-bounds must be at least 1, which is no guidance, got {guidance_bounds[0]:g}")
    if loras:
        check_weights(loras)


class WeightEvaluator:
    """Sample and score images at given LoRA weights and guidance scale, and count the reward queries.

    A point [d] has one position in the unit interval for each tuned number.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        parameters: Sequence[Parameter1D],
        prompts: list[str],
        settings: Settings,
        seed: int,
    ) -> None:
        self.model, self.reward, self.parameters, self.prompts, self.settings = (
            model,
            reward,
            parameters,
            prompts,
            settings,
        )
        self.schedule = model.schedule(settings.num_inference_steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = PromptSampler(len(prompts), self.generator)
        self.queries = 0

    def named(self, place: Tensor) -> dict[str, float]:
        """Convert a point [d] to values by name."""
        return {parameter.name: parameter.at(float(p)) for parameter, p in zip(self.parameters, place, strict=True)}

    def sample_batch(self, count: int) -> tuple[list[str], list[int]]:
        """Sample new prompts and seeds."""
        prompts = [self.prompts[i] for i in self.order.next(count)]
        return prompts, torch.randint(SEEDS, (count,), generator=self.generator).tolist()

    def rewards(self, places: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Compute the rewards [N, B] of B prompts and seeds at N points [N, d]. Raise DraftuneError if not finite."""
        rewards = torch.stack([self.rewards_at(self.named(place), prompts, seeds) for place in places])
        if not rewards.isfinite().all():
            raise DraftuneError(f"the reward {self.reward.label!r} became infinite or undefined")
        return rewards

    def rewards_at(self, values: Mapping[str, float], prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Compute the rewards [B] at values by name."""
        s = self.settings
        scales = {
            f"lora-{i}": values[parameter.name]
            for i, parameter in enumerate(self.parameters)
            if parameter.name != GUIDANCE
        }
        if scales:
            set_lora_scales(self.model, scales)
        guidance = values.get(GUIDANCE, s.guidance_scale)
        images = self.model.sample_tensors(prompts, seeds, self.schedule, guidance, s.negative_prompt)
        self.queries += len(images)
        with fork_rng():
            # The same random numbers at every point, for a reward that samples some.
            torch.manual_seed(seeds[0])
            return score_batches(self.reward, images, prompts, self.model.device)[0]
