"""One update: fresh batches, their rewards, and the optimiser's steps uphill. It knows no method or reward by name."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.images import save_image, to_pil
from draftune.lora import lora_parameters
from draftune.methods import Batch, Method
from draftune.models import Model
from draftune.rewards import Reward, WeightedSum
from draftune.schedule import Schedule
from draftune.settings import Settings
from draftune.tensors import save_tensors
from draftune.training.audit import GradientAudit, tell
from draftune.training.checkpoint import checkpoints, load_optimizer, optimizer_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE_WITH_NONFINITE = 20
"""Updates in a row that may be left out before a run has to end."""


class NonFiniteError(DraftuneError):
    """A reward or a gradient is infinite or undefined."""


@dataclass
class Drawn:
    """A batch of an update: its noise, the pictures that it drew, their rewards and, by label, those of the parts."""

    prompts: list[str]
    noise: Tensor
    pictures: Tensor | None = None
    reward: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class Updates:
    """Makes the updates of a run and counts them, and keeps what went wrong in the run's `folder`, or nowhere."""

    def __init__(
        self,
        settings: Settings,
        method: Method,
        model: Model,
        schedule: Schedule,
        reward: Reward,
        prompts: Sequence[str],
        accelerator: Accelerator,
        folder: Path | None,
    ) -> None:
        self.settings = s = settings
        self.method, self.model, self.schedule, self.reward = method, model, schedule, reward
        self.prompts, self.accelerator, self.folder = prompts, accelerator, folder
        self.parameters = lora_parameters(model)
        self.optimizer = accelerator.prepare_optimizer(
            torch.optim.AdamW(
                self.parameters.values(),
                lr=s.learning_rate,
                betas=(s.adam_beta1, s.adam_beta2),
                weight_decay=s.weight_decay,
            )
        )
        # One generator for everything that training draws; the grids and the comparison have their own.
        self.generator = torch.Generator().manual_seed(s.seed)
        self.order = PromptOrder(len(prompts), self.generator)
        self.audit = GradientAudit(self.parameters)
        self.queries = self.overflows = self.skipped = self.skipped_in_a_row = 0
        self.seconds = 0.0

    def update(self, step: int) -> dict[str, float]:
        """One update: fresh batches, and the steps of the optimiser that the method makes of them."""
        s = self.settings
        start = time.perf_counter()
        rate = s.learning_rate * min(1.0, step / max(1, s.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        drawn: list[Drawn] = []
        grad_norm = math.nan
        try:
            for losses in self.method.optimizer_steps(self.fresh_batches(step, drawn)):
                self.optimizer.zero_grad()
                for loss in losses:
                    self.accelerator.backward(loss / s.gradient_accumulation_steps)
                grad_norm = self.clipped_norm(step)
                self.optimizer.step()
            self.skipped_in_a_row = 0
        except NonFiniteError as error:
            grad_norm = math.nan
            self.leave_out(step, drawn, error)
        self.seconds += time.perf_counter() - start
        scored = [batch for batch in drawn if batch.reward is not None]
        if not scored:
            raise DraftuneError(f"the method {s.method!r} scored nothing")
        reward = torch.cat([batch.reward for batch in scored if batch.reward is not None])
        parts = {label: torch.cat([batch.parts[label] for batch in scored]) for label in scored[0].parts}
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
        if self.skipped:
            row["skipped"] = self.skipped
        return row

    def leave_out(self, step: int, drawn: Sequence[Drawn], error: NonFiniteError) -> None:
        """Keeps the batches of an update that went wrong to look at, and ends the run unless they may be left out."""
        self.optimizer.zero_grad()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.folder is None:
            raise DraftuneError(str(error)) from error
        folder = self.folder / "nonfinite" / f"step-{step:06d}"
        for i, batch in enumerate(drawn):
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {"noise": batch.noise}
            if batch.pictures is not None:
                tensors["pictures"] = batch.pictures
                for j, picture in enumerate(to_pil(batch.pictures.nan_to_num(0))):
                    save_image(picture, folder / f"{i}-{j}.png")
            if batch.reward is not None:
                tensors["reward"] = batch.reward
            save_tensors(folder / f"{i}.safetensors", tensors, {"prompts": json.dumps(list(map(str, batch.prompts)))})
        if self.settings.on_nonfinite == "skip" and self.skipped_in_a_row <= PATIENCE_WITH_NONFINITE:
            tell(f"{error}; left out, its batch is in {str(folder)!r}")
            return
        last = checkpoints(self.folder / "checkpoints")
        way = "--on-nonfinite skip leaves such updates out"
        if self.settings.on_nonfinite == "skip":
            way = f"so were the {PATIENCE_WITH_NONFINITE} before it: try a lower learning rate, or --mixed-precision no"
        saved = f"; the last checkpoint is {last[-1].name}" if last else ""
        raise DraftuneError(f"{error}; its batch is in {str(folder)!r}{saved}; {way}") from error

    def fresh_batches(self, step: int, drawn: list[Drawn]) -> Iterator[Batch]:
        """The batches of one update; each one's own pictures and their scores are added to `drawn`."""
        s = self.settings
        for _ in range(s.gradient_accumulation_steps):
            prompts = [self.prompts[i] for i in self.order.draw(s.batch_size)]
            noise = self.model.noise(self.generator, len(prompts))
            denoise, base = self.model.denoisers(prompts, self.schedule, s.guidance_scale, s.negative_prompt)
            drawn.append(Drawn(prompts, noise))
            reward = partial(self.score, drawn[-1], step)
            yield Batch(prompts, noise, self.schedule, denoise, base, reward, self.generator)

    def score(self, batch: Drawn, step: int, clean: Tensor) -> Tensor:
        """The rewards of clean latents; of a batch's first, which are what it drew, it keeps pictures and rewards."""
        pictures = self.model.decode(clean)
        total, parts = self.reward.parts(pictures, batch.prompts)
        self.queries += len(batch.prompts)
        if batch.reward is None or not total.isfinite().all():
            batch.pictures, batch.reward, batch.parts = pictures.detach(), total.detach(), parts
        if not total.isfinite().all():
            raise NonFiniteError(f"the reward became {total.tolist()} at update {step}")
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
        if self.accelerator.scaler is None or self.overflows > PATIENCE_WITH_NONFINITE:
            if self.accelerator.scaler is not None:
                self.optimizer.step()  # which leaves the weights alone, and the scaler ready for the next gradient
            raise NonFiniteError(f"the gradient's norm became {norm} at update {step}")
        return norm

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Where it stands: what JSON can hold, and tensors by name."""
        scaler = self.accelerator.scaler
        tensors = {f"lora/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= optimizer_tensors(self.optimizer, list(self.parameters))
        tensors["generator"] = self.generator.get_state()
        return {
            "reward_queries": self.queries,
            "seconds": self.seconds,
            "skipped": [self.skipped, self.skipped_in_a_row, self.overflows],
            "prompts": self.order.queue,
            "weights": [weight for weight, _ in self.reward.terms],
            "method": self.method.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }, tensors

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Goes back to where it stood."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"lora/{name}"])
        load_optimizer(self.optimizer, list(self.parameters), tensors)
        self.generator.set_state(tensors["generator"])
        self.queries, self.seconds = state["reward_queries"], state["seconds"]
        self.skipped, self.skipped_in_a_row, self.overflows = state["skipped"]
        self.order.queue = state["prompts"]
        if isinstance(self.reward, WeightedSum):
            # Measured again, a normalised reward's weights may differ in their last digits.
            self.reward.weights = state["weights"]
        self.method.load_state_dict(state["method"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


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
