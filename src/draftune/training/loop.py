"""The training loop: draw, score, go uphill. It knows no model, method or reward by name."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.evaluation import Comparison, normalized, score_batches
from draftune.lora import add_lora, lora_parameters, save_lora
from draftune.methods import Batch, Method
from draftune.models import Model
from draftune.rewards import Reward, WeightedSum
from draftune.settings import Settings
from draftune.training.audit import GradientAudit, probe_reward
from draftune.training.checkpoint import (
    load_optimizer,
    load_random_state,
    optimizer_tensors,
    random_state,
    read_state,
    read_tensors,
)
from draftune.training.device import accelerator
from draftune.training.guard import weights_of
from draftune.training.interrupt import interruptible
from draftune.training.run import EVALUATIONS, METRICS, RunFolder
from draftune.training.watch import Watch

Drawn = dict[int, tuple[Tensor, dict[str, Tensor]]]
"""For each batch of an update the rewards of what it drew and, by label, of their parts."""


@dataclass
class Run:
    """What a training run left: its folder, a row for each update and each evaluation, and base against tuned."""

    folder: Path
    metrics: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    comparison: Comparison | None


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
        self.prompts = prompts
        s.model = model.name
        self.model.set_size(s.height, s.width)
        self.model.set_grid(s.timestep_spacing, s.set_alpha_to_one)
        self.schedule = model.schedule(s.num_inference_steps)
        self.method.check(self.schedule)

        if s.patience and not (s.eval_every and eval_prompts):
            raise DraftuneError("patience counts evaluations: it wants --eval-prompts and --eval-every")
        if s.best_by:
            weights_of(s.best_by)
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
        self.watch = Watch(s, folder, model, self.schedule, self.reward, self.held_out, prompts, eval_prompts)
        # One generator for everything that training draws; the grids and the comparison have their own.
        self.generator = torch.Generator().manual_seed(s.seed)
        self.order = PromptOrder(len(prompts), self.generator)
        self.audit = GradientAudit(self.parameters)
        self.done = self.queries = self.overflows = 0
        self.seconds = 0.0

    def run(self) -> Run:
        from accelerate.utils import set_seed

        s = self.settings
        # For rewards that draw random numbers; what training draws has its own generator.
        set_seed(s.seed)
        self.probe()
        if s.normalize_reward:
            self.normalize(s.normalize_reward)
        self.folder.create(s)
        try:
            if not self.folder.checkpoint:
                self.save_checkpoint()
            # The LoRA does nothing yet, in a run that goes on too: what is drawn now is the base model's.
            self.look()
            if self.folder.checkpoint:
                self.load_checkpoint(self.folder.checkpoint)
            try:
                self.train()
            finally:
                # Whatever ends the training, what was learned is kept.
                save_lora(self.model, self.folder.path / "lora")
            self.look()
            self.save_checkpoint()
        finally:
            self.folder.close()
        rows = self.folder.rows
        return Run(self.folder.path, rows[METRICS], rows[EVALUATIONS], self.watch.comparison())

    def look(self) -> None:
        """A grid and an evaluation of the model as it is."""
        self.watch.show(self.done)
        self.evaluate()

    def evaluate(self) -> None:
        self.watch.evaluate(self.done, {"reward_queries": self.queries, "seconds": round(self.seconds, 4)})

    def probe(self) -> None:
        """Tries the rewards on two pictures of the base model, so that what is wrong with them is said at once."""
        self.reward.check(self.prompts)
        for reward in (self.reward, self.held_out):
            try:
                if reward is not None:
                    reward.check(self.watch.eval_prompts or self.watch.shown)
            except DraftuneError as error:
                raise DraftuneError(f"the prompts of the comparison (eval_prompts) don't fit: {error}") from error
        prompts = list(islice(cycle(self.prompts), 2))
        pictures = self.watch.draw(prompts, range(2))
        probe_reward(self.reward, pictures.to(self.model.device), prompts, self.method.needs_gradient)
        if self.held_out is not None:
            shown = list(islice(cycle(self.watch.eval_prompts or prompts), 2))
            score_batches(self.held_out, pictures, shown, self.model.device)

    def normalize(self, count: int) -> None:
        """Divides each part of the reward by its spread over pictures of the base model; the run's settings say so."""
        s = self.settings
        prompts = list(islice(cycle(self.prompts), count))
        pictures = self.watch.draw(prompts, range(count))
        self.reward = self.watch.reward = normalized(self.reward, pictures, prompts, self.model.device)
        self.reward.set_chunk_size(s.reward_batch_size)
        s.reward, s.normalize_reward = self.reward.expression or self.reward.label, 0

    def train(self) -> None:
        s = self.settings
        if self.watch.exhausted:
            return
        progress = tqdm(
            range(self.done + 1, s.steps + 1), desc="training", unit="update", initial=self.done, total=s.steps
        )
        with interruptible() as wish:
            for step in progress:
                row = self.update(step)
                self.done = step
                self.folder.log(METRICS, row)
                progress.set_postfix(reward=f"{row['reward']:.3f}", grad=f"{row['grad_norm']:.2g}")
                if step == s.steps:
                    break  # the end has its own grid, evaluation and checkpoint
                if s.sample_every and step % s.sample_every == 0:
                    self.watch.show(step)
                if s.eval_every and step % s.eval_every == 0:
                    self.evaluate()
                if self.watch.exhausted:
                    break
                if wish.is_set() or (s.save_every and step % s.save_every == 0):
                    self.save_checkpoint()
                if wish.is_set():
                    raise KeyboardInterrupt(f"after update {step}; the same command goes on from there")

    def update(self, step: int) -> dict[str, float]:
        """One update: fresh batches, and the steps of the optimiser that the method makes of them."""
        s = self.settings
        start = time.perf_counter()
        rate = s.learning_rate * min(1.0, step / max(1, s.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        drawn: Drawn = {}
        for losses in self.method.optimizer_steps(self.fresh_batches(step, drawn)):
            self.optimizer.zero_grad()
            for loss in losses:
                self.accelerator.backward(loss / s.gradient_accumulation_steps)
            grad_norm = self.clipped_norm(step)
            self.optimizer.step()
        self.seconds += time.perf_counter() - start
        if not drawn:
            raise DraftuneError(f"the method {s.method!r} scored nothing")
        reward = torch.cat([total for total, _ in drawn.values()])
        parts = {label: torch.cat([scores[label] for _, scores in drawn.values()]) for label in drawn[0][1]}
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
            row |= {f"reward/{label}": float(scores.mean()) for label, scores in parts.items()}
        return row

    def fresh_batches(self, step: int, drawn: Drawn) -> Iterator[Batch]:
        """The batches of one update; the scores of each one's own pictures are added to `drawn`."""
        s = self.settings
        for i in range(s.gradient_accumulation_steps):
            prompts = [self.prompts[i] for i in self.order.draw(s.batch_size)]
            noise = self.model.noise(self.generator, len(prompts))
            denoise, base = self.model.denoisers(prompts, self.schedule, s.guidance_scale, s.negative_prompt)
            reward = partial(self.score, prompts, step, drawn, i)
            yield Batch(prompts, noise, self.schedule, denoise, base, reward, self.generator)

    def score(self, prompts: Sequence[str], step: int, drawn: Drawn, index: int, clean: Tensor) -> Tensor:
        """The rewards of clean latents; of a batch's first, which are what it drew, `drawn` keeps them."""
        total, parts = self.reward.parts(self.model.decode(clean), prompts)
        if not total.isfinite().all():
            raise DraftuneError(f"the reward became {total.tolist()} at update {step}; training stopped")
        self.queries += len(prompts)
        drawn.setdefault(index, (total.detach(), parts))
        return total

    def clipped_norm(self, step: int) -> float:
        """The gradient's norm before it was clipped; what is not finite stops the run."""
        limit = self.settings.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), limit))
        if math.isfinite(norm):
            self.overflows = 0
            # Where all pictures score the same, a policy has nothing to learn from them yet.
            if norm > 0 or self.method.needs_gradient:
                self.audit.check()
            return norm
        # fp16's gradient scaler finds its scale by overflowing, and skips those updates itself.
        self.overflows += 1
        if self.accelerator.scaler is None or self.overflows > 20:
            raise DraftuneError(f"the gradient's norm became {norm} at update {step}; training stopped")
        return norm

    def save_checkpoint(self) -> None:
        random_numbers, tensors = random_state()
        tensors |= {f"lora/{name}": parameter for name, parameter in self.parameters.items()}
        tensors |= optimizer_tensors(self.optimizer, list(self.parameters))
        tensors["generator"] = self.generator.get_state()
        scaler = self.accelerator.scaler
        state = {
            "reward_queries": self.queries,
            "seconds": self.seconds,
            "prompts": self.order.queue,
            "weights": [weight for weight, _ in self.reward.terms],
            "method": self.method.state_dict(),
            "random": random_numbers,
            "scaler": scaler.state_dict() if scaler else None,
        }
        self.folder.save_checkpoint(self.done, state, tensors)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Goes back to where the run stood."""
        state, tensors = read_state(checkpoint), read_tensors(checkpoint)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"lora/{name}"])
        load_optimizer(self.optimizer, list(self.parameters), tensors)
        self.generator.set_state(tensors["generator"])
        self.done, self.queries, self.seconds = state["step"], state["reward_queries"], state["seconds"]
        self.order.queue = state["prompts"]
        if isinstance(self.reward, WeightedSum):
            # Measured again, a normalised reward's weights may differ in their last digits.
            self.reward.weights = state["weights"]
        self.method.load_state_dict(state["method"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        load_random_state(state["random"], tensors)


class PromptOrder:
    """Prompts without end: every one once in a random order, then again in another."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.queue: list[int] = []

    def draw(self, size: int) -> list[int]:
        while len(self.queue) < size:
            self.queue += torch.randperm(self.count, generator=self.generator).tolist()
        drawn, self.queue = self.queue[:size], self.queue[size:]
        return drawn
