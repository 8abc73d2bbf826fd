"""One training update: sample, score, backpropagate, clip the gradient, take the optimizer step, log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from draftune.errors import DraftuneError
from draftune.lora import lora_parameters
from draftune.methods import Batch
from draftune.rewards.base import begin_step
from draftune.rewards.online import carried
from draftune.sampling.sampler import PrefixCache
from draftune.training.context import TrainContext
from draftune.training.data import BatchInput, BatchRecord, PromptSampler
from draftune.training.fsdp import reshard
from draftune.training.gradient_check import GradientCheck
from draftune.training.gradient_noise import GradientNoise
from draftune.training.nonfinite import MAX_NONFINITE_STEPS, save_nonfinite, skip_or_stop
from draftune.training.optim import RNGReplay, filter_of, learning_rates, needs_closure, optimizer_of
from draftune.training.prefix_mode import PrefixMode, sample_prefixes
from draftune.training.prefix_reuse import PrefixReuse, adapt_reuse
from draftune.training.reward_step import NonFiniteError, Scorer
from draftune.training.update_row import update_row


class TrainStep:
    """Run the updates of a training run.

    Every process samples the same prompts and noise and computes its share of them. The gradients are averaged over
    the processes before they are clipped, so that all processes take the same optimizer step.

    Attributes:
        parameters: The trainable LoRA tensors by name.
        pending: Current batches: prompt indices, noise and cached prefix. They serve `reuse.steps` updates.
        norms: Gradient norms of the current update before clipping, one for each backward pass.
        skipped, skipped_in_a_row: Updates skipped because of a reward or gradient that is not finite.
        without_gradient: Consecutive updates whose gradient was exactly 0.
        why_constant: The method's reason for the last gradient of 0, if it knows one.
        seconds: Time spent in updates.
        ema: The moving average of the LoRA, None without `ema_decay`.
        folder: Where batches that are not finite are saved; None ends the run without saving them.
    """

    def __init__(self, context: TrainContext) -> None:
        self.context, s = context, context.settings
        self.folder: Path | None = context.folder.path
        self.parameters = lora_parameters(context.model)
        self.optimizer = context.accelerator.prepare_optimizer(optimizer_of(s, self.parameters.values()))
        self.learning_rate = learning_rates(s)
        self.gradient_filter = filter_of(s, self.parameters)
        self.ema = None
        if s.ema_decay:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(self.parameters.values(), s.ema_decay)
        self.gradient_noise = GradientNoise(self.parameters, context.processes) if s.log_gradient_snr else None
        # Training has its own generator, so that samples and evaluations do not change it.
        self.generator = torch.Generator().manual_seed(s.seed)
        self.prompt_sampler = PromptSampler(len(context.prompts), self.generator, s.num_images_per_prompt)
        self.retain_sampler = PromptSampler(len(context.retained), self.generator)
        # At a learning rate of 0, B stays 0 and A never has a gradient.
        self.gradient_check = GradientCheck(self.parameters if s.learning_rate else {})
        self.scorer = Scorer(context)
        self.prefix_mode = PrefixMode(s, context.model)
        self.pending: list[BatchInput] = []
        self.reuse = PrefixReuse(s.prefix_reuse_steps, s.prefix_reuse_cosine)
        self.overflows = self.skipped = self.skipped_in_a_row = 0
        self.norms: list[float] = []
        self.without_gradient = 0
        self.why_constant = ""
        self.seconds = 0.0

    def run(self, step: int) -> dict[str, float]:
        """Run one update on the pending batches. Methods such as DDPO take several optimizer steps.

        Args:
            step: Number of the update, from 1.

        Returns:
            The update's row of metrics.jsonl.

        Raises:
            DraftuneError: a reward or gradient is not finite and may not be skipped, or LoRA tensors get no gradient.
        """
        start = time.perf_counter()
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        begin_step(self.context.reward, step)
        measured = adapt_reuse(self, step)
        self.sample_inputs()
        records: list[BatchRecord] = []
        self.norms = []
        try:
            self.optimize(step, records)
            self.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.step(self.parameters.values())
        except NonFiniteError as error:
            self.handle_nonfinite(step, records, error)
        self.without_gradient = 0 if any(self.norms or [math.nan]) else self.without_gradient + 1
        self.reuse.count()
        if not self.pending or (self.reuse.finished and not self.reuse.due):
            self.replace_pending()
        reshard(self.context.model)
        for learned in carried(self.context.reward).values():
            # Each process updated it with images of its own.
            learned.copy_(self.context.processes.gather(learned[None]).mean(0))
        self.seconds += time.perf_counter() - start
        return update_row(self, step, rate, records) | measured

    def replace_pending(self) -> None:
        """Discard the batches and their prefixes, so that the next update samples others."""
        self.pending, self.reuse.used = [], 0

    def sample_inputs(self) -> None:
        """Choose prompts and noise for the batches of an update, unless the update before left them."""
        while len(self.pending) < self.context.settings.gradient_accumulation_steps:
            self.pending.append(self.next_input(self.prompt_sampler))
            if self.context.retained:
                self.pending[-1].retained = self.next_input(self.retain_sampler)

    def next_input(self, order: PromptSampler) -> BatchInput:
        """Return the next prompts with fresh noise."""
        s, model = self.context.settings, self.context.model
        chosen = order.next(s.batch_size)
        noise, schedule = model.start(self.generator, s.batch_size, self.context.schedule)
        share = self.context.processes.shard
        fresh = [share(step.fresh_noise) for step in schedule.steps if step.fresh_noise is not None]
        return BatchInput(chosen, noise, PrefixCache(share(noise), stride=s.prefix_stride), fresh)

    def batches(self, step: int, records: list[BatchRecord]) -> Iterator[Batch]:
        """Yield the batches of an update, which a method samples and scores; `records` receives their scores."""
        size = self.context.settings.prefix_batches
        for i, item in enumerate(self.pending):
            records.append(self.record(item))
            # An optimizer with a closure computes the gradient of the same batches several times.
            records[-1].teaches = len(records) <= len(self.pending)
            batch = self.batch(step, item, records[-1])
            if size > 1:
                group = self.pending[i - i % size :][:size]
                batch.sample_prefix = partial(sample_prefixes, self.context, self.prefix_mode, group)
            yield batch

    def record(self, item: BatchInput) -> BatchRecord:
        """Return an empty record of a batch."""
        return BatchRecord([self.context.prompts[i] for i in item.prompt_indices], item.noise)

    def batch(self, step: int, item: BatchInput, record: BatchRecord) -> Batch:
        """Return this process's share of a batch; its scores are stored in `record`."""
        batch = self.batch_of(step, item, record)
        if (kept := item.retained) is not None:
            names = [self.context.retained[i] for i in kept.prompt_indices]
            batch.retention_batch = self.batch_of(step, kept, BatchRecord(names, kept.noise))
        return batch

    def batch_of(self, step: int, item: BatchInput, record: BatchRecord) -> Batch:
        """Return this process's share of a batch, without its retention batch."""
        c, s = self.context, self.context.settings
        own = c.processes.shard(record.prompts)
        denoise, base = c.model.denoisers_for(own, c.schedule, s.guidance_scale, s.negative_prompt)
        reward = partial(self.scorer, record, step)
        schedule = c.schedule.with_noise(item.fresh_noise)
        return Batch(
            own,
            item.prefix_cache,
            schedule,
            denoise,
            base,
            reward,
            self.generator,
            c.processes,
            record.prompts,
            images_per_prompt=s.num_images_per_prompt,
            parameters=self.parameters,
            prefix_mode=self.prefix_mode,
        )

    def optimize(self, step: int, records: list[BatchRecord]) -> None:
        """Take the optimizer steps of an update: backward pass of the method's losses, clipping, optimizer step."""
        method = self.context.method
        if not needs_closure(self.optimizer.optimizer):
            for losses in method.losses_per_step(self.batches(step, records)):
                self.backward(step, losses, records)
                self.clip(step)
                self.optimizer.step()
            return
        before = RNGReplay(self.generator)

        def closure() -> None:
            """Compute the gradient at the current weights, on the same batches with the same random numbers."""
            before.rewind()
            steps = method.losses_per_step(self.batches(step, records))
            self.backward(step, next(steps), records)
            self.clip(step)
            if next(steps, None) is not None:
                raise DraftuneError(
                    f"the method {self.context.settings.method!r} takes several optimizer steps an update: use adamw "
                    "or sgd"
                )

        self.optimizer.step(closure)

    def backward(self, step: int, losses: Iterator[Tensor], records: Sequence[BatchRecord]) -> None:
        """Accumulate the gradients of the losses, average them over the processes and apply the gradient filter."""
        self.optimizer.zero_grad()
        if self.gradient_noise is not None:
            self.gradient_noise.clear()
        seen = 0
        for loss in losses:
            if self.gradient_noise is not None and seen and len(records) > seen:
                self.gradient_noise.add()
            seen = len(records)
            self.context.accelerator.backward(loss / self.context.settings.gradient_accumulation_steps)
        if self.gradient_noise is not None:
            self.gradient_noise.add()
            self.gradient_noise.measure()
        self.context.processes.mean_(self.parameters.values())
        self.gradient_filter()

    def clip(self, step: int) -> None:
        """Clip the gradient to `max_grad_norm`, and store its norm before clipping.

        Raises:
            NonFiniteError: the norm is not finite.
            DraftuneError: a LoRA tensor had no gradient in the first updates.
        """
        accelerator = self.context.accelerator
        # accelerator.clip_grad_norm_ would unscale fp16 gradients twice under FSDP.
        accelerator.unscale_gradients()
        norm = float(clip_grad_norm_(self.parameters.values(), self.context.settings.max_grad_norm or math.inf))
        self.norms.append(norm)
        if math.isfinite(norm):
            self.overflows = 0
            # If the method explains a gradient of 0, skip the check for LoRA tensors that get none.
            self.why_constant = self.context.method.explain_zero_gradient() if norm == 0 else ""
            if not self.why_constant:
                with self.context.processes.raise_on_all_ranks():
                    self.gradient_check.check()
            return
        # The gradient scaler of fp16 lowers its scale after an overflow, and skips that optimizer step itself.
        self.overflows += 1
        if accelerator.scaler is None or self.overflows > MAX_NONFINITE_STEPS:
            if accelerator.scaler is not None:
                self.optimizer.step()  # changes no weight, and prepares the scaler for the next gradient
            raise NonFiniteError(f"the gradient's norm became {norm} at update {step}")

    def handle_nonfinite(self, step: int, records: Sequence[BatchRecord], error: NonFiniteError) -> None:
        """Skip an update that is not finite, and save its batches. Raises DraftuneError if it may not be skipped."""
        self.norms = [math.nan]
        self.optimizer.zero_grad()
        self.pending = []  # the next update must not train on this batch again
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.folder is None:
            raise DraftuneError(str(error)) from error
        processes, skip = self.context.processes, self.context.settings.nonfinite_action == "skip"
        save_nonfinite(self.folder / "nonfinite" / f"step-{step:06d}", records, processes)
        with processes.raise_on_all_ranks():
            skip_or_stop(error, self.folder, step, skip, self.skipped_in_a_row)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the LoRA its averaged weights inside the block, if there is a moving average."""
        if self.ema is None:
            yield
            return
        weights = list(self.parameters.values())
        self.ema.store(weights)
        self.ema.copy_to(weights)
        try:
            yield
        finally:
            self.ema.restore(weights)
