"""Distill a LoRA into one of a lower rank: the compression stage of FOSTER (arXiv:2204.04662), for denoisers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.evaluation.reward_check import tell_truncated
from draftune.lora import ADAPTER, FROZEN_ADAPTER, LoRADeltas, add_lora, deltas_of_peft, lora_parameters
from draftune.models import DiffusionModel
from draftune.prompts import load_prompts
from draftune.runs.load import load_base_with_loras, override, read_deltas, resolve_lora
from draftune.runs.merge import check_folder
from draftune.sampling.sampler import Denoiser, ddim_step
from draftune.sampling.schedule import Prediction, Step
from draftune.settings import Settings
from draftune.training.data import PromptSampler, sampled_first
from draftune.utils.devices import fork_rng
from draftune.utils.logging import logger
from draftune.utils.model_options import NO_OPTIONS, ModelOptions
from draftune.utils.paths import user_path

PROBED = 4
"""Prompts of each group on which the difference from the teacher is measured."""


@dataclass
class Distilled:
    """Result of `distill_lora`."""

    file: Path
    """The new LoRA."""
    differences: dict[str, float]
    """Mean squared `Schedule.output_difference` from the teacher, on the teacher's trajectories.

    The keys are "no LoRA", "truncated" (truncated singular value decomposition) and "distilled" (trained from there).
    """


def balanced_weights(counts: Sequence[int], beta: float = 0.97) -> list[float]:
    """Compute class-balanced weights of C groups with n_c members each, scaled to the sum C.

        weight_c ~ (1 - beta) / (1 - beta^n_c)

    Cui et al., 2019, arXiv:1901.05555, as in FOSTER. beta = 0 weights all members equally, beta near 1 all groups.

    Raises:
        DraftuneError: beta is not in [0, 1), or a group is empty.
    """
    if not 0 <= beta < 1:
        raise DraftuneError(f"group_balance must be at least 0 and below 1, got {beta}")
    if not counts or min(counts) < 1:
        raise DraftuneError(f"every group of prompts must have a member, got sizes {list(counts)}")
    raw = [1 / (1 - beta**count) for count in counts]
    return [len(raw) * weight / sum(raw) for weight in raw]


def distill_lora(
    source: str,
    prompts: Sequence[str | list[str]],
    output: Path | str,
    rank: int = 8,
    *,
    num_trajectories: int = 20,
    steps_per_trajectory: int = 5,
    batch_size: int = 4,
    learning_rate: float = 3e-4,
    group_balance: float = 0.97,
    seed: int = 0,
    model: str | None = None,
    skip_text_encoder: bool = False,
    options: ModelOptions = NO_OPTIONS,
    device: str = "auto",
    precision: str | None = None,
    quantization: str | None = None,
) -> Distilled:
    """Train a LoRA of a lower rank to predict what the source LoRA predicts, and write it into a folder.

    Training starts from the truncated singular value decomposition. Batches of images are sampled with the source
    (the teacher). At random steps of each trajectory, one AdamW step lowers the squared difference of the network's
    outputs. The learning rate follows a cosine to 0. If training does not lower the measured difference, the truncated
    LoRA is written.

    Args:
        source: A run folder, a LoRA file or its folder.
        prompts: Groups of prompts, each a named set, a file or a list, weighted by `balanced_weights`.
        output: Folder of the new LoRA; it may only hold an earlier result of the same call.
        rank: Rank of the new LoRA, below that of the source.
        num_trajectories: Number of sampled batches.
        steps_per_trajectory: Optimizer steps on each, at different sampling steps.
        learning_rate: Initial learning rate, 0 or more and below 1.
        group_balance: beta of `balanced_weights`.
        options: Where the base model's files come from, besides its name.

    Raises:
        DraftuneError: A setting is not allowed, or the source does not change the images.
    """
    if num_trajectories < 1 or steps_per_trajectory < 1 or batch_size < 1 or not 0 <= learning_rate < 1:
        raise DraftuneError(
            "num_trajectories, steps_per_trajectory and batch_size must be at least 1, learning_rate from 0 to below "
            f"1, got {num_trajectories}, {steps_per_trajectory}, {batch_size} and {learning_rate}"
        )
    folder, origin = user_path(output), f"{source}, rank {rank}"
    check_folder(folder, distilled_from=origin)
    groups = [load_prompts(group) for group in prompts]
    texts = [prompt for group in groups for prompt in group]
    balance = balanced_weights([len(group) for group in groups], group_balance)
    weights = [weight for weight, group in zip(balance, groups, strict=True) for _ in group]
    tuned = resolve_lora(source, model, skip_text_encoder, options)
    settings = override(tuned.settings, mixed_precision=precision, quantization=quantization)
    tuned = replace(tuned, settings=settings)
    if settings.mixed_precision == "fp16":
        raise DraftuneError("distillation does not work in fp16: use bf16 or no (mixed_precision)")
    deltas = read_deltas(source, tuned.base, skip_text_encoder, tuned.options)
    if len(deltas.parts) > 1:
        raise DraftuneError(
            f"the LoRA {source!r} also adapts a text encoder, and only a denoiser's LoRA is distilled: "
            "--skip-text-encoder-lora omits it"
        )
    if rank < 1 or rank >= (largest := max(layer.rank for layer in deltas.layers.values())):
        raise DraftuneError(f"rank must be at least 1 and below that of {source!r}, {largest}, got {rank}")
    loaded = load_base_with_loras({FROZEN_ADAPTER: tuned}, device)
    loaded.check_prompts(texts, tuned.settings.negative_prompt)
    tell_truncated(texts, loaded, (), tuned.settings.negative_prompt)
    # add_lora omits layers whose output the model does not use.
    unused = {f"{loaded.lora_prefix}.{name}" for name in loaded.unused_layers()}
    deltas.layers = {name: layer for name, layer in deltas.layers.items() if name not in unused} or deltas.layers
    with fork_rng():
        torch.manual_seed(seed)
        # The new LoRA is the active one; the model's base denoiser has the source's, under the name FROZEN_ADAPTER.
        add_lora(loaded, rank, targets=list(deltas.of_part(loaded.lora_prefix)))
    loaded.set_checkpointing(tuned.settings.gradient_checkpointing or "blocks")
    coming = sampled_first(texts, num_trajectories * batch_size, seed)
    coming += [prompt for group in groups for prompt in group[:PROBED]]
    loaded.cache_prompts(coming, tuned.settings.negative_prompt, tuned.settings.guidance_scale)

    lesson = Distiller(loaded, tuned.settings)
    probes = [lesson.trajectory(group[:PROBED], torch.Generator().manual_seed(seed)) for group in groups]
    differences = {"no LoRA": lesson.mean_difference(probes)}
    if not differences["no LoRA"] > 0:
        raise DraftuneError(f"the LoRA {source!r} does not change the images: there is nothing to distill")
    truncated = deltas.truncate_rank(rank).padded(rank)
    copy_weights(loaded, truncated)
    differences["truncated"] = lesson.mean_difference(probes)
    generator = torch.Generator().manual_seed(seed)
    parameters = list(lora_parameters(loaded).values())
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    tuned_steps = [i for i, step in enumerate(lesson.schedule.steps) if step.tuned]
    num_updates = num_trajectories * min(steps_per_trajectory, len(tuned_steps))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
    order = PromptSampler(len(texts), generator)
    bar = tqdm(range(num_trajectories), desc="distill", unit="trajectory")
    for _ in bar:
        chosen = order.next(batch_size)
        batch_weights = torch.tensor([weights[i] for i in chosen], device=loaded.device)
        trajectory = lesson.trajectory([texts[i] for i in chosen], generator)
        for i in torch.randperm(len(tuned_steps), generator=generator)[:steps_per_trajectory].tolist():
            loss = (batch_weights * lesson.difference(trajectory, tuned_steps[i])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        bar.set_postfix(difference=f"{float(loss.detach()):.2g}")
    differences["distilled"] = lesson.mean_difference(probes)
    if not differences["distilled"] <= differences["truncated"]:
        logger.warning("training did not lower the difference: the truncated LoRA is written")
        copy_weights(loaded, truncated)
    tensors = {
        f"{loaded.lora_prefix}.{name.replace(f'.{ADAPTER}.', '.')}": value
        for name, value in lora_parameters(loaded).items()
    }
    student = LoRADeltas(
        deltas_of_peft(tensors, 1.0), deltas.base_model, deltas.grid, deltas.lora_steps, deltas.base_options
    )
    return Distilled(student.write(folder, distilled_from=origin), differences)


@dataclass
class TeacherTrajectory:
    """A sampling trajectory of the teacher."""

    student: Denoiser
    """The student's denoiser for the same prompts."""
    steps: list[tuple[Step, Tensor, Prediction]]
    """(step, noisy latent [B, C, H, W], the teacher's prediction) for each sampling step."""


