"""Few-step schedulers of diffusers, and their pipelines' own images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from torch import Tensor

from helpers.pipelines import SD14_SCHEDULER

BETAS = {key: SD14_SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
TRAILING = {**BETAS, "timestep_spacing": "trailing"}
SAMPLERS: dict[str, Any] = {
    "lcm": LCMScheduler(**BETAS),
    "tcd": TCDScheduler(**BETAS),
    "turbo": EulerAncestralDiscreteScheduler(**TRAILING),
    "lightning": EulerDiscreteScheduler(**TRAILING),
}
TURBO_STEPS = (1, 2, 4, 8)
RANDOM = ("lcm", "tcd", "turbo")


def with_scheduler(pipeline: Any, sampler: str) -> Any:
    pipeline.scheduler = SAMPLERS[sampler]
    return with_bar_off(pipeline)


def with_bar_off(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str, seed: int, steps: int = 3, scale: float = 0.0, **asked: Any) -> Tensor:
    """By diffusers' pipeline, with the scheduler that it has."""
    if type(pipeline.scheduler) is TCDScheduler:
        asked["eta"] = pipeline.scheduler.config.get("eta", 0.3)
    generator = torch.Generator().manual_seed(seed)
    options = {"guidance_scale": scale, "generator": generator, "num_inference_steps": steps, "output_type": "np"}
    return torch.from_numpy(pipeline(prompt, **options, **asked).images).movedim(3, 1)
