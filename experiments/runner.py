"""Train and measure the embedded model for the experiments. Finished runs and measurements are read from disk."""

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
from torch import Tensor

from draftune.evaluation.metrics import evaluate
from draftune.lora import FILE_NAME, add_lora, load_lora, lora_parameters
from draftune.methods import Batch, load_method
from draftune.models import DiffusionModel, load_model
from draftune.prompts import load_prompts
from draftune.recommended import recommended
from draftune.rewards import Reward, load_reward
from draftune.runs.logs import EVALUATIONS, METRICS, read_rows
from draftune.sampling.sampler import PrefixCache
from draftune.training import train
from draftune.utils.devices import default_device
from draftune.utils.memory import peak_memory
from draftune.utils.paths import atomic_write
from experiments.budget import Budget
from experiments.examples import EXAMPLES, copy_examples

REWARD = "emoji_aesthetic"
JUDGES = "emoji_name_accuracy + emoji_style_probability(style='3d')"
COLUMNS = {
    REWARD: "reward",
    "eval/emoji_style_probability": "p_3d",
    "eval/emoji_name_accuracy": "name_accuracy",
    "eval/diversity": "diversity",
}
"""Columns of an evaluation, and their names in the tables."""
DRAFT_1, DRAFT_LV = "draft_k(k=1)", "draft_lv(n=2)"
GUIDANCE_SCALE = recommended("emoji")["guidance_scale"]
Row = dict[str, Any]


@dataclass(frozen=True)
class RunSpec:
    """A training run. Settings that are not given have the embedded model's recommended values."""

    method: str
    steps: int
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """Name of the run's folder, where the settings are too long for one."""
    evaluated: bool = True

    @property
    def name(self) -> str:
        """The run's folder. It does not depend on `steps`: a longer run continues a shorter one."""
        words = [self.method, *(f"{key}={value}" for key, value in sorted(self.settings.items())), f"seed={self.seed}"]
        return slug(self.label or " ".join(words))


@dataclass
class RunResult:
    """Logs of a finished run, one row for each update and one for each evaluation, and its folder."""

    metrics: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    folder: Path

    @property
    def final(self) -> dict[str, float]:
        return self.evaluations[-1]


