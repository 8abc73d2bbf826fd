"""Where the experiments' runs are made and kept: each once, whichever experiment asks for it."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from draftune.evaluation.metrics import evaluate
from draftune.lora import add_lora, load_lora, lora_parameters
from draftune.methods import Batch, load_method
from draftune.models import Model, load_model
from draftune.models.base import default_device
from draftune.prompts import load_prompts
from draftune.recommended import recommended
from draftune.reproduce.real import with_examples
from draftune.rewards import Reward, load_reward
from draftune.runs.run_dir import EVALUATIONS, METRICS, read_rows
from draftune.sampling.sampler import Latents
from draftune.training import train
from draftune.utils.memory import peak_memory
from draftune.utils.paths import written_whole

REWARD = "emoji_aesthetic"
JUDGE = "held-out/emoji_style_probability"
NAMED = "held-out/emoji_name_accuracy"
DIVERSITY = "held-out/diversity"
LV, ONE = "draft_lv(n=2)", "draft_k(k=1)"
GUIDANCE = recommended("emoji")["guidance_scale"]


@dataclass(frozen=True)
class Scale:
    """How much is done: the full measurement, or a quick one that shows that everything works."""

    steps: int = 40
    """Updates of a run."""
    long: int = 80
    """Updates of a run that goes past its best point."""
    eval_every: int = 10
    seeds: int = 3
    num_inference_steps: int = 20
    train_prompts: int = 45
    eval_prompts: int = 12
    eval_images: int = 2
    gradient_seeds: int = 12
    grid: int = 5
    """Values of each weight in the mixture of two LoRAs."""
    repeats: int = 5
    """Timed repetitions, of which the median counts."""
    rates: int = 3
    """Learning rates that a search begins with."""
    copies: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Values of DRaFT-LV's n; 2 is the paper's."""
    weights: int = 2
    """Weights at which an earlier training is kept."""
    policy_updates: int = 40
    policy_batches: int = 4
    """Batches of 8 pictures for one update of the policy gradient."""
    few_updates: int = 40
    few_batches: int = 5
    few: tuple[int, ...] = (3, 5)
    """Sampling steps to train for, where it is about few."""
    few_names: int = 64
    few_ruler: int = 50
    """The most steps that pictures are drawn with to compare with."""


FULL = Scale()
QUICK = Scale(
    steps=2,
    long=3,
    eval_every=2,
    seeds=1,
    num_inference_steps=4,
    train_prompts=4,
    eval_prompts=2,
    gradient_seeds=2,
    grid=2,
    repeats=1,
    rates=1,
    copies=(0, 2),
    weights=1,
    policy_updates=2,
    policy_batches=1,
    few_updates=2,
    few_batches=1,
    few=(3,),
    few_names=2,
    few_ruler=5,
)


@dataclass(frozen=True)
class Work:
    """A run that an experiment needs; whatever is not said is the embedded model's recommended value."""

    method: str
    steps: int
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's folder: of its method and settings, not of how long it is."""
        words = [self.method, *(f"{key}={value}" for key, value in sorted(self.settings.items())), f"seed={self.seed}"]
        return slug(" ".join(words))


@dataclass
class Record:
    """What a run left: a row for each update and each evaluation, and where its LoRA is."""

    metrics: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    folder: Path

    @property
    def final(self) -> dict[str, float]:
        return self.evaluations[-1]


