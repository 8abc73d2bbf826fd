"""The training loop: draw, score, go uphill. It knows no model, method or reward by name."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError, gather
from draftune.evaluation import Comparison, compare, normalized, score_batches
from draftune.images import grid, save_image
from draftune.lora import add_lora, lora_parameters, save_lora
from draftune.methods import Method, load_method
from draftune.models import Model, load_model
from draftune.prompts import load_prompts
from draftune.rewards import Reward, find_reward
from draftune.settings import Settings
from draftune.training.audit import GradientAudit, probe_reward
from draftune.training.run import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Run:
    """What a training run left: its folder, one row of metrics for each update, and base against tuned."""

    folder: Path
    metrics: list[dict[str, float]]
    comparison: Comparison | None


def train(
    model: Any = None,
    reward: Any = None,
    *,
    settings: Settings | None = None,
    prompts: str | Sequence[str] | None = None,
    held_out: Any = None,
    **values: Any,
) -> Run:
    """Fine-tunes a LoRA on a reward through sampling; the model carries it afterwards.

    `model`, `reward` and `prompts` are names, paths and expressions, or ready objects; every other setting is a
    field of Settings, given by name or all at once as `settings`. Raises DraftuneError before anything is trained
    if something does not fit.
    """
    named = {"model": model, "reward": reward, "prompts": prompts, "held_out": held_out}
    values |= {key: describe(value) for key, value in named.items() if value is not None}
    settings = Settings.from_mapping((asdict(settings) if settings else {}) | values)
    # What is cheap to check is checked before anything is loaded.
    folder = RunFolder(settings.output)
    method = load_method(settings.method)
    texts = load_prompts(settings.prompts if prompts is None or isinstance(prompts, str) else list(prompts))
    eval_texts = load_prompts(settings.eval_prompts) if settings.eval_prompts else None
    judged = held_out or settings.held_out
    # Every reward's weights are found before any network is loaded.
    score, judge = gather(
        lambda: find_reward(settings.reward if reward is None else reward),
        lambda: find_reward(judged) if judged else None,
    )
    assert score is not None
    painter = model if isinstance(model, Model) else load_model(settings.model if model is None else model)
    return Trainer(settings, folder, method, painter, score, judge, texts, eval_texts).run()


def describe(value: Any) -> str:
    """What the saved settings say of an object that was given ready-made."""
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"{len(value)} prompts given in Python"
    return str(getattr(value, "name", None) or getattr(value, "label", None) or getattr(value, "__name__", "given"))


class Trainer:
    """One run, from the checks before it to the comparison after it."""

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        method: Method,
        model: Model,
        reward: Reward,
        held_out: Reward | None,
        prompts: Sequence[str],
        eval_prompts: Sequence[str] | None,
    ) -> None:
        self.settings = s = settings
        self.folder, self.method, self.model = folder, method, model
        self.prompts, self.eval_prompts = prompts, eval_prompts
        shown = eval_prompts or prompts
        count = min(s.sample_prompts, len(shown))
        self.shown = [shown[i * len(shown) // count] for i in range(count)]
        s.model = model.name
        self.model.set_size(s.height, s.width)
        self.model.set_grid(s.timestep_spacing, s.set_alpha_to_one)
        self.schedule = model.schedule(s.num_inference_steps)
        self.method.check(self.schedule)

        self.accelerator = accelerator(s)
        device = self.accelerator.device
        self.model.to(device, s.mixed_precision).gradient_checkpointing = s.gradient_checkpointing
        self.reward = reward.ready().to(device)
        self.held_out = held_out.ready().to(device) if held_out is not None else None
        for scored in (self.reward, self.held_out):
            if scored is not None:
                scored.set_chunk_size(s.reward_batch_size)
        with torch.random.fork_rng():
            torch.manual_seed(s.seed)
            add_lora(model, s.lora_rank, s.lora_alpha, s.lora_targets.split(","))
        self.parameters = lora_parameters(model)
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.AdamW(
                self.parameters.values(),
                lr=s.learning_rate,
                betas=(s.adam_beta1, s.adam_beta2),
                weight_decay=s.weight_decay,
            )
        )
        # One generator for everything that training draws; the grids and the comparison have their own.
        self.generator = torch.Generator().manual_seed(s.seed)
        self.batches = batches(prompts, s.batch_size, self.generator)
        self.audit = GradientAudit(self.parameters)
        self.metrics: list[dict[str, float]] = []
        self.queries = self.overflows = 0
        self.seconds = 0.0

    def run(self) -> Run:
        self.probe()
        before = self.draw(self.shown, range(len(self.shown)))
        if self.settings.normalize_reward:
            self.normalize(self.settings.normalize_reward)
        self.folder.create(self.settings)
        try:
            self.show(0, before)
            try:
                self.train()
            finally:
                # Whatever ends the training, what was learned is kept.
                save_lora(self.model, self.folder.path / "lora")
            if self.settings.steps != self.last_shown:
                self.show(self.settings.steps)
            comparison = self.compare()
        finally:
            self.folder.close()
        return Run(self.folder.path, self.metrics, comparison)

    def probe(self) -> None:
        """Tries the rewards on two pictures of the base model, so that what is wrong with them is said at once."""
        self.reward.check(self.prompts)
        for reward in (self.reward, self.held_out):
            try:
                if reward is not None:
                    reward.check(self.eval_prompts or self.shown)
            except DraftuneError as error:
                raise DraftuneError(f"the prompts of the comparison (eval_prompts) don't fit: {error}") from error
        prompts = list(islice(cycle(self.prompts), 2))
        pictures = self.draw(prompts, range(2))
        probe_reward(self.reward, pictures.to(self.model.device), prompts)
        if self.held_out is not None:
            shown = list(islice(cycle(self.eval_prompts or prompts), 2))
            score_batches(self.held_out, pictures, shown, self.model.device)

    def normalize(self, count: int) -> None:
        """Divides each part of the reward by its spread over pictures of the base model; the run's settings say so."""
        s = self.settings
        prompts = list(islice(cycle(self.prompts), count))
        self.reward = normalized(self.reward, self.draw(prompts, range(count)), prompts, self.model.device)
        self.reward.set_chunk_size(s.reward_batch_size)
        s.reward, s.normalize_reward = self.reward.expression or self.reward.label, 0

    def train(self) -> None:
        s = self.settings
        progress = tqdm(range(1, s.steps + 1), desc="training", unit="update")
        for step in progress:
            row = self.update(step)
            self.metrics.append(row)
            self.folder.log(row)
            progress.set_postfix(reward=f"{row['reward']:.3f}", grad=f"{row['grad_norm']:.2g}")
            if s.sample_every and step % s.sample_every == 0:
                self.show(step)

    def update(self, step: int) -> dict[str, float]:
        """One step of the optimiser, and what it saw."""
        s = self.settings
        start = time.perf_counter()
        rate = s.learning_rate * min(1.0, step / max(1, s.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        rewards: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        for _ in range(s.gradient_accumulation_steps):
            prompts = next(self.batches)
            noise = self.model.noise(self.generator, len(prompts))
            denoise = self.model.denoise(prompts, self.schedule, s.guidance_scale, s.negative_prompt)
            for i, clean in enumerate(self.method.samples(denoise, self.schedule, noise, self.generator)):
                total, scores = self.reward.parts(self.model.decode(clean), prompts)
                if not total.isfinite().all():
                    raise DraftuneError(f"the reward became {total.tolist()} at update {step}; training stopped")
                self.accelerator.backward(-total.mean() / s.gradient_accumulation_steps)
                self.queries += len(prompts)
                if i == 0:
                    # What is logged is the reward of the sample itself, not of the copies around it.
                    rewards.append(total.detach())
                    for label, score in scores.items():
                        parts.setdefault(label, []).append(score)
        limit = s.max_grad_norm or math.inf
        grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), limit))
        if math.isfinite(grad_norm):
            self.overflows = 0
            self.audit.check()
        else:
            # fp16's gradient scaler finds its scale by overflowing, and skips those updates itself.
            self.overflows += 1
            if self.accelerator.scaler is None or self.overflows > 20:
                raise DraftuneError(f"the gradient's norm became {grad_norm} at update {step}; training stopped")
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        reward = torch.cat(rewards)
        row = {
            "step": step,
            "reward": float(reward.mean()),
            "reward_std": float(reward.std(unbiased=False)),
            "reward_queries": self.queries,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "seconds": round(self.seconds, 4),
        }
        if len(parts) > 1:
            row |= {f"reward/{label}": float(torch.cat(scores).mean()) for label, scores in parts.items()}
        return row

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures [N, 3, H, W] on the CPU, drawn without touching the random numbers of training."""
        s = self.settings
        return self.model.generate(
            prompts, seeds, self.schedule, s.guidance_scale, s.negative_prompt, s.batch_size, progress=True
        )

    def show(self, step: int, pictures: Tensor | None = None) -> None:
        """The grid of samples at this update: the same prompts and seeds every time."""
        if pictures is None:
            pictures = self.draw(self.shown, range(len(self.shown)))
        scores = score_batches(self.reward, pictures, self.shown, self.model.device)[0].tolist()
        captions = [f"{score:.3g}" for score in scores]
        save_image(grid([pictures], [], self.shown, [captions]), self.folder.sample_path(step))
        self.last_shown = step
        if step == 0:
            self.base_pictures, self.base_captions = pictures, captions
        rows = [self.base_pictures, pictures]
        sheet = grid(rows, ["before", "after"], self.shown, [self.base_captions, captions])
        save_image(sheet, self.folder.path / "before_after.png")

    def compare(self) -> Comparison | None:
        """Base against tuned on the held-out prompts, where the run has any."""
        if not self.eval_prompts:
            return None
        s = self.settings
        return compare(self.model, self.draw, self.reward, self.held_out, self.eval_prompts, s.eval_images)


def accelerator(settings: Settings) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # A second run in one process may want another device or precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        chosen = Accelerator(cpu=settings.cpu, mixed_precision=settings.mixed_precision)
    except ValueError as error:
        raise DraftuneError(f"mixed_precision={settings.mixed_precision} does not work here: {error}") from error
    if settings.mixed_precision == "fp16" and chosen.device.type == "cpu":
        raise DraftuneError("mixed_precision=fp16 does not work on a CPU: use bf16 or no")
    if chosen.num_processes > 1:
        raise DraftuneError("training by several processes is not supported: start one, on one device")
    return chosen


def batches(prompts: Sequence[str], size: int, generator: torch.Generator) -> Iterator[list[str]]:
    """Batches without end: every prompt once in a random order, then again in another."""
    queue: list[str] = []
    while True:
        while len(queue) < size:
            queue += [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
        yield queue[:size]
        queue = queue[size:]
