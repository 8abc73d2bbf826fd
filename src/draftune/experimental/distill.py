"""A LoRA made one of a lower rank that draws as it does: FOSTER's second stage (arXiv 2204.04662), for denoisers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.evaluation.reward_check import tell_truncated
from draftune.lora import ADAPTER, KEPT, LoRADeltas, add_lora, deltas_of_peft, lora_parameters
from draftune.models import Model
from draftune.prompts import load_prompts
from draftune.runs.load import find_tuned, open_loras, read_deltas
from draftune.runs.merge import check_folder
from draftune.sampling.sampler import Denoiser, advance
from draftune.sampling.schedule import Prediction, Step
from draftune.settings import Settings
from draftune.training.data import PromptOrder
from draftune.utils.paths import user_path
from draftune.utils.processes import tell

PROBED = 4
"""Prompts of each group on which the difference is measured."""


@dataclass
class Distilled:
    """The LoRA's file, and the mean squared `Schedule.prediction_error` from the teacher along the teacher's paths.

    differences: with "no LoRA", with its singular values "truncated", and as "distilled" from there.
    """

    file: Path
    differences: dict[str, float]


def balanced_weights(counts: Sequence[int], beta: float = 0.97) -> list[float]:
    """FOSTER's weights of C groups with n members each, (1 - beta) / (1 - beta^n), so that they sum to C.

    beta in [0, 1): at 0 every member counts alike, near 1 every group does, whatever its size. Raises DraftuneError.
    """
    if not 0 <= beta < 1:
        raise DraftuneError(f"beta must be at least 0 and less than 1, not {beta}")
    if not counts or min(counts) < 1:
        raise DraftuneError(f"every group must have a member, and these have {list(counts)}")
    raw = [1 / (1 - beta**count) for count in counts]
    return [len(raw) * weight / sum(raw) for weight in raw]


def distill_lora(
    source: str,
    prompts: Sequence[str | list[str]],
    output: Path | str,
    rank: int = 8,
    *,
    paths: int = 20,
    calls: int = 5,
    batch_size: int = 4,
    learning_rate: float = 3e-4,
    beta: float = 0.97,
    seed: int = 0,
    model: str | None = None,
    skip_text_encoder: bool = False,
    cpu: bool = False,
    precision: str = "no",
) -> Distilled:
    """Writes a LoRA of this rank into a folder, trained to predict what a run's LoRA, a file or its folder does.

    `prompts`: groups, each a named set, a file or a list; a group of few prompts is weighed up by `balanced_weights`.
    It starts from the truncated singular value decomposition. `paths` batches of pictures are drawn with the LoRA, and
    on each path the squared difference is lowered at `calls` random steps, one step of AdamW each, whose rate falls to
    0 as a cosine; what comes of it is written where it is nearer than the start. Raises DraftuneError.
    """
    if paths < 1 or calls < 1 or batch_size < 1 or not 0 <= learning_rate < 1:
        raise DraftuneError("paths, calls and batch_size must be at least 1, and learning_rate from 0 to below 1")
    folder, said = user_path(output), f"{source}, rank {rank}"
    check_folder(folder, distilled_from=said)
    groups = [load_prompts(group) for group in prompts]
    weights = balanced_weights([len(group) for group in groups], beta)
    if precision == "fp16":
        raise DraftuneError("distilling does not work in fp16: use bf16 or no")
    tuned = find_tuned(source, model, skip_text_encoder)
    whole = read_deltas(source, tuned.base, skip_text_encoder)
    if len(whole.parts) > 1:
        raise DraftuneError(
            f"the LoRA {source!r} adapts a text encoder too, and only a denoiser's is distilled: "
            "--skip-text-encoder-lora leaves it out"
        )
    if rank < 1 or rank >= (most := max(layer.rank for layer in whole.layers.values())):
        raise DraftuneError(f"the rank must be at least 1 and lower than that of {source!r}, {most}, not {rank}")
    painter = open_loras({KEPT: tuned}, cpu, precision)
    texts = [prompt for group in groups for prompt in group]
    # add_lora leaves out the others.
    unused = {f"{painter.lora_prefix}.{name}" for name in painter.unused_layers()}
    used = {name: layer for name, layer in whole.layers.items() if name not in unused}
    whole.layers = used or whole.layers
    painter.check_prompts(texts, tuned.settings.negative_prompt)
    tell_truncated(texts, painter, (), tuned.settings.negative_prompt)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # From now on it is the only active one: that which is loaded is heard as the base.
        add_lora(painter, rank, targets=list(whole.of_part(painter.lora_prefix)))
    painter.set_checkpointing(tuned.settings.gradient_checkpointing or "blocks")
    lesson = Lesson(painter, tuned.settings)
    probes = [lesson.path(group[:PROBED], torch.Generator().manual_seed(seed)) for group in groups]
    differences = {"no LoRA": lesson.missed(probes)}
    if not differences["no LoRA"] > 0:
        raise DraftuneError(f"the LoRA {source!r} changes nothing that the model draws: there is nothing to distil")
    short = whole.truncated(rank).padded(rank)
    fill(painter, short)
    differences["truncated"] = lesson.missed(probes)
    weighed = [(prompt, weight) for weight, group in zip(weights, groups, strict=True) for prompt in group]
    learn(lesson, weighed, paths, calls, batch_size, learning_rate, torch.Generator().manual_seed(seed))
    differences["distilled"] = lesson.missed(probes)
    if not differences["distilled"] <= differences["truncated"]:
        tell("learning brought it no nearer: the truncated LoRA is written")
        fill(painter, short)
    own = {name.replace(f".{ADAPTER}.", "."): value for name, value in lora_parameters(painter).items()}
    tensors = {f"{painter.lora_prefix}.{name}": value for name, value in own.items()}
    student = LoRADeltas(deltas_of_peft(tensors, 1.0), whole.base_model, whole.grid)
    return Distilled(student.write(folder, distilled_from=said), differences)


@dataclass
class Taught:
    """A path of the teacher's: how the student sees its prompts, and at each step the latent and what is to be said."""

    student: Denoiser
    steps: list[tuple[Step, Tensor, Prediction]]


