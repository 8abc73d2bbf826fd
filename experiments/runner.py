"""Train and measure the embedded model. Every result is a file, so that processes share the work and any can stop."""

from __future__ import annotations

import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from draftune.evaluation.metrics import Evaluation, evaluate
from draftune.lora import FILE_NAME, add_lora, load_lora, lora_parameters, save_lora
from draftune.methods import Batch, load_method
from draftune.models import DiffusionModel, load_model
from draftune.prompts import load_prompts
from draftune.rewards import Reward, load_reward
from draftune.runs.environment import environment
from draftune.runs.logs import METRICS, read_rows
from draftune.sampling.sampler import PrefixCache
from draftune.training import Trainer, train
from draftune.training.callbacks import Callback
from draftune.utils.devices import default_device
from draftune.utils.memory import peak_memory
from draftune.utils.paths import atomic_write
from experiments.budget import Budget
from experiments.examples import EXAMPLES, copy_examples

REWARD = "emoji_aesthetic"
JUDGES = "emoji_name_accuracy + emoji_style_probability(style='3d')"
COLUMNS = {
    "eval/emoji_style_probability": "p_3d",
    "eval/emoji_name_accuracy": "name_accuracy",
    "eval/diversity": "diversity",
}
"""Columns of an evaluation besides the reward, and their names in the csv files."""
DRAFT_1, DRAFT_LV = "draft_k(k=1)", "draft_lv(n=2)"
# Ten steps without guidance cost a quarter of twenty with it: more seeds and images in the same time.
GUIDANCE_SCALE, LEARNING_RATE = 1.0, 1e-3
EVAL_BATCH = 64 if torch.cuda.is_available() else 16
"""Images that an evaluation samples at once; larger batches were slower on a CPU."""
SNAPSHOTS = "snapshots"
SAMPLING = ("timestep_spacing", "set_alpha_to_one", "num_inference_steps")
"""Settings of a run that its evaluations share."""
Row = dict[str, Any]


@dataclass(frozen=True)
class RunSpec:
    """A training run, evaluated after some updates. Settings that are not given are the embedded model's."""

    method: str
    updates: tuple[int, ...]
    """Updates with an evaluation, ascending; the last is the length of the run."""
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """Name of the run's folder, where the settings are too long for one."""
    metric: str = ""
    """Reward of the evaluations; default: the training reward."""

    @property
    def steps(self) -> int:
        return self.updates[-1]

    @property
    def name(self) -> str:
        """The run's folder. It does not depend on `updates`: a longer run continues a shorter one."""
        words = [self.method, *(f"{key}={value}" for key, value in sorted(self.settings.items())), f"seed={self.seed}"]
        return slug(self.label or " ".join(words))

    @property
    def evaluated_reward(self) -> str:
        return self.metric or str(self.settings.get("reward", REWARD))

    @property
    def sampler_options(self) -> dict[str, Any]:
        return {key: self.settings[key] for key in SAMPLING if key in self.settings}


class Snapshots(Callback):
    """Keep the LoRA after some updates."""

    def __init__(self, folder: Path, updates: Collection[int]) -> None:
        self.folder, self.updates = folder, set(updates)

    def on_train_begin(self, trainer: Trainer) -> None:
        self.model = trainer.model

    def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
        if step in self.updates:
            save_lora(self.model, self.folder / f"{step:06d}")


class BusyError(Exception):
    """Another process works on this."""


