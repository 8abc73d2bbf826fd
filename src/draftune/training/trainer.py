"""A training run, from the checks before it to the comparison after it. It knows no model, method or reward by name."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.evaluation.metrics import Comparison, normalized, score_batches
from draftune.lora import add_lora, freeze_lora, save_lora
from draftune.methods import Method
from draftune.models import Model
from draftune.models.tiny_decoder import check_likeness
from draftune.rewards import Reward
from draftune.rewards.base import check_prompts
from draftune.rewards.online import carried
from draftune.runs.checkpoint import (
    KEPT,
    checkpoints,
    load_random_state,
    random_state,
    read_state,
    read_tensors,
    undisturbed,
)
from draftune.runs.environment import environment
from draftune.runs.run_dir import EVALUATIONS, METRICS, RunFolder
from draftune.settings import Settings
from draftune.training.checks import AUDITED, probe_reward, tell_truncated
from draftune.training.continued import Past
from draftune.training.distributed import accelerator
from draftune.training.fsdp import shard, wants_shards
from draftune.training.signals import interruptible
from draftune.training.step import Updates
from draftune.training.validation import Watch
from draftune.utils.loading import first_line
from draftune.utils.processes import lost, tell

VISIBLE = 0.5 / 255
"""The least change of a pixel that eight bits can show."""


@dataclass
class Run:
    """What a training run left: its folder, a row for each update and each evaluation, and base against tuned."""

    folder: Path
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    comparison: Comparison | None


class Trainer:
    """One run."""

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
        past: Past | None = None,
    ) -> None:
        self.settings = s = settings
        self.folder, self.method, self.model = folder, method, model
        self.prompts, self.past, self.processes = prompts, past, folder.processes
        self.accelerator = accelerator(s)
        with self.processes.together():
            self.sharded = wants_shards() and self.processes.count > 1
            self.set_up(reward, held_out, eval_prompts)
        if self.sharded:
            shard(model, self.accelerator.device, self.processes.count)
        kept, processes = past.kept if past is not None else (), self.processes
        self.updates = Updates(
            s, method, model, self.schedule, self.reward, prompts, self.accelerator, folder.path, processes, kept
        )
        self.watch = Watch(s, folder, model, self.schedule, self.reward, self.held_out, prompts, eval_prompts, past)
        self.done = 0
        self.told_of_gradients = False

    def set_up(self, reward: Reward, held_out: Reward | None, eval_prompts: Sequence[str] | None) -> None:
        """The model with a fresh LoRA and the rewards, checked against the settings and on their device."""
        s, model, method = self.settings, self.model, self.method
        s.model = model.name
        asked = [*self.prompts, *(eval_prompts or ())]
        if self.past is not None:
            freeze_lora(model, self.past.lora, s.skip_text_encoder_lora)
            asked += [*self.past.kept, *self.past.prompts]
        model.check_prompts(asked, s.negative_prompt)
        model.set_size(s.height, s.width)
        model.set_grid(s.timestep_spacing, s.set_alpha_to_one)
        if self.past is not None:
            self.past.compare(model.grid)
        self.own_clamp, model.pixel_clamp = model.pixel_clamp, s.pixel_clamp
        self.schedule = model.schedule(s.num_inference_steps)
        method.check(self.schedule)
        device = self.accelerator.device
        # What is shared out is moved afterwards, block by block: no process need have room for all of it.
        self.model.to("cpu" if self.sharded else device, s.mixed_precision)
        self.model.set_checkpointing(s.gradient_checkpointing or ("both" if method.spans_calls() else "blocks"))
        self.reward = reward.ready().to(device)
        self.held_out = held_out.ready().to(device) if held_out is not None else None
        first = self.past.ready(device) if self.past is not None else None
        for scored in (self.reward, self.held_out, first):
            if scored is not None:
                scored.set_chunk_size(s.reward_batch_size)
        with torch.random.fork_rng():
            torch.manual_seed(s.seed)
            add_lora(model, s.lora_rank, s.lora_alpha, s.lora_targets.split(","))

    def run(self) -> Run:
        """Train, from the checks before it to the comparison after it.

        Whatever ends it, the model's own decoder and pixel clamp are restored: guidance and others use them later.
        """
        try:
            return self.run_checked()
        finally:
            self.model.small_decoder, self.model.pixel_clamp = None, self.own_clamp
            self.folder.close()

    def run_checked(self) -> Run:
        """Check the rewards, then train."""
        from accelerate.utils import set_seed

        s = self.settings
        # For rewards that draw random numbers; what training draws has its own generator.
        set_seed(s.seed)
        asked = [*self.prompts, *(self.watch.eval_prompts or ())]
        tell_truncated(asked, self.model, [self.reward, self.held_out], s.negative_prompt)
        found = self.probe()
        if s.normalize_reward:
            self.normalize(s.normalize_reward)
        try:
            with self.processes.together():
                if self.processes.main:
                    self.folder.create(s, self.space(), audit=found, environment=environment(self.accelerator.device))
            if not self.folder.checkpoint:
                self.save_checkpoint()
            # The LoRA does nothing yet, in a run that goes on too: what is drawn now is the base's.
            self.look()
            if self.folder.checkpoint:
                self.load_checkpoint(self.folder.checkpoint)
            with interruptible() as wish:
                try:
                    self.train(wish)
                finally:
                    # Whatever ends the training, what was learned is kept.
                    if self.processes.main:
                        save_lora(self.model, self.folder.path / "lora")
                self.save_checkpoint()  # the last look may take long
                self.look()
                self.save_checkpoint(finished=True)
        except OSError as error:
            raise DraftuneError(
                f"cannot write to {str(self.folder.path)!r}: {error.strerror or error}; {self.kept()}"
            ) from error
        except RuntimeError as error:
            if not lost(error):
                raise
            raise DraftuneError(
                f"another process of this run has ended; {self.kept()} (what was heard of it: {first_line(error)})"
            ) from error
        rows = self.folder.rows
        return Run(self.folder.path, rows[METRICS], rows[EVALUATIONS], self.watch.comparison())

    def kept(self) -> str:
        """What there is to go on from."""
        newest = checkpoints(self.folder.path / "checkpoints")
        return f"{newest[-1].name} is whole, and the same command goes on from it" if newest else "nothing was kept"

    def space(self) -> int:
        """Bytes of the checkpoints and LoRAs that a run always leaves; AdamW keeps two numbers for each of theirs."""
        lora = sum(parameter.nbytes for parameter in self.updates.parameters.values())
        learned = sum(tensor.nbytes for tensor in carried(self.reward).values())
        coming = max(1, KEPT + 2 - len(checkpoints(self.folder.path / "checkpoints")))
        return coming * (3 * lora + learned) + 2 * lora

    def look(self) -> None:
        """A grid and an evaluation of the model as it is."""
        self.watch.show(self.done)
        self.evaluate()

    def evaluate(self) -> None:
        made = self.updates
        self.watch.evaluate(self.done, {"reward_queries": made.scorer.queries, "seconds": round(made.seconds, 4)})

    def probe(self) -> dict[str, dict[str, float]]:
        """Tries the rewards on two pictures of the base model, so that what is wrong with them is said at once."""
        with self.processes.together():
            check_prompts(self.reward, self.prompts)
            for reward in (self.reward, self.held_out):
                try:
                    if reward is not None:
                        check_prompts(reward, self.watch.eval_prompts or self.watch.shown)
                except DraftuneError as error:
                    raise DraftuneError(f"the prompts of the comparison (eval_prompts) don't fit: {error}") from error
        prompts = list(islice(cycle(self.prompts), 2))
        pictures = self.watch.draw(prompts, range(2))
        self.first_pictures = pictures
        with self.processes.together():
            if self.model.small_decoder is not None:
                s = self.settings
                check_likeness(self.model, prompts, self.schedule, s.guidance_scale, s.negative_prompt)
            found = probe_reward(self.reward, pictures.to(self.model.device), prompts, self.method.needs_gradient)
            if self.held_out is not None:
                shown = list(islice(cycle(self.watch.eval_prompts or prompts), 2))
                score_batches(self.held_out, pictures, shown, self.model.device)
        return found

    @undisturbed()
    def check_pictures(self) -> None:
        """Says so where the first updates changed no picture: gradients alone do not show it."""
        # The same batch of pictures: of another size, they differ in their last digits.
        prompts = list(islice(cycle(self.prompts), 2))
        change = (self.watch.draw(prompts, range(2)) - self.first_pictures).abs().max()
        if change < VISIBLE:
            tell(f"after {self.done} updates the pictures are still those of the base model: raise the learning rate")

    def check_gradients(self) -> None:
        """Tell once, where the first or any later updates had no gradient at all, which of its factors was 0."""
        made = self.updates
        if self.told_of_gradients or made.without_gradient < min(AUDITED, self.settings.steps):
            return
        self.told_of_gradients = True
        why = (
            made.why_constant or "the losses do not depend on the LoRA now: look for clamps or saturation in the reward"
        )
        tell(f"the gradient was exactly 0 in the last {made.without_gradient} updates: {why}")

    def had_gradient(self) -> bool:
        """Return whether any update so far had a gradient other than 0."""
        return any(row["grad_norm"] for row in self.folder.rows[METRICS])

    def normalize(self, count: int) -> None:
        """Divides each part of the reward by its spread over pictures of the base model; the run's settings say so."""
        s = self.settings
        prompts = list(islice(cycle(self.prompts), count))
        pictures = self.watch.draw(prompts, range(count))
        with self.processes.together():
            reward = normalized(self.reward, pictures, prompts, self.model.device)
        # The others may have measured something else in the last digits.
        reward.weights = self.processes.of_main(reward.weights)
        reward.set_chunk_size(s.reward_batch_size)
        self.reward = self.updates.scorer.reward = self.watch.reward = reward
        s.reward, s.normalize_reward = reward.expression or reward.label, 0

    def train(self, wish: threading.Event) -> None:
        """The updates; after the one that is being made where there is a wish to end."""
        s = self.settings
        if self.watch.exhausted:
            return
        progress = tqdm(
            range(self.done + 1, s.steps + 1),
            desc="training",
            unit="update",
            initial=self.done,
            total=s.steps,
            disable=not self.processes.main,
        )
        for step in progress:
            row = self.updates.update(step)
            self.done = step
            self.folder.log(METRICS, row)
            progress.set_postfix(reward=f"{row['reward']:.3f}", grad=f"{row['grad_norm']:.2g}")
            self.check_gradients()
            # Without any gradient, the learning rate is not the cause.
            if step == AUDITED + s.lr_warmup_steps and not self.updates.skipped and self.had_gradient():
                self.check_pictures()
            if step == s.steps:
                break  # the end has its own grid, evaluation and checkpoint
            if s.sample_every and step % s.sample_every == 0:
                self.watch.show(step)
            if s.eval_every and step % s.eval_every == 0:
                self.evaluate()
            if self.watch.exhausted:
                break
            wished = self.processes.any(wish.is_set())
            if wished or (s.save_every and step % s.save_every == 0) or self.watch.best == step:
                self.save_checkpoint()
            if wished:
                raise KeyboardInterrupt(f"after update {step}; the same command goes on from there")

    def save_checkpoint(self, finished: bool = False) -> None:
        state, tensors = self.updates.state()
        if not self.processes.main:
            return
        state["finished"] = finished
        random_numbers, generators = random_state()
        self.folder.save_checkpoint(
            self.done, {**state, "random": random_numbers}, {**tensors, **generators}, self.watch.best
        )

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Goes back to where the run stood."""
        with self.processes.together():
            state, tensors = read_state(checkpoint), read_tensors(checkpoint)
        self.done = state["step"]
        self.updates.load(state, tensors, self.folder.changed)
        if self.done % self.settings.prefix_reuse == 0:
            self.updates.starts = []  # older versions kept what no update shares
        load_random_state(state["random"], tensors)