class Lesson:
    """A student, the LoRA that is active, and its teacher, the one that belongs to the base of the same model."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.schedule = model.schedule(settings.num_inference_steps)

    @torch.no_grad()
    def path(self, prompts: Sequence[str], generator: torch.Generator) -> Taught:
        """From fresh noise to the teacher's pictures."""
        s = self.settings
        student, teacher = self.model.denoisers(prompts, self.schedule, s.guidance_scale, s.negative_prompt)
        x, steps = self.model.noise(generator, len(prompts)), []
        for step in self.schedule.steps:
            said = teacher(x, step)
            steps.append((step, x, said))
            x = advance(said, step)
        return Taught(student, steps)

    def difference(self, taught: Taught, at: int) -> Tensor:
        """Return the mean squared `Schedule.prediction_error` from the teacher at a step [B]."""
        step, x, said = taught.steps[at]
        return self.schedule.prediction_error(taught.student(x, step), said, step).square().flatten(1).mean(1)

    @torch.no_grad()
    def missed(self, paths: Sequence[Taught]) -> float:
        """The mean difference over all steps of these paths."""
        found = [self.difference(taught, at).mean() for taught in paths for at in range(len(taught.steps))]
        return float(torch.stack(found).mean())


def fill(model: Model, deltas: LoRADeltas) -> None:
    """Puts a LoRA of the same layers and rank into the one that is trained, whose scale is 1."""
    parameters = lora_parameters(model)
    with torch.no_grad():
        for name, delta in deltas.of_part(model.lora_prefix).items():
            for half, tensor in (("A", delta.down), ("B", delta.up)):
                parameters[f"{name}.lora_{half}.{ADAPTER}.weight"].copy_(tensor)


def learn(
    lesson: Lesson,
    weighed: Sequence[tuple[str, float]],
    paths: int,
    calls: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Lowers the difference at `calls` random steps of each of `paths`, on prompts that each have a weight."""
    parameters = list(lora_parameters(lesson.model).values())
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    updates = paths * min(calls, len(lesson.schedule))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    order = PromptOrder(len(weighed), generator)
    progress = tqdm(range(paths), desc="distilling", unit="path")
    for _ in progress:
        drawn = [weighed[i] for i in order.draw(batch_size)]
        weights = torch.tensor([weight for _, weight in drawn], device=lesson.model.device)
        taught = lesson.path([prompt for prompt, _ in drawn], generator)
        for at in torch.randperm(len(taught.steps), generator=generator)[:calls].tolist():
            loss = (weights * lesson.difference(taught, at)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
        progress.set_postfix(difference=f"{float(loss.detach()):.2g}")