class ExperimentRunner:
    """Makes each run and each measurement once, in `folder`, which several processes can share.

    Args:
        folder: Folder of the runs and measurements.
        budget: Sizes of the experiments.
        examples: Folder of real images named `NAME.png`, if there is one.
    """

    def __init__(self, folder: Path, budget: Budget, examples: Path | None = None) -> None:
        self.folder, self.budget, self.examples = folder, budget, examples

    @property
    def prompts(self) -> list[str]:
        """Training names, evenly spaced in the set `emoji`."""
        return spaced(load_prompts("emoji"), self.budget.train_prompts)

    @property
    def eval_prompts(self) -> list[str]:
        """Evaluation names. No run trains on them."""
        return spaced(load_prompts("emoji-common"), self.budget.eval_prompts)

    def prompt_file(self, name: str, prompts: Sequence[str]) -> str:
        """Write prompts to a file, one a line, and return its path."""
        path, text = self.folder / f"{name}.txt", "\n".join(prompts) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return str(path)

    def settings(self, spec: RunSpec) -> dict[str, Any]:
        """Return the arguments of `draftune.train` for a run, which evaluates nothing itself."""
        values: dict[str, Any] = {
            "reward": REWARD,
            "prompts": self.prompts,
            "eval_prompts": "",
            "num_inference_steps": self.budget.num_inference_steps,
            "guidance_scale": GUIDANCE_SCALE,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "reward_batch_size": 4,
            "log_images_steps": 0,
            "num_log_prompts": 1,
            "prefix_reuse_steps": 1,
            # The graphs of images this small fit into memory: the same gradients in less time.
            "gradient_checkpointing": "none",
            "checkpointing_steps": self.budget.every,
            "method": spec.method,
            "steps": spec.steps,
            "seed": spec.seed,
            "output": str(self.folder / spec.name),
            **spec.settings,
        }
        if EXAMPLES in values["reward"]:
            assert self.examples is not None
            copy = copy_examples(self.examples, self.folder / "examples", load_prompts("emoji"))
            values["reward"] = values["reward"].replace(EXAMPLES, f"'{copy}'")
        return values

    def lock(self, name: str, wait: bool = True) -> FileLock:
        """Return the lock of a run or measurement; the system releases it if the process dies."""
        path = self.folder / "locks" / f"{slug(name)}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path, timeout=-1 if wait else 0)

    def metrics(self, spec: RunSpec) -> list[dict[str, Any]]:
        """Train a run, or resume an interrupted one, and return a row for each update up to its end."""
        with self.lock(spec.name):
            if not (self.snapshot(spec, spec.steps) / FILE_NAME).is_file():
                # Another experiment may evaluate the same run after other updates.
                updates = {*spec.updates, *self.budget.short, *self.budget.long, *self.budget.collapse}
                snapshots = Snapshots(self.folder / spec.name / SNAPSHOTS, updates)
                train("emoji", **self.settings(spec), callbacks=[snapshots])
        return read_rows(self.folder / spec.name / METRICS, spec.steps)

    def snapshot(self, spec: RunSpec, update: int) -> Path:
        """Return the folder of a run's LoRA after an update."""
        return self.folder / spec.name / SNAPSHOTS / f"{update:06d}"

    def lora(self, spec: RunSpec) -> Path:
        """Train a run and return the folder of its last LoRA."""
        self.metrics(spec)
        return self.snapshot(spec, spec.steps)

    def curve(self, spec: RunSpec) -> list[Row]:
        """Return the scores of the base model and of a run after each of its updates, with the scored images."""
        metrics, rows = self.metrics(spec), list[Row]()
        for update in (0, *spec.updates):
            folder = self.snapshot(spec, update) if update else None
            queries = metrics[update - 1]["reward_queries"] if update else 0
            scores = self.scores(spec, folder, update)
            rows.append({"seed": spec.seed, "update": update, "reward_queries": int(queries), **scores})
        return rows

    def scores(self, spec: RunSpec, lora: Path | None, update: int = 0) -> Row:
        """Return the scores of a run's LoRA, or of the base model with the run's sampler, each measured once."""
        options, reward = spec.sampler_options, spec.evaluated_reward
        words = spec.name if lora else " ".join(["base", *map(str, options.values()), f"seed={spec.seed}"])
        loras = {"default": lora} if lora else {}
        measured = partial(self.evaluate_loras, loras, reward, spec.seed, options)
        return dict(self.cached(f"{words} update={update} {reward}", measured))

    def evaluate_loras(
        self, loras: Mapping[str, Path], reward: str, seed: int = 0, options: Mapping[str, Any] | None = None
    ) -> Row:
        model, chosen = self.model(loras), dict(options or {})
        steps = chosen.pop("num_inference_steps", 0)
        model.set_sampler_options(**chosen)
        return self.evaluate(model, loaded(reward), seed, steps=steps)

    def evaluate(self, model: DiffusionModel, reward: Reward, seed: int = 0, images: int = 0, steps: int = 0) -> Row:
        """Return a model's scores on the evaluation names: the reward, the judges and the diversity."""
        count = images or self.budget.images_per_prompt
        sampler = self.sampler(model, steps)
        evaluation = evaluate(
            lambda prompts, seeds: sampler(prompts, [seed * count + own for own in seeds]),
            reward,
            self.judges,
            self.eval_prompts,
            count,
            model.device,
        )
        return short_scores(evaluation, reward)

    def cached(self, name: str, measure: Callable[[], Any], wait: bool = True) -> Any:
        """Return the JSON value of a measurement, from its file if there is one.

        A mapping, or each of a list of mappings, gets the columns `commit`, `device` and `date` of its measurement.

        Raises:
            BusyError: another process measures it, and `wait` is false.
        """
        path = self.measured(name)
        try:
            with self.lock(f"measured-{name}", wait):
                if not path.is_file():
                    print(f"measuring {name}", file=sys.stderr)
                    value = measure()
                    stamped = [with_provenance(row) for row in value] if isinstance(value, list) else value
                    value = with_provenance(value) if isinstance(value, dict) else stamped
                    with atomic_write(path) as temporary:
                        temporary.write_text(json.dumps(value), encoding="utf-8")
        except Timeout as error:
            raise BusyError(name) from error
        return json.loads(path.read_text(encoding="utf-8"))

    def measured(self, name: str) -> Path:
        return self.folder / "measured" / f"{slug(name)}.json"

    def is_measured(self, name: str) -> bool:
        return self.measured(name).is_file()

    @cached_property
    def reward(self) -> Reward:
        return loaded(REWARD)

    @cached_property
    def judges(self) -> Reward:
        return loaded(JUDGES)

    def model(self, loras: Mapping[str, Path] | None = None) -> DiffusionModel:
        """Return the embedded model with LoRAs by adapter name."""
        model = load_model("emoji").to(default_device())
        for name, folder in (loras or {}).items():
            load_lora(model, folder, name)
        return model

    def sampler(self, model: DiffusionModel, steps: int = 0) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
        """Return the function that samples images [B, 3, H, W] for prompts and seeds, without reward guidance."""
        schedule = model.schedule(steps or self.budget.num_inference_steps)
        return lambda prompts, seeds: model.sample_tensors(
            prompts, seeds, schedule, GUIDANCE_SCALE, batch_size=EVAL_BATCH
        )

    def batch(self, model: DiffusionModel, prompts: Sequence[str], seed: int, reward: Reward, steps: int = 0) -> Batch:
        """Return a batch of prompts with noise from `seed`."""
        schedule = model.schedule(steps or self.budget.num_inference_steps)
        generator = torch.Generator().manual_seed(seed)
        denoise, base = model.denoisers_for(prompts, schedule, GUIDANCE_SCALE)
        noise = PrefixCache(model.noise(generator, len(prompts)))
        return Batch(prompts, noise, schedule, denoise, base, lambda x: reward(model.decode(x), prompts), generator)

    def cost(self, method: str, batch_size: int = 4) -> dict[str, float]:
        """Return median seconds and peak memory (MB) of the gradients of one batch."""
        return dict(self.cached(f"cost {method} {batch_size}", lambda: self.measure_cost(method, batch_size)))

    def measure_cost(self, method: str, batch_size: int) -> dict[str, float]:
        model = self.model()
        add_lora(model, 8)
        model.set_checkpointing("none")
        parameters, prompts = list(lora_parameters(model).values()), (self.prompts * batch_size)[:batch_size]

        def gradient() -> None:
            batch = self.batch(model, prompts, 0, self.reward)
            for losses in load_method(method).losses_per_step([batch]):
                for loss in losses:
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                    del loss

        gradient()
        seconds = statistics.median(timed(gradient) for _ in range(self.budget.repeats))
        return {"seconds": seconds, "peak_mb": peak_memory(gradient, model.device) / 1e6}

    def seconds_per_image(self) -> float:
        """Return the seconds in which an evaluation samples and scores an image."""

        def measure() -> dict[str, float]:
            images, names = EVAL_BATCH, (self.eval_prompts * EVAL_BATCH)[:EVAL_BATCH]
            sampler, judge = self.sampler(self.model()), self.reward + self.judges
            return {"seconds": timed(lambda: judge(sampler(names, [0] * images), names)) / images}

        return float(self.cached("cost of an image", measure)["seconds"])


