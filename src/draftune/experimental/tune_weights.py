"""A few numbers tuned by a reward: the weights of LoRAs and the guidance. Nothing is trained, no gradient is wanted."""

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
from draftune.evaluation.eval_spec import recalled
from draftune.evaluation.metrics import interval, score_batches
from draftune.experimental.zeroth_order import Estimator, Values
from draftune.lora import set_lora_scales
from draftune.models import Model, load_model
from draftune.models.base import default_device
from draftune.prompts import load_prompts
from draftune.rewards import Reward, find_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.online import taught
from draftune.runs.load import find_all, open_loras
from draftune.runs.merge import check_weights, mix_loras
from draftune.settings import Settings
from draftune.training.checks import tell_truncated
from draftune.training.data import PromptOrder
from draftune.utils.tables import write_csv, write_json

GUIDANCE = "guidance_scale"
SEEDS = 2**31


@dataclass(frozen=True)
class Knob:
    """A number between two bounds. Raises DraftuneError where it does not start between them."""

    name: str
    start: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise DraftuneError(f"the bounds of {self.name!r} must be two numbers, the lower first")
        if not self.low <= self.start <= self.high:
            raise DraftuneError(
                f"{self.name!r} starts at {self.start:g}, which is not from {self.low:g} to {self.high:g}"
            )

    def at(self, place: float) -> float:
        """Its value at a place between its bounds, 0 to 1."""
        return self.low + (self.high - self.low) * place

    @property
    def place(self) -> float:
        return (self.start - self.low) / (self.high - self.low)


