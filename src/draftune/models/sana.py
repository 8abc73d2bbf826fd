"""SANA and SANA 1.5."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.base import DiffusionModel
from draftune.models.common import apply_cfg, decode_vae
from draftune.models.needs import (
    FLOW,
    Need,
    check_levels,
    check_needs,
    equal,
    multiple,
    number,
    of_class,
    one_of,
    reader_needs,
)
from draftune.models.pixart import Condition
from draftune.sampling.checkpointing import checkpointed
from draftune.sampling.schedule import Schedule, flow_steps
from draftune.utils.quiet import silence_libraries

SOLVER = "DPMSolverMultistepScheduler"
OTHER_LEVELS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
"""The options of DPM-Solver for other noise levels; they take precedence over `use_flow_sigmas`."""


class Sana(DiffusionModel):
    """A SanaPipeline: transformer with linear attention, Gemma 2 text encoder, deep-compression autoencoder.

    The transformer predicts the velocity. The published scheduler is DPM-Solver++ (Lu et al., 2022, arXiv:2211.01095)
    of second order on flow-matching noise levels. Here its first order is used, which on these levels is the Euler step
    of the velocity: x_s = (sigma_s / sigma_t) * x_t + (alpha_s - alpha_t * sigma_s / sigma_t) * x_0.

    No network runs under autocast: the linear attention computes in float32, since its sums over all image tokens
    overflow in float16, and autocast would undo that.
    """

    lora_prefix = "transformer"
    embedded_guidance = False
    """Whether the guidance scale is an input of the transformer."""
    required = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        vae, gemma, config = self.pipeline.vae, self.pipeline.text_encoder, self.denoiser.config
        yield of_class("vae", vae, ("AutoencoderDC",))
        yield equal("vae.in_channels", vae.config.in_channels, 3, "rewards take color images")
        yield number("vae.scaling_factor", vae.config.scaling_factor)
        yield of_class("transformer", self.denoiser, ("SanaTransformer2DModel",))
        guided = config.get("guidance_embeds", False)
        yield equal("transformer.guidance_embeds", guided, self.embedded_guidance, "SANA-Sprint has it, SANA has not")
        channels, why = vae.config.latent_channels, "the autoencoder's latent_channels"
        yield equal("transformer.in_channels", config.in_channels, channels, why)
        outputs = (channels, 2 * channels, None)
        yield one_of("transformer.out_channels", config.out_channels, outputs, f"{why}, or twice as many")
        inner = config.num_attention_heads * config.attention_head_dim
        yield equal("transformer.cross_attention_dim", config.cross_attention_dim, inner, "the width of its blocks")
        width = gemma.config.hidden_size
        yield equal("transformer.caption_channels", config.caption_channels, width, "the width of text_encoder")
        yield multiple("transformer.sample_size", config.sample_size, config.patch_size, "its patch_size")
        yield from reader_needs("text_encoder", self.pipeline.tokenizer, gemma, self.max_tokens)

    def check_scheduler(self) -> None:
        scheduler = self.pipeline.scheduler
        kinds, config = [kind.__name__ for kind in type(scheduler).__mro__], scheduler.config
        if FLOW in kinds:
            why = "SANA's pipeline gives no resolution-dependent shift"
            needs = [equal("scheduler.use_dynamic_shifting", config["use_dynamic_shifting"], False, why)]
        elif SOLVER in kinds:
            wanted = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
            wanted |= dict.fromkeys(("thresholding", *OTHER_LEVELS), False)
            needs = [equal(f"scheduler.{key}", config.get(key, False), value) for key, value in wanted.items()]
        else:
            raise DraftuneError(f"{self.name!r} has a {kinds[0]}, not a {SOLVER} or {FLOW}: it is not supported")
        check_needs(self.name, needs)

    def check_schedule(self) -> None:
        check_levels(self._schedule(min(10, int(self.scheduler_config["num_train_timesteps"]))), self.name)

    @property
    def size_multiple(self) -> int:
        patch: int = self.denoiser.config.patch_size
        return self.pixels_per_latent * patch

    def dtype_of(self, part: nn.Module) -> torch.dtype:
        dtype = super().dtype_of(part)
        # Gemma 2 and the autoencoder do not work in float16 (diffusers' page on SanaPipeline).
        return torch.float32 if dtype == torch.float16 and part is not self.denoiser else dtype

    def set_sampler_options(self, timestep_spacing: str | None = None, set_alpha_to_one: bool | None = None) -> None:
        """Do nothing: these settings of DDIM do not apply to flow models."""

    @property
    def sampler_options(self) -> dict[str, Any]:
        return {}

    def sampler(self) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        kind = type(self.pipeline.scheduler)
        solver, euler = {"solver_order": 1, "algorithm_type": "dpmsolver++"}, {"stochastic_sampling": False}
        changes = solver if issubclass(kind, DPMSolverMultistepScheduler) else euler
        return kind.from_config({**self.scheduler_config, **changes})

    def _schedule(self, num_inference_steps: int) -> Schedule:
        return flow_steps(self.sampler(), num_inference_steps)

    @property
    def instruction(self) -> str:
        """The text before each prompt, the default `complex_human_instruction` of diffusers' pipeline."""
        lines: list[str] = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        return "\n".join(lines)

    @property
    def max_tokens(self) -> int:
        """The number of Gemma's tokens: those of the instruction, and of the prompt as in diffusers (300)."""
        limit: int = inspect.signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        # Both counts have a start token, and diffusers takes off one more.
        return len(self.pipeline.tokenizer.encode(self.instruction)) + limit - 2

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        texts = self.pipeline._text_preprocessing(list(prompts))
        return [("tokenizer", self.max_tokens, [self.instruction + text for text in texts])]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Condition:
        with silence_libraries(), torch.autocast(self.device.type, enabled=False):
            text, mask, negative_text, negative_mask = self.pipeline.encode_prompt(
                list(prompts),
                guided,
                negative_prompt,
                device=self.device,
                complex_human_instruction=[self.instruction],
            )
        if guided:
            text, mask = torch.cat([negative_text, text]), torch.cat([negative_mask, mask])
        return Condition(text.to(self.denoiser.dtype), mask)

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        text, mask = condition
        t = torch.full((len(text),), timestep, device=x.device) * self.denoiser.config.timestep_scale

        def network(x: Tensor) -> Tensor:
            output: Tensor = self.denoiser(
                x.to(text.dtype), encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t
            ).sample
            return output[:, : x.shape[1]].to(x.dtype)  # without the learned variance, which no flow sampler uses

        with torch.autocast(x.device.type, enabled=False):
            return apply_cfg(network, x, len(text), guidance_scale)

    def _decode(self, latents: Tensor) -> Tensor:
        vae, recomputed = self.pipeline.vae, torch.is_grad_enabled() and self.checkpointing != "none"
        # diffusers has no gradient checkpointing for this autoencoder.
        blocks = [block for level in vae.decoder.up_blocks for block in level] if recomputed else []
        with checkpointed(blocks):
            return decode_vae(vae, latents)