@cache
def loaded(expression: str) -> Reward:
    """Return a reward with its weights, loaded once."""
    return load_reward(expression).to(default_device())


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spaced(items: Sequence[str], count: int) -> list[str]:
    """Return `count` items, evenly spaced, or all of fewer."""
    return list(items[:: max(1, len(items) // count)][:count])


def short_scores(evaluation: Evaluation, reward: Reward) -> Row:
    """Return the scores of an evaluation under the names of the csv files."""
    scores = evaluation.scores
    parts = {f"reward/{part.label}": scores[part.label] for _, part in reward.terms if len(reward.terms) > 1}
    named = {short: scores[name] for name, short in COLUMNS.items() if name in scores}
    return {"reward": scores[reward.label], **parts, **named, "images": len(evaluation.images)}


def with_provenance(row: Row) -> Row:
    """Return a row with the commit, the device and the date of its measurement; it may have these already."""
    made = {**origin(), "date": datetime.date.today().isoformat()}
    return {**row, **{key: row.get(key, value) for key, value in made.items()}}


@cache
def origin() -> dict[str, str]:
    """Return the commit and the device of this process."""
    folder = Path(__file__).parent
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = environment(torch.device(default_device()))["device"]
    threads = f", {torch.get_num_threads()} of {os.cpu_count()} cores" if device.startswith("cpu") else ""
    return {"commit": commit, "device": device + threads}


def slug(text: str) -> str:
    """Return a text as the name of a file."""
    return re.sub(r"[^\w.=]+", "-", text).strip("-")