@dataclass
class KnobSearch:
    """What `tune_knobs` found."""

    knobs: list[Knob]
    found: dict[str, float]
    """By the knob's name: a LoRA's source, or guidance_scale."""
    steps: list[dict[str, float]]
    """For each step the mean reward of all its pictures, not a number where none was asked for, where the knobs stood
    after it, and the queries so far."""
    before: Tensor
    after: Tensor
    """Rewards [N] of the same prompts and seeds, none of them climbed on, where the knobs started and as they are."""
    queries: int
    """All scored pictures, these among them."""
    model: str | None
    skip_text_encoder: bool

    @property
    def difference(self) -> tuple[float, float, float]:
        """How much better the other pictures are, and a 95 % interval of that."""
        gained = (self.after - self.before).double()
        return float(gained.mean()), *interval(gained)

    @property
    def weights(self) -> list[tuple[str, float]]:
        """The LoRAs as `mix_loras` takes them."""
        return [(name, value) for name, value in self.found.items() if name != GUIDANCE]

    def mix(self, output: Path | str) -> Path:
        """Writes the LoRAs, at the weights found, as one; returns the file's path."""
        return mix_loras(self.weights, output, self.model, self.skip_text_encoder)

    def write(self, folder: Path) -> None:
        """FOLDER/knobs.json and FOLDER/steps.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "steps.csv", self.steps)
        gained, low, high = self.difference
        said: dict[str, Any] = {"knobs": self.found, "start": {knob.name: knob.start for knob in self.knobs}}
        said |= {"before": float(self.before.mean()), "after": float(self.after.mean()), "difference": gained}
        write_json(folder / "knobs.json", said | {"interval": [low, high], "reward_queries": self.queries})


def tune_knobs(
    loras: Sequence[tuple[str, float]],
    reward: str | Reward | Callable[..., Any],
    prompts: str | list[str] | None = None,
    *,
    model: str | None = None,
    weight_bounds: tuple[float, float] = (0.0, 1.5),
    guidance_bounds: tuple[float, float] | None = None,
    steps: int = 20,
    batch_size: int = 4,
    coordinates: int = 4,
    step: float = 0.1,
    learning_rate: float = 0.05,
    checked: int = 16,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    cpu: bool = False,
    mixed_precision: str = "no",
    skip_text_encoder: bool = False,
    progress: bool = False,
) -> KnobSearch:
    """Climbs a reward, with a gradient or without, by weights of LoRAs, ("runs/a", 0.7) to start at 0.7, and guidance.

    `guidance_bounds` makes the guidance scale a knob; without any LoRA, `model` names the model. Each of the steps
    draws fresh prompts and seeds and, of the same ones at both sides of each knob it asks about, `batch_size` pictures.
    It asks about `coordinates` knobs, drawn the more often the more strongly they answered so far, or about all where
    these are no more. `step`, the way to a side, and `learning_rate`, of Adam, are shares of a knob's range. What is
    found is the mean of where the knobs stood in the last half of the steps; it is `checked` on that many other
    pictures. Prompts and drawing default to those of the first LoRA's run. Raises DraftuneError.
    """
    if steps < 1 or batch_size < 1 or checked < 2:
        raise DraftuneError("steps and batch_size must be at least 1, and checked at least 2")
    if not (0 < step < 0.5 and 0 < learning_rate < 1):
        raise DraftuneError(
            f"step must be above 0 and below 0.5, learning_rate below 1, not {step} and {learning_rate}"
        )
    check_sources(loras, model, guidance_bounds)
    found = find_all([source for source, _ in loras], model, skip_text_encoder)
    if len(bases := list(dict.fromkeys(tuned.base for tuned in found))) > 1:
        raise DraftuneError(
            f"LoRAs of {bases[0]!r} and of {bases[1]!r}; if these are one model, give its name (--model)"
        )
    settings = found[0].settings if found else Settings(model=model or "")
    asked: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    asked["negative_prompt"] = negative_prompt
    settings = replace(settings, **{name: value for name, value in asked.items() if value is not None})
    knobs = [Knob(source, weight, *weight_bounds) for source, weight in loras]
    if guidance_bounds:
        knobs.append(Knob(GUIDANCE, settings.guidance_scale, *guidance_bounds))
    wanted: list[Callable[[], Any]] = [
        lambda: taught(find_reward(reward)),
        lambda: recalled("prompts", prompts, settings.prompts, load_prompts),
    ]
    score, texts = gather(*wanted)
    check_prompts(score.ready(), texts)
    opened = open_loras({f"knob-{i}": tuned for i, tuned in enumerate(found)}, cpu, mixed_precision) if found else None
    opened = opened or load_model(settings.model, mixed_precision).to(default_device(cpu), mixed_precision)
    opened.check_prompts(texts, settings.negative_prompt)
    tell_truncated(texts, opened, [score], settings.negative_prompt)
    judge = Judge(opened, score.ready().to(opened.device), knobs, texts, settings, seed)
    start = torch.tensor([knob.place for knob in knobs])

    passed: list[Tensor] = []
    rows: list[dict[str, float]] = []
    estimator, place = Estimator(coordinates=min(coordinates, len(knobs))), start.clone()
    optimizer = torch.optim.Adam([place], learning_rate, maximize=True)
    bar = tqdm(range(1, steps + 1), desc="knobs", unit="step", disable=not progress)
    for i in bar:
        values = judge.fresh(batch_size)
        # Both sides of every difference keep to the bounds.
        place.grad = estimator(values, place.clamp(step, 1 - step), step, generator=judge.generator)
        optimizer.step()
        place.clamp_(0, 1)
        passed.append(place.clone())
        rows.append({"step": i, "reward": judge.mean, **judge.named(place), "reward_queries": judge.queries})
        bar.set_postfix(reward=f"{judge.mean:.3f}")
    end = torch.stack(passed[len(passed) // 2 :]).mean(0)
    before, after = judge.rewards(torch.stack([start, end]), *judge.draw(checked))
    return KnobSearch(knobs, judge.named(end), rows, before, after, judge.queries, model, skip_text_encoder)


def check_sources(
    loras: Sequence[tuple[str, float]], model: str | None, guidance_bounds: tuple[float, float] | None
) -> None:
    """Raises DraftuneError where there is nothing to tune, or no telling what."""
    sources = [source for source, _ in loras]
    if not loras and guidance_bounds is None:
        raise DraftuneError("there is nothing to tune: give LoRAs, or bounds of the guidance (--guidance-bounds 1,10)")
    if not loras and model is None:
        raise DraftuneError("without a LoRA, the model must be named (--model)")
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise DraftuneError(f"the LoRA {twice[0]!r} is given twice")
    if guidance_bounds is not None and not guidance_bounds[0] >= 1:
        raise DraftuneError(
            f"the guidance scale's bounds must be at least 1, which is none, not {guidance_bounds[0]:g}"
        )
    if loras:
        check_weights(loras)


class Judge:
    """Draws pictures with the knobs wherever they are put, scores them, and counts what it scores."""

    def __init__(
        self, model: Model, reward: Reward, knobs: Sequence[Knob], prompts: list[str], settings: Settings, seed: int
    ) -> None:
        self.model, self.reward, self.knobs, self.prompts, self.settings = model, reward, knobs, prompts, settings
        self.schedule = model.schedule(settings.num_inference_steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = PromptOrder(len(prompts), self.generator)
        self.queries, self.mean = 0, math.nan

    def named(self, place: Tensor) -> dict[str, float]:
        """The knobs' values at places [d] between their bounds."""
        return {knob.name: knob.at(float(p)) for knob, p in zip(self.knobs, place, strict=True)}

    def draw(self, count: int) -> tuple[list[str], list[int]]:
        """Fresh prompts and seeds."""
        prompts = [self.prompts[i] for i in self.order.draw(count)]
        return prompts, torch.randint(SEEDS, (count,), generator=self.generator).tolist()

    def fresh(self, count: int) -> Values:
        """Places [N, d] to mean rewards [N], all with the same prompts and seeds, which no call before had."""
        prompts, seeds = self.draw(count)
        self.mean = math.nan

        def values(places: Tensor) -> Tensor:
            means = self.rewards(places, prompts, seeds).mean(1)
            self.mean = float(means.mean())
            return means

        return values

    def rewards(self, places: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The rewards [N, B] of pictures drawn with the knobs at each of the places [N, d]. Raises DraftuneError."""
        found = torch.stack([self.rewards_at(self.named(place), prompts, seeds) for place in places])
        if not found.isfinite().all():
            raise DraftuneError(f"the reward {self.reward.label!r} became infinite or undefined")
        return found

    def rewards_at(self, values: Mapping[str, float], prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        s = self.settings
        scales = {f"knob-{i}": values[knob.name] for i, knob in enumerate(self.knobs) if knob.name != GUIDANCE}
        if scales:
            set_lora_scales(self.model, scales)
        guidance = values.get(GUIDANCE, s.guidance_scale)
        pictures = self.model.generate(prompts, seeds, self.schedule, guidance, s.negative_prompt)
        self.queries += len(pictures)
        with torch.random.fork_rng():
            # A reward that draws random numbers draws the same wherever the knobs are.
            torch.manual_seed(seeds[0])
            return score_batches(self.reward, pictures, prompts, self.model.device)[0]
