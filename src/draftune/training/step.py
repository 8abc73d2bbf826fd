"""One update: fresh batches, their rewards, and the optimiser's steps uphill. It knows no method or reward by name."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from draftune.errors import DraftuneError
from draftune.experimental.optimizers import Evaluating
from draftune.lora import lora_parameters
from draftune.methods import Batch, Method
from draftune.models import Model
from draftune.rewards import Reward, WeightedSum
from draftune.rewards.base import begin_step
from draftune.rewards.online import carried
from draftune.runs.checkpoint import checkpoints, load_optimizer, optimizer_tensors
from draftune.runs.resuming import COMPUTED
from draftune.sampling.sampler import Latents
from draftune.sampling.schedule import Schedule
from draftune.settings import Settings
from draftune.training.checks import GradientAudit
from draftune.training.data import Drawn, PromptOrder, Start, read_starts, starts_state
from draftune.training.fsdp import put_back
from draftune.training.gradient_noise import GradientNoise
from draftune.training.optim import Replay, filter_of, optimizer_of
from draftune.training.reward_step import NonFiniteError, Scorer
from draftune.utils.images import save_image, to_pil
from draftune.utils.processes import ALONE, Processes, tell
from draftune.utils.tensors import save_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

METHOD_STATE = {"model", "reward", "normalize_reward", "method", "height", "width"}
METHOD_STATE |= {"num_inference_steps", "timestep_spacing", "set_alpha_to_one"}
"""Settings that a method's state depends on: statistics of the reward, networks for the steps of the sampler."""
PATIENCE_WITH_NONFINITE = 20
"""Updates in a row that may be left out before a run has to end."""


def clipped_share(norms: Sequence[float], max_grad_norm: float) -> float:
    """Return the share of the gradients that were scaled down to `max_grad_norm`, 0 for no limit."""
    if not all(map(math.isfinite, norms)):
        return math.nan
    return sum(norm > (max_grad_norm or math.inf) for norm in norms) / len(norms)