class ExperimentRunner:
    """Runs and measures the embedded model; each run and each measurement is made once and stored in `folder`.

    Args:
        folder: Folder of the runs and measurements.
        budget: Sizes of the experiments.
        examples: Folder of real images named `NAME.png`, if there is one.
    """

    def __init__(self, folder: Path, budget: Budget, examples: Path | None = None) -> None:
        self.folder, self.budget, self.examples = folder, budget, examples

    @property
    def prompts(self) -> list[str]:
        """Training names, evenly spaced in the set `emoji`. The paper trains on 45 animals."""
        names = load_prompts("emoji")
        return names[:: max(1, len(names) // self.budget.train_prompts)][: self.budget.train_prompts]

    @property
    def eval_prompts(self) -> list[str]:
        """Evaluation names. No run trains on them."""
        names = load_prompts("emoji-common")
        return names[:: len(names) // self.budget.eval_prompts][: self.budget.eval_prompts]

    def prompt_file(self, name: str, prompts: Sequence[str]) -> str:
        """Write prompts to a file, one a line, and return its path."""
        path, text = self.folder / f"{name}.txt", "\n".join(prompts) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return str(path)

    def settings(self, spec: RunSpec) -> dict[str, Any]:
        """Return the arguments of `draftune.train` for a run."""
        budget = self.budget
        values: dict[str, Any] = {
            "reward": REWARD,
            "prompts": self.prompts,
            "eval_prompts": "",
            "num_inference_steps": budget.num_inference_steps,
            "log_images_steps": 0,
            "num_log_prompts": 1,
            "prefix_reuse_steps": 1,
            # The graphs of images this small fit into memory: the same gradients in less time.
            "gradient_checkpointing": "none",
            "method": spec.method,
            "steps": spec.steps,
            "seed": spec.seed,
            "output": str(self.folder / spec.name),
        }
        if spec.evaluated:
            values |= {
                "eval_prompts": self.prompt_file("eval-prompts", self.eval_prompts),
                "num_validation_images": budget.num_validation_images,
                "validation_steps": budget.validation_steps,
                "checkpointing_steps": budget.validation_steps,
            }
        values |= spec.settings
        if EXAMPLES in values["reward"]:
            assert self.examples is not None
            copy = copy_examples(self.examples, self.folder / "examples", load_prompts("emoji"))
            values["reward"] = values["reward"].replace(EXAMPLES, f"'{copy}'")
        return values

    def result(self, spec: RunSpec) -> RunResult | None:
        """Return a run's logs up to `spec.steps`, or None if the run is not finished."""
        folder = self.folder / spec.name
        metrics, evaluations = (read_rows(folder / name, spec.steps) for name in (METRICS, EVALUATIONS))
        last = evaluations if spec.evaluated else metrics
        if not last or last[-1]["step"] < spec.steps or not (folder / "lora" / FILE_NAME).is_file():
            return None
        return RunResult(metrics, evaluations, folder)

    def run(self, spec: RunSpec) -> RunResult:
        """Train a run, or resume an interrupted one, and return its logs."""
        if (result := self.result(spec)) is None:
            train("emoji", **self.settings(spec))
            result = self.result(spec)
            assert result is not None
        return result

    def lora(self, spec: RunSpec) -> Path:
        """Return the folder of a run's LoRA. The LoRA is from the last update, so the run must not be longer."""
        folder = self.run(spec).folder
        assert len(read_rows(folder / METRICS)) == spec.steps, f"{spec.name} is longer than {spec.steps} updates"
        return folder

    def cached(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the JSON value of a measurement, from its file if there is one."""
        path = self.folder / f"{slug(name)}.json"
        if not path.is_file():
            print(f"measuring {name}", file=sys.stderr)
            value = measure()
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(value), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    @cached_property
    def reward(self) -> Reward:
        return load_reward(REWARD).to(default_device())

    @cached_property
    def judges(self) -> Reward:
        return load_reward(JUDGES).to(default_device())

    def model(self, loras: Mapping[str, Path] | None = None) -> DiffusionModel:
        """Return the embedded model with LoRAs by adapter name."""
        model = load_model("emoji").to(default_device())
        for name, folder in (loras or {}).items():
            load_lora(model, folder, name)
        return model

    def sampler(self, model: DiffusionModel) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
        """Return the function that samples images [B, 3, H, W] for prompts and seeds, without reward guidance."""
        schedule = model.schedule(self.budget.num_inference_steps)
        return lambda prompts, seeds: model.sample_tensors(prompts, seeds, schedule, GUIDANCE_SCALE, batch_size=4)

    def evaluate(self, model: DiffusionModel, reward: Reward | None = None) -> dict[str, float]:
        """Return a model's scores on the evaluation prompts, as in the evaluations of a run."""
        images = self.budget.num_validation_images
        return evaluate(
            self.sampler(model), reward or self.reward, self.judges, self.eval_prompts, images, model.device
        ).scores

    def batch(self, model: DiffusionModel, seed: int, size: int = 4) -> Batch:
        """Return a batch of the first training prompts with noise from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        prompts, schedule = (self.prompts * size)[:size], model.schedule(self.budget.num_inference_steps)
        denoise, base = model.denoisers_for(prompts, schedule, GUIDANCE_SCALE)
        noise = PrefixCache(model.noise(generator, size))
        return Batch(
            prompts, noise, schedule, denoise, base, lambda x: self.reward(model.decode(x), prompts), generator
        )

    def cost(self, method: str, batch_size: int = 4) -> dict[str, float]:
        """Return median seconds and peak memory (MB) of the gradients of one batch, with and without checkpointing."""
        return dict(self.cached(f"cost-{method}-{batch_size}", lambda: self.measure_cost(method, batch_size)))

    def measure_cost(self, method: str, batch_size: int) -> dict[str, float]:
        model = self.model()
        add_lora(model, 8)
        parameters = list(lora_parameters(model).values())

        def gradient() -> None:
            for losses in load_method(method).losses_per_step([self.batch(model, 0, batch_size)]):
                for loss in losses:
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                    del loss

        gradient()
        times = []
        for _ in range(self.budget.repeats):
            start = time.perf_counter()
            gradient()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        cost = {"seconds": statistics.median(times), "peak_mb": peak_memory(gradient, model.device) / 1e6}
        model.set_checkpointing("none")
        return cost | {"peak_mb_without_checkpointing": peak_memory(gradient, model.device) / 1e6}


def rename_columns(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the columns of an evaluation that the tables show, under their short names."""
    return {short: scores[name] for name, short in COLUMNS.items() if name in scores}


def evaluation_rows(spec: RunSpec, result: RunResult) -> list[Row]:
    """Return one row for each evaluation of a run."""
    return [
        {"method": spec.method, "seed": spec.seed, "update": int(row["step"])}
        | {"reward_queries": int(row["reward_queries"]), **rename_columns(row)}
        for row in result.evaluations
    ]


def slug(text: str) -> str:
    """Return a text as the name of a file."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")
