"""SANA-Sprint: SANA distilled into a consistency model of one to four steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.models.needs import check_needs, equal, number
from draftune.models.pixart import Condition
from draftune.models.sana import Sana
from draftune.sampling.schedule import Schedule, Step, check_steps
from draftune.utils.quiet import silence_libraries

SCM = "SCMScheduler"


class SanaSprint(Sana):
    """A SanaSprintPipeline: the networks of SANA, with the guidance scale as an input of the transformer.

    Chen et al., 2025, arXiv:2503.09641. Time is an angle t from pi / 2 to 0:

        x_t = cos(t) * x_0 + sin(t) * noise,   v_t = cos(t) * noise - sin(t) * x_0

    Each step predicts x_0 and adds fresh noise to it (`SCMScheduler` of diffusers), the last step none. Latents are
    those of diffusers' pipeline divided by the scheduler's `sigma_data`.
    """

    embedded_guidance = True
    no_negative_prompt = "SANA-Sprint takes no negative prompt, since its guidance is distilled"

    def check_scheduler(self) -> None:
        scheduler = self.pipeline.scheduler
        kinds = [kind.__name__ for kind in type(scheduler).__mro__]
        if SCM not in kinds:
            raise DraftuneError(f"{self.name!r} has a {kinds[0]}, not a {SCM}: it is not supported")
        config = scheduler.config
        needs = [equal("scheduler.prediction_type", config["prediction_type"], "trigflow")]
        check_needs(self.name, [*needs, number("scheduler.sigma_data", config["sigma_data"])])

    def sampler(self) -> Any:
        return type(self.pipeline.scheduler).from_config(self.scheduler_config)

    def _schedule(self, num_inference_steps: int) -> Schedule:
        scheduler = self.sampler()
        check_steps(num_inference_steps, scheduler.config.num_train_timesteps)
        # diffusers has a second angle of its own for two steps only.
        others = {} if num_inference_steps == 2 else {"intermediate_timesteps": None}
        scheduler.set_timesteps(num_inference_steps, **others)
        angles = pairwise(scheduler.timesteps.tolist())
        steps = [Step(t, math.cos(t), math.sin(t), math.cos(s), math.sin(s), math.sin(s)) for t, s in angles]
        return Schedule(tuple(steps), "v_prediction")

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Condition:
        with silence_libraries(), torch.autocast(self.device.type, enabled=False):
            text, mask = self.pipeline.encode_prompt(
                list(prompts), device=self.device, complex_human_instruction=[self.instruction]
            )
        return Condition(text.to(self.denoiser.dtype), mask)

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        text, mask = condition
        batch, dtype = len(x), self.denoiser.dtype
        # The network is that of a flow model, x = (1 - s) * x_0 + s * noise, whose noise level s has the angle t.
        s = math.sin(timestep) / (math.cos(timestep) + math.sin(timestep))
        norm = math.hypot(s, 1 - s)
        flow = x * norm
        scale = torch.full((batch,), guidance_scale, device=x.device, dtype=dtype)
        with torch.autocast(x.device.type, enabled=False):
            output: Tensor = self.denoiser(
                flow.to(dtype),
                encoder_hidden_states=text,
                encoder_attention_mask=mask,
                guidance=scale * self.denoiser.config.guidance_embeds_scale,
                timestep=torch.full((batch,), s, device=x.device),
            ).sample
        return ((1 - 2 * s) * flow + norm**2 * output.to(x.dtype)) / norm