class Updates:
    """Makes the updates of a run and counts them, and keeps what went wrong in the run's `folder`, or nowhere.

    Every process draws the same prompts and noise and takes its part of them; the gradients are averaged before they
    are clipped, so that each has the same LoRA and makes the same steps.
    """

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
        processes: Processes = ALONE,
        kept: Sequence[str] = (),
    ) -> None:
        self.settings = s = settings
        self.method, self.model, self.schedule = method, model, schedule
        self.prompts, self.accelerator, self.folder, self.processes = prompts, accelerator, folder, processes
        self.parameters = lora_parameters(model)
        self.optimizer = accelerator.prepare_optimizer(optimizer_of(s, self.parameters.values()))
        self.filter = filter_of(s, self.parameters)
        self.noise = GradientNoise(self.parameters, processes) if s.signal_to_noise else None
        # One generator for everything that training draws; the grids and the comparison have their own.
        self.generator = torch.Generator().manual_seed(s.seed)
        self.order = PromptOrder(len(prompts), self.generator)
        self.kept, self.kept_order = kept, PromptOrder(len(kept), self.generator)
        self.audit = GradientAudit(self.parameters)
        self.scorer = Scorer(settings, model, reward, accelerator.scaler, processes)
        self.starts: list[Start] = []
        self.overflows = self.skipped = self.skipped_in_a_row = 0
        self.norms: list[float] = []
        """Of the gradients of the present update, before they were clipped."""
        self.without_gradient = 0
        """Updates in a row whose gradients were all exactly 0."""
        self.why_constant = ""
        """Why the last gradient was 0, where the method knows it."""
        self.seconds = 0.0

    def update(self, step: int) -> dict[str, float]:
        """One update: fresh batches, and the steps of the optimiser that the method makes of them."""
        s = self.settings
        start = time.perf_counter()
        rate = s.learning_rate * min(1.0, step / max(1, s.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        begin_step(self.scorer.reward, step)
        self.draw_starts()
        drawn: list[Drawn] = []
        self.norms = []
        try:
            if isinstance(self.optimizer.optimizer, Evaluating):
                self.optimizer_step(step, drawn)
            else:
                for losses in self.method.optimizer_steps(self.fresh_batches(step, drawn)):
                    self.gradient(step, losses, drawn)
                    self.optimizer.step()
            self.skipped_in_a_row = 0
        except NonFiniteError as error:
            self.norms = [math.nan]
            self.leave_out(step, drawn, error)
        norms = self.norms or [math.nan]
        self.without_gradient = 0 if any(norms) else self.without_gradient + 1
        if step % s.prefix_reuse == 0:
            self.starts = []  # no other update shares them
        put_back(self.model)
        for learned in carried(self.scorer.reward).values():
            # Each process asked about pictures of its own.
            learned.copy_(self.processes.gather(learned[None]).mean(0))
        self.seconds += time.perf_counter() - start
        # Where the optimiser took several gradients, those drawn for the first.
        scored = [batch for batch in drawn[: s.gradient_accumulation_steps] if batch.reward is not None]
        if not scored:
            raise DraftuneError(f"the method {s.method!r} scored nothing")
        reward = torch.cat([batch.reward for batch in scored if batch.reward is not None])
        parts = {label: torch.cat([batch.parts[label] for batch in scored]) for label in scored[0].parts}
        row = {
            "step": step,
            "reward": float(reward.mean()),
            "reward_std": float(reward.std(unbiased=False)),
            "reward_queries": self.scorer.queries,
            "grad_norm": norms[0],
            "grad_clip_fraction": clipped_share(norms, s.max_grad_norm),
            "learning_rate": rate,
            "seconds": round(self.seconds, 4),
            **self.method.report(),
        }
        if self.noise is not None:
            row["signal_to_noise"] = self.noise.ratio
        if len(parts) > 1:
            row |= {f"reward/{label}": float(scores.mean()) for label, scores in parts.items()}
        if self.skipped:
            row["skipped"] = self.skipped
        return row

    def optimizer_step(self, step: int, drawn: list[Drawn]) -> None:
        """The step of an optimiser that takes its gradients itself, each on the same batches with the same noise."""
        before = Replay(self.generator)

        def evaluate() -> None:
            before.rewind()
            steps = self.method.optimizer_steps(self.fresh_batches(step, drawn))
            self.gradient(step, next(steps), drawn)
            if next(steps, None) is not None:
                raise DraftuneError(f"the method {self.settings.method!r} makes several steps: use adamw or sgd")

        self.optimizer.step(evaluate)

    def gradient(self, step: int, losses: Iterator[Tensor], drawn: Sequence[Drawn]) -> None:
        """Leaves the mean gradient of the losses with the weights, filtered and clipped."""
        self.optimizer.zero_grad()
        if self.noise is not None:
            self.noise.clear()
        seen = 0
        for loss in losses:
            if self.noise is not None and seen and len(drawn) > seen:
                self.noise.add()
            seen = len(drawn)
            self.accelerator.backward(loss / self.settings.gradient_accumulation_steps)
        if self.noise is not None:
            self.noise.add()
            self.noise.measure()
        self.processes.mean_(self.parameters.values())
        # In the filter's metric this is the gradient; what is clipped is what the optimiser is given.
        self.filter()
        self.clip(step)

    def leave_out(self, step: int, drawn: Sequence[Drawn], error: NonFiniteError) -> None:
        """Keeps the batches of an update that went wrong to look at, and ends the run unless they may be left out."""
        self.optimizer.zero_grad()
        self.starts = []  # or the next update would meet it again
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.folder is None:
            raise DraftuneError(str(error)) from error
        folder = self.folder / "nonfinite" / f"step-{step:06d}"
        for i, batch in enumerate(drawn):
            tensors = {"noise": batch.noise}
            if batch.pictures is not None:
                tensors["pictures"] = self.processes.gather(batch.pictures)
            if batch.reward is not None:
                tensors["reward"] = batch.reward
            if not self.processes.main:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            for j, picture in enumerate(to_pil(tensors["pictures"].nan_to_num(0)) if "pictures" in tensors else ()):
                save_image(picture, folder / f"{i}-{j}.png")
            save_tensors(folder / f"{i}.safetensors", tensors, {"prompts": json.dumps(list(map(str, batch.prompts)))})
        if self.settings.on_nonfinite == "skip" and self.skipped_in_a_row <= PATIENCE_WITH_NONFINITE:
            tell(f"{error}; left out, its batch is in {str(folder)!r}")
            return
        last = checkpoints(self.folder / "checkpoints")
        way = "--on-nonfinite skip leaves such updates out"
        if self.settings.on_nonfinite == "skip":
            way = f"so were the {PATIENCE_WITH_NONFINITE} before it: try a lower learning rate, or --mixed-precision no"
        saved = f"; the last checkpoint is {last[-1].name}" if last else ""
        with self.processes.together():
            raise DraftuneError(f"{error}; its batch is in {str(folder)!r}{saved}; {way}") from error

    def draw_starts(self) -> None:
        """What the batches of an update start from, but for what the update before left."""
        while len(self.starts) < self.settings.gradient_accumulation_steps:
            self.starts.append(self.start(self.order))
            if self.kept:
                self.starts[-1].kept = self.start(self.kept_order)

    def start(self, order: PromptOrder) -> Start:
        """The next prompts, with fresh noise."""
        s = self.settings
        chosen = order.draw(s.batch_size)
        noise = self.model.noise(self.generator, s.batch_size)
        return Start(chosen, noise, Latents(self.processes.share(noise), stride=s.prefix_stride))

    def fresh_batches(self, step: int, drawn: list[Drawn]) -> Iterator[Batch]:
        """The batches of one update; each one's own pictures and their scores are added to `drawn`."""
        for start in self.starts:
            drawn.append(Drawn([self.prompts[j] for j in start.prompts], start.noise))
            batch = self.batch(step, start, drawn[-1])
            if start.kept is not None:
                kept = Drawn([self.kept[j] for j in start.kept.prompts], start.kept.noise)
                batch.kept = self.batch(step, start.kept, kept)
            yield batch

    def batch(self, step: int, start: Start, drawn: Drawn) -> Batch:
        """What a method is given of a start; what is scored goes into `drawn`."""
        s, own = self.settings, self.processes.share(drawn.prompts)
        denoise, base = self.model.denoisers(own, self.schedule, s.guidance_scale, s.negative_prompt)
        reward, processes = partial(self.scorer, drawn, step), self.processes
        return Batch(own, start.latents, self.schedule, denoise, base, reward, self.generator, processes, drawn.prompts)

    def clip(self, step: int) -> None:
        """Clip the gradient to `max_grad_norm`, and note its norm before that.

        Raises NonFiniteError where the norm is not finite, and DraftuneError for tensors that never had a gradient.
        """
        limit = self.settings.max_grad_norm or math.inf
        # As accelerate clips, but where it knows FSDP: it would take the scale out twice.
        self.accelerator.unscale_gradients()
        norm = float(clip_grad_norm_(self.parameters.values(), limit))
        self.norms.append(norm)
        if math.isfinite(norm):
            self.overflows = 0
            # A method's own reason for a gradient of 0 is not the fault of the LoRA's tensors.
            self.why_constant = self.method.constant_losses() if norm == 0 else ""
            if not self.why_constant:
                with self.processes.together():
                    self.audit.check()
            return
        # fp16's gradient scaler finds its scale by overflowing, and skips those updates itself.
        self.overflows += 1
        if self.accelerator.scaler is None or self.overflows > PATIENCE_WITH_NONFINITE:
            if self.accelerator.scaler is not None:
                self.optimizer.step()  # which leaves the weights alone, and the scaler ready for the next gradient
            raise NonFiniteError(f"the gradient's norm became {norm} at update {step}")

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Where it stands: what JSON can hold, and tensors by name. To be asked in every process."""
        scaler, method = self.accelerator.scaler, self.method.state_dict()
        tensors = {f"lora/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= optimizer_tensors(self.optimizer, list(self.parameters))
        tensors |= carried(self.scorer.reward)
        tensors |= {f"method/{key}": value for key, value in method.items() if isinstance(value, Tensor)}
        tensors["generator"] = self.generator.get_state()
        starts, latents = starts_state(self.starts, self.processes)
        tensors |= latents
        return {
            **starts,
            "kept_prompts": self.kept_order.queue,
            "reward_queries": self.scorer.queries,
            "seconds": self.seconds,
            "skipped": [self.skipped, self.skipped_in_a_row, self.overflows],
            "prompts": self.order.queue,
            "weights": [weight for weight, _ in self.scorer.reward.terms],
            "method": {key: value for key, value in method.items() if not isinstance(value, Tensor)},
            "scaler": scaler.state_dict() if scaler else None,
        }, tensors

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], changed: Collection[str] = ()) -> None:
        """Restore what `state` gave, except what belongs to settings that are `changed`.

        Raises DraftuneError if the LoRA is one of another network.
        """
        saved = {name: tensors.get(f"lora/{name}") for name in self.parameters}
        for name, parameter in self.parameters.items():
            if (found := saved[name]) is None or found.shape != parameter.shape:
                shape = "no such layer" if found is None else f"the shape {tuple(found.shape)} there"
                raise DraftuneError(
                    f"the LoRA of the run does not fit {self.model.name!r}: {name} has {shape}; give another folder "
                    "(--output)"
                )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"lora/{name}"])
        if "optimizer" not in changed:
            load_optimizer(self.optimizer, list(self.parameters), tensors)
        same_reward = not {"reward", "normalize_reward"} & set(changed)
        for name, learned in carried(self.scorer.reward).items() if same_reward else ():
            learned.resize_as_(tensors[name]).copy_(tensors[name])
        self.generator.set_state(tensors["generator"])
        self.scorer.queries, self.seconds = state["reward_queries"], state["seconds"]
        self.skipped, self.skipped_in_a_row, self.overflows = state["skipped"]
        if "prompts" not in changed:
            self.order.queue = state["prompts"]
        if "keep" not in changed:
            self.kept_order.queue = state.get("kept_prompts", [])
        if not set(changed) & set(COMPUTED):
            # Batches that several updates share depend on nearly all settings; where one changed, fresh ones are drawn.
            self.starts = read_starts(state, tensors, self.processes, self.model.device, self.settings.prefix_stride)
        if isinstance(self.scorer.reward, WeightedSum) and same_reward:
            # Measured again, a normalised reward's weights may differ in their last digits.
            self.scorer.reward.weights = state["weights"]
        if not METHOD_STATE & set(changed):
            carried_on = {k.removeprefix("method/"): v for k, v in tensors.items() if k.startswith("method/")}
            self.method.load_state_dict(state["method"] | carried_on)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