class Lab:
    """Makes runs and measurements of the embedded model in a folder, and finds those that are there again."""

    def __init__(self, folder: Path, scale: Scale, examples: Path | None = None) -> None:
        self.folder, self.scale = folder, scale
        self.examples = examples
        """Real pictures, called as what they show is, where there are any."""

    @property
    def prompts(self) -> list[str]:
        """As many as the paper's animals, spread over the training names."""
        names = load_prompts("emoji")
        return names[:: max(1, len(names) // self.scale.train_prompts)][: self.scale.train_prompts]

    @property
    def eval_prompts(self) -> list[str]:
        """Names that were not trained on."""
        names = load_prompts("emoji-common")
        return names[:: len(names) // self.scale.eval_prompts][: self.scale.eval_prompts]

    def record(self, work: Work) -> Record | None:
        """What is there of a run, if all of it is."""
        folder = self.folder / work.name
        evaluations = read_rows(folder / EVALUATIONS, work.steps)
        if not evaluations or evaluations[-1]["step"] < work.steps:
            return None
        return Record(read_rows(folder / METRICS, work.steps), evaluations, folder)

    def lora(self, work: Work) -> Path:
        """The LoRA that a run left. It is that of its last update, so the run must not have been made longer."""
        record = self.run(work)
        assert len(read_rows(record.folder / METRICS)) == work.steps, f"{work.name} is longer than {work.steps}"
        return record.folder

    def run(self, work: Work) -> Record:
        """The run, made or taken up again where it is not finished."""
        if (record := self.record(work)) is not None:
            return record
        scale = self.scale
        texts = self.folder / "eval-prompts.txt"
        if not texts.is_file():
            with written_whole(texts) as temporary:
                temporary.write_text("\n".join(self.eval_prompts) + "\n", encoding="utf-8")
        values: dict[str, Any] = {
            "reward": REWARD,
            "prompts": self.prompts,
            "eval_prompts": str(texts),
            "eval_images": scale.eval_images,
            "eval_every": scale.eval_every,
            "save_every": scale.eval_every,
            "num_inference_steps": scale.num_inference_steps,
            "sample_every": 0,
            "sample_prompts": 1,
            "prefix_reuse": 1,
            # The graphs of pictures this small fit beside each other: the same gradients, sooner.
            "gradient_checkpointing": "no",
        }
        values |= {
            "method": work.method,
            "steps": work.steps,
            "seed": work.seed,
            "output": str(self.folder / work.name),
        }
        values |= work.settings
        values["reward"] = with_examples(values["reward"], self.examples, self.folder)
        train("emoji", **values)
        record = self.record(work)
        assert record is not None
        return record

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, as JSON has it; once measured it is read from its file."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            print(f"measuring {name}", file=sys.stderr)
            value = measure()
            with written_whole(path) as temporary:
                temporary.write_text(json.dumps(value), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    @cached_property
    def reward(self) -> Reward:
        return load_reward(REWARD).to(default_device())

    @cached_property
    def judges(self) -> Reward:
        return load_reward("emoji_name_accuracy + emoji_style_probability(style='3d')").to(default_device())

    def model(self) -> Model:
        """The embedded model, on the grid that it is trained on."""
        return load_model("emoji").to(default_device())

    def scores(self, model: Model, reward: Reward | None = None) -> dict[str, float]:
        """A model's scores on the held-out prompts, as in a run's evaluations."""
        schedule, images = model.schedule(self.scale.num_inference_steps), self.scale.eval_images

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
            return model.generate(prompts, seeds, schedule, GUIDANCE, batch_size=4)

        return evaluate(draw, reward or self.reward, self.judges, self.eval_prompts, images, model.device).scores

    def tuned(self, loras: Mapping[str, Path]) -> Model:
        """The model with LoRAs by name; `set_lora_scales` weighs them."""
        model = self.model()
        for name, folder in loras.items():
            load_lora(model, folder, name)
        return model

    def batch(self, model: Model, seed: int, size: int = 4) -> Batch:
        """The first prompts, always the same ones, with the noise of a seed."""
        generator = torch.Generator().manual_seed(seed)
        prompts, schedule = (self.prompts * size)[:size], model.schedule(self.scale.num_inference_steps)
        denoise, base = model.denoisers(prompts, schedule, GUIDANCE)
        noise = model.noise(generator, len(prompts))

        def reward(clean: torch.Tensor) -> torch.Tensor:
            return self.reward(model.decode(clean), prompts)

        return Batch(prompts, Latents(noise), schedule, denoise, base, reward, generator)

    def gradients(self, method: str, seed: int) -> list[torch.Tensor]:
        """The gradient of each of a method's losses, by the fresh LoRA's weights, for the same prompts."""
        model = self.model()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            add_lora(model, 8)
        parameters = list(lora_parameters(model).values())
        found = []
        for loss in load_method(method).losses([self.batch(model, seed)]):
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
            found.append(torch.cat([g.flatten() for g in gradient if g is not None]))
        return found

    def cost(self, method: str, batch_size: int = 4) -> dict[str, float]:
        """Seconds of the losses and gradients of one batch, the median of several, and their peak memory in MB.

        With checkpointing, which is the default of training, and the memory without it too.
        """
        return self.measured(f"cost-{slug(method)}-{batch_size}", lambda: self.measured_cost(method, batch_size))

    def measured_cost(self, method: str, batch_size: int) -> dict[str, float]:
        model = self.model()
        add_lora(model, 8)
        parameters = list(lora_parameters(model).values())

        def gradient() -> None:
            for losses in load_method(method).optimizer_steps([self.batch(model, 0, batch_size)]):
                for loss in losses:
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                    del loss

        gradient()
        times = []
        for _ in range(self.scale.repeats):
            start = time.perf_counter()
            gradient()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found = {"seconds": statistics.median(times), "megabytes": peak_memory(gradient, model.device) / 1e6}
        model.set_checkpointing("no")
        return found | {"megabytes without": peak_memory(gradient, model.device) / 1e6}


def tidy(scores: Mapping[str, float]) -> dict[str, float]:
    """What the tables call the columns of an evaluation."""
    names = {REWARD: "reward", JUDGE: "judge_3d", NAMED: "judge_name", DIVERSITY: "diversity"}
    return {short: scores[name] for name, short in names.items()}


def slug(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")
