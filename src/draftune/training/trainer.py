"""The training loop, with the checks before it and the last evaluation after it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from draftune.errors import DraftuneError, out_of_memory
from draftune.lora import remove_lora, save_lora
from draftune.methods import Method
from draftune.registry.factories import error_text
from draftune.rewards import Reward
from draftune.runs.checkpoint import (
    explained_failures,
    load_random_state,
    random_state,
    read_state,
    read_tensors,
)
from draftune.runs.environment import environment
from draftune.runs.logs import EVALUATIONS, METRICS
from draftune.settings import Settings
from draftune.training.callbacks import Callback
from draftune.training.gradient_check import AUDITED
from draftune.training.placement import release_model
from draftune.training.rating import RunRating
from draftune.training.result import Run
from draftune.training.run_checks import RunChecks
from draftune.training.setup import ModelLike, PromptsLike, RewardLike, Value, prepare, with_normalized_reward
from draftune.training.signals import graceful_interrupt
from draftune.training.state import disk_bytes, load_train_state, train_state
from draftune.training.step import TrainStep
from draftune.training.trackers import Trackers, installed_trackers
from draftune.training.validation import Validation
from draftune.utils.logging import logger

LOG_SECONDS = 30.0
"""Seconds between updates of the progress bar where it is written to a file."""


class Trainer:
    """Fine-tune a LoRA on a reward. The constructor checks and loads everything; `train` runs the training.

    Extend it by callbacks, or override `step`, `show`, `evaluate` or `save_checkpoint`.

    Args:
        model: Name, folder or hub id of the base model, a diffusers pipeline, or a loaded `DiffusionModel`.
        reward: An expression, a `Reward`, or a function of (images [B, 3, H, W], prompts) that returns B numbers.
        prompts: A named set, a file, or a list of prompts.
        method: An expression such as "draft_k(k=10)", or a `Method`.
        eval_rewards: Evaluation rewards, which are measured and not trained on.
        settings: All settings; `values` are applied on top of them.
        callbacks: Objects whose methods are called during training.
        **values: Settings by name.

    Attributes:
        context: The resolved settings, the model, the rewards and all else that the run is made of.
        global_step: Number of updates so far.
        should_stop: Set it to True, as from a callback, to end the run after the current update.

    Raises:
        DraftuneError: a setting is invalid, or a file is missing. Nothing has been written then.
    """

    def __init__(
        self,
        model: ModelLike | None = None,
        reward: RewardLike | None = None,
        prompts: PromptsLike | None = None,
        *,
        method: str | Method | None = None,
        eval_rewards: RewardLike | None = None,
        settings: Settings | None = None,
        callbacks: Sequence[Callback] = (),
        **values: Value,
    ) -> None:
        self.context = context = prepare(model, reward, prompts, method, eval_rewards, settings, values)
        self.model, self.method, self.prompts = context.model, context.method, context.prompts
        self.folder, self.schedule, self.processes = context.folder, context.schedule, context.processes
        self.callbacks = [Trackers(installed_trackers(context.settings)), *callbacks]
        self.global_step = 0
        self.should_stop = False
        self.checks = RunChecks(context)
        self.rating = RunRating(context)

    @property
    def settings(self) -> Settings:
        """Return the resolved settings."""
        return self.context.settings

    @property
    def reward(self) -> Reward:
        """Return the training reward."""
        return self.context.reward

    @cached_property
    def train_step(self) -> TrainStep:
        """Return the update step. It is built on first use, after the reward is normalized."""
        return TrainStep(self.context)

    @cached_property
    def validation(self) -> Validation:
        """Return the sampling and evaluation of this run, built on first use."""
        return Validation(self.context)

    def train(self) -> Run:
        """Check the rewards, train, and compare the fine-tuned model with the base model.

        On exit, also after an error, the LoRA stays attached if there was an update, and the model's own decoder and
        pixel clamp are restored.

        Raises:
            DraftuneError: a check fails, or the run cannot continue; its checkpoints stay.
        """
        from accelerate.utils import set_seed

        try:
            # For rewards that use random numbers; training has its own generator.
            set_seed(self.settings.seed)
            report = self.checks.check_rewards(self.validation.shown)
            if self.settings.reward_normalization_samples:
                self.context = with_normalized_reward(self.context)
                del self.validation  # built with the reward before normalization
            with explained_failures(self.folder.path):
                with self.processes.raise_on_all_ranks():
                    if self.processes.main:
                        known = {"reward_check": report, "environment": environment(self.context.accelerator.device)}
                        self.folder.create(self.settings, disk_bytes(self.train_step), **known)
                self.run()
        finally:
            with ExitStack() as last:
                last.callback(self.folder.close)
                if not self.global_step:
                    last.callback(remove_lora, self.model)
                last.callback(release_model, self.context)
                self.rating.close()
        rows = self.folder.rows
        return Run(self.folder.path, rows[METRICS], rows[EVALUATIONS], self.validation.comparison())

    def run(self) -> None:
        """Train, with samples and evaluations of the base and the fine-tuned model."""
        try:
            self.notify("on_train_begin", self)
            if not self.folder.checkpoint:
                self.save_checkpoint()
            if self.validation.base_comes_first:
                # In a resumed run too, the LoRA is 0 until the checkpoint is loaded.
                self.log_images()
                self.evaluate()
            if self.folder.checkpoint:
                self.load_checkpoint(self.folder.checkpoint)
            with graceful_interrupt() as stop_requested:
                try:
                    self.loop(stop_requested)
                    if self.validation.should_stop and self.processes.main:
                        logger.info(self.validation.guard.reason)
                finally:
                    if self.processes.main:
                        with self.train_step.averaged():
                            save_lora(self.model, self.folder.path / "lora")
                self.save_checkpoint()  # the last evaluation may take long
                self.end_if(self.processes.any(stop_requested.is_set()))
                self.log_images()
                self.end_if(self.processes.any(stop_requested.is_set()))
                self.evaluate()
                self.save_checkpoint(finished=True)
        except BaseException:
            with suppress(DraftuneError):
                self.notify("on_train_end")
            raise
        self.notify("on_train_end")
        if self.train_step.ema is not None:
            self.train_step.ema.copy_to(self.train_step.parameters.values())

    def loop(self, stop_requested: threading.Event) -> None:
        """Run the updates, with samples, evaluations and checkpoints between them.

        Raises:
            KeyboardInterrupt: `stop_requested` was set, and the current update is saved.
        """
        s = self.settings
        bar = tqdm(
            total=s.steps,
            initial=self.global_step,
            desc="training",
            unit="update",
            disable=not self.processes.main,
            mininterval=0.1 if sys.stderr.isatty() else LOG_SECONDS,
        )
        with bar:
            while self.global_step < s.steps and not self.validation.should_stop:
                if self.processes.any(self.should_stop):
                    break
                self.rating.ask(self, stop_requested)
                if self.should_stop:
                    break
                logs = self.step()
                bar.set_postfix(reward=f"{logs['reward']:.3f}", grad=f"{logs['grad_norm']:.2g}")
                bar.update()
                self.log_base_images()
                if self.global_step == s.steps:
                    break  # `run` samples, evaluates and saves after the last update
                if s.log_images_steps and self.global_step % s.log_images_steps == 0:
                    self.log_images()
                if s.validation_steps and self.global_step % s.validation_steps == 0:
                    self.evaluate()
                if self.validation.should_stop:
                    break
                stop = self.processes.any(stop_requested.is_set())
                due = s.checkpointing_steps and self.global_step % s.checkpointing_steps == 0
                if stop or due or self.validation.best == self.global_step:
                    self.save_checkpoint()
                self.end_if(stop)

    def end_if(self, stop: bool) -> None:
        """Raise KeyboardInterrupt if the run, whose state is saved, is to end."""
        if stop:
            raise KeyboardInterrupt(f"after update {self.global_step}; the same command resumes from there")

    def step(self) -> dict[str, float]:
        """Run one update, log its row, and warn if the update has no effect."""
        logs = self.train_step.run(self.global_step + 1)
        self.global_step += 1
        self.folder.log(METRICS, logs)
        self.notify("on_step_end", self.global_step, logs)
        self.checks.check_gradients(self.train_step)
        # Without any gradient, the learning rate is not the cause.
        warmed_up = self.global_step == AUDITED + self.settings.lr_warmup_steps
        if warmed_up and not self.train_step.skipped and any(row["grad_norm"] for row in self.folder.rows[METRICS]):
            self.checks.check_images_changed(self.global_step)
        return logs

    def log_images(self) -> None:
        """Sample a grid of images, with the averaged LoRA if there is a moving average."""
        self.log_base_images()
        with self.train_step.averaged():
            self.log_samples(self.global_step)

    def log_base_images(self) -> None:
        """Sample a grid of images of the base model, once. It comes after the first update, which is sooner seen."""
        if self.validation.last_shown < 0:
            with self.validation.base_model():
                self.log_samples(0)

    def log_samples(self, step: int) -> None:
        """Sample a grid of images and notify the callbacks."""
        if (samples := self.validation.log_samples(step)) is not None:
            self.notify("on_sample", step, samples)

    def evaluate(self) -> None:
        """Evaluate the model, with the averaged LoRA if there is a moving average; the base model before it, once."""
        counted = {"reward_queries": self.train_step.scorer.queries, "train_seconds": round(self.train_step.seconds, 4)}
        with self.train_step.averaged():
            rows = self.validation.evaluate(self.global_step, counted)
        for row in rows:
            self.notify("on_evaluate", row["step"], row)

    def save_checkpoint(self, finished: bool = False) -> None:
        """Save the state of the run. Every process must call it."""
        state, tensors = train_state(self.train_step)
        if self.processes.main:
            random_numbers, generators = random_state()
            state |= {"finished": finished, "random": random_numbers}
            self.folder.save_checkpoint(self.global_step, state, {**tensors, **generators}, self.validation.best)
        self.notify("on_save", self.global_step)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Restore the state that `save_checkpoint` saved."""
        with self.processes.raise_on_all_ranks():
            state, tensors = read_state(checkpoint), read_tensors(checkpoint)
        self.global_step = state["step"]
        load_train_state(self.train_step, state, tensors, self.folder.changed)
        load_random_state(state["random"], tensors)

    def notify(self, event: str, *arguments: Any) -> None:
        """Call one method of every callback that has it. Raises DraftuneError that names the callback that failed."""
        for callback in self.callbacks:
            handler: Callable[..., None] | None = getattr(callback, event, None)
            if handler is None:
                continue
            try:
                handler(*arguments)
            except Exception as error:
                if out_of_memory(error):
                    raise
                name = f"callback {type(callback).__name__}.{event}"
                raise DraftuneError(f"{name} failed: {error_text(error)}") from error