class Distiller:
    """A student, the model with its active LoRA, and a teacher, the model's base denoiser with the frozen LoRA."""

    def __init__(self, model: DiffusionModel, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.schedule = model.schedule(settings.num_inference_steps)

    @torch.no_grad()
    def trajectory(self, prompts: Sequence[str], generator: torch.Generator) -> TeacherTrajectory:
        """Sample with the teacher from new noise."""
        s = self.settings
        student, teacher = self.model.denoisers_for(prompts, self.schedule, s.guidance_scale, s.negative_prompt)
        (x, schedule), steps = self.model.start(generator, len(prompts), self.schedule), []
        for step in schedule.steps:
            prediction = teacher(x, step)
            steps.append((step, x, prediction))
            x = ddim_step(prediction, step)
        return TeacherTrajectory(student, steps)

    def difference(self, trajectory: TeacherTrajectory, at: int) -> Tensor:
        """Compute the mean squared `Schedule.output_difference` [B] of the student at one step."""
        step, x, target = trajectory.steps[at]
        return self.schedule.output_difference(trajectory.student(x, step), target, step).square().flatten(1).mean(1)

    @torch.no_grad()
    def mean_difference(self, trajectories: Sequence[TeacherTrajectory]) -> float:
        """Compute the mean of `difference` over all steps of the trajectories."""
        values = [self.difference(t, at).mean() for t in trajectories for at in range(len(t.steps))]
        return float(torch.stack(values).mean())


def copy_weights(model: DiffusionModel, deltas: LoRADeltas) -> None:
    """Copy a LoRA into the model's active LoRA of the same layers and rank, whose scale is 1."""
    parameters = lora_parameters(model)
    with torch.no_grad():
        for name, delta in deltas.of_part(model.lora_prefix).items():
            for half, tensor in (("A", delta.down), ("B", delta.up)):
                parameters[f"{name}.lora_{half}.{ADAPTER}.weight"].copy_(tensor)
