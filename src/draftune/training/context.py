"""The objects that a training run is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draftune.methods import Method
from draftune.models import DiffusionModel
from draftune.rewards import Reward
from draftune.runs.run_dir import RunFolder
from draftune.sampling.schedule import Schedule
from draftune.settings import PROMPT, Settings
from draftune.training.continued import ContinuedRun
from draftune.training.data import sampled_first
from draftune.training.rating import asked_prompts
from draftune.utils.processes import Processes

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainContext:
    """The objects of a run, shared by `Trainer`, `TrainStep`, `Scorer` and `Validation`. All are on their devices."""

    settings: Settings
    """The resolved settings, as config.yaml stores them."""
    folder: RunFolder
    accelerator: Accelerator
    method: Method
    model: DiffusionModel
    """The base model with the LoRA that is trained."""
    pixel_clamp: str
    """The model's own pixel clamp, which is restored after training."""
    schedule: Schedule
    reward: Reward
    eval_rewards: Reward | None
    """Evaluation rewards, which are not trained on."""
    prompts: Sequence[str]
    eval_prompts: Sequence[str] | None
    continued_run: ContinuedRun | None
    """The LoRA that the run starts from, if any."""

    @property
    def processes(self) -> Processes:
        """Return the processes of this run."""
        return self.folder.processes

    @property
    def retained(self) -> Sequence[str]:
        """Return the prompts of the retention loss."""
        return self.continued_run.kept if self.continued_run is not None else ()

    @property
    def log_prompts(self) -> list[str]:
        """Return the prompts of the sample grids: some of the evaluation or training prompts, evenly spaced."""
        prompts = self.eval_prompts or self.prompts
        count = min(self.settings.num_log_prompts, len(prompts))
        return [prompts[i * len(prompts) // count] for i in range(count)]

    @property
    def all_prompts(self) -> list[str]:
        """Return the prompts that the run uses. Of many training prompts, a short run samples some only."""
        s, past = self.settings, self.continued_run
        shared = 1 if s.prefix_reuse_cosine else s.prefix_reuse_steps
        images = math.ceil(s.steps / shared) * s.gradient_accumulation_steps * s.batch_size
        return [
            *sampled_first(self.prompts, images // s.num_images_per_prompt, s.seed),
            *self.prompts[: max(2, s.reward_normalization_samples)],  # of the checks before training
            *self.log_prompts,
            *asked_prompts(self.prompts, s),
            *(self.eval_prompts or ()),
            *self.template_prompts,
            *self.retained,
            *(past.prompts if past is not None else ()),
        ]

    @property
    def template_prompts(self) -> list[str]:
        """Return the evaluation prompts in the words of `eval_prompt_template`; none without a template."""
        template = self.settings.eval_prompt_template
        return [template.replace(PROMPT, prompt) for prompt in self.eval_prompts or ()] if template else []

    def sample_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Sample one image for each prompt and seed, divided among the processes.

        Returns:
            The images [N, 3, H, W] in [0, 1], on the CPU, in every process.
        """
        s, processes = self.settings, self.processes
        own = processes.shard_padded(list(zip(prompts, seeds, strict=True)))
        images = self.model.sample_tensors(
            [prompt for prompt, _ in own],
            [seed for _, seed in own],
            self.schedule,
            s.guidance_scale,
            s.negative_prompt,
            s.batch_size // processes.count,
            progress=processes.main,
        )
        if processes.count == 1:
            return images
        # One by one, since all images may not fit on a device: they are in main memory.
        rows = [processes.gather(image[None]) for image in images]
        return torch.stack(rows, 1).flatten(0, 1)[: len(prompts)]
