"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.base import Model, wants_betas
from draftune.quiet import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StableDiffusion(Model):
    """A StableDiffusionPipeline: UNet, CLIP text encoder, autoencoder; epsilon or v prediction."""

    lora_prefix = "unet"

    def __init__(self, pipeline: DiffusionPipeline, name: str) -> None:
        wants_betas(pipeline, name)
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise DraftuneError(f"the UNet of {name!r} takes the guidance scale as an input: that is not supported")
        super().__init__(pipeline, name)

    @property
    def denoiser(self) -> Any:
        return self.pipeline.unet

    @property
    def parts(self) -> Sequence[nn.Module]:
        return self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.vae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.pipeline.unet.config.in_channels, *self.latent_size

    @property
    def latent_size(self) -> tuple[int, int]:
        own = self.pipeline.unet.config.sample_size
        return getattr(self, "_latent_size", (own, own))

    def set_size(self, height: int | None, width: int | None) -> None:
        scale = self.pipeline.vae_scale_factor
        # The UNet halves the latent at every level but the last and must come back to the same size.
        multiple = scale * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        own = self.pipeline.unet.config.sample_size * scale
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < multiple or value % multiple):
                raise DraftuneError(f"{name} must be a multiple of {multiple} for this model, not {value}")
        self._latent_size = ((height or own) // scale, (width or own) // scale)

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        return [("tokenizer", self.pipeline.tokenizer.model_max_length, prompts)]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Any:
        with quiet():  # a prompt that is cut to what the encoder reads is announced at every call
            positive, negative = self.pipeline.encode_prompt(
                list(prompts), self.device, 1, guided, [negative_prompt] * len(prompts)
            )
        condition = torch.cat([negative, positive]) if guided else positive
        return condition.to(self.denoiser.dtype)

    def predict(self, x: Tensor, timestep: float, condition: Any, guidance_scale: float) -> Tensor:
        return self.guided(x, timestep, condition, guidance_scale)

    def guided(self, x: Tensor, timestep: float, text: Tensor, guidance_scale: float, **told: Any) -> Tensor:
        """The UNet's guided output; guided where `text` has the negative prompts too, before the others."""
        guided = len(text) > len(x)
        t = torch.tensor(timestep, device=x.device)
        output = self.pipeline.unet(torch.cat([x, x]) if guided else x, t, encoder_hidden_states=text, **told).sample
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return negative + guidance_scale * (positive - negative)

    def decode_raw(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample / 2 + 0.5
