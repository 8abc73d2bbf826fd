"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from draftune.models.base import DiffusionModel
from draftune.models.common import apply_cfg
from draftune.models.needs import Need, autoencoder_needs, equal, reader_needs, size_need, unet_needs
from draftune.utils.quiet import silence_libraries

OTHER_PIPELINES = (
    "the autoencoder's latent_channels; UNets for inpainting (9) and InstructPix2Pix (8) belong to other pipelines"
)


def width_needs(unet: Any, width: int | None) -> Iterator[Need]:
    """Yield the need that the UNet's cross-attention dimension equals the width of the text embeddings."""
    dims = unet.config.cross_attention_dim
    for dim in dict.fromkeys(dims if isinstance(dims, (list, tuple)) else (dims,)):
        yield equal("unet.cross_attention_dim", dim, width, "the width of the text encoder's output")


class UNetFamily(DiffusionModel):
    """Base class of families whose denoiser is a UNet."""

    lora_prefix = "unet"

    @property
    def size_multiple(self) -> int:
        # Each level but the last halves the latent, and the decoding half of the UNet must return to its size.
        levels: int = len(self.denoiser.config.block_out_channels)
        return self.pixels_per_latent * 2 ** (levels - 1)


class StableDiffusion(UNetFamily):
    """A StableDiffusionPipeline: UNet, CLIP text encoder, autoencoder; epsilon, v or x_0 prediction.

    Or a LatentConsistencyModelPipeline, whose UNet takes the guidance scale as an input. Guidance then needs no second
    half of the batch.
    """

    required = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        yield from self.network_needs(addition_embed_type=None)
        encoder = self.pipeline.text_encoder
        kind = type(encoder).__name__
        yield Need("text_encoder", kind, "WithProjection" not in kind, "a text encoder without projection")
        yield from width_needs(self.pipeline.unet, getattr(encoder.config, "hidden_size", None))
        yield from reader_needs("text_encoder", self.pipeline.tokenizer, encoder)

    def network_needs(self, addition_embed_type: str | None) -> Iterator[Need]:
        """Yield the needs of UNet and autoencoder that Stable Diffusion and Stable Diffusion XL share."""
        unet, vae = self.pipeline.unet, self.pipeline.vae
        yield from autoencoder_needs(vae)
        yield from unet_needs(unet)
        channels = vae.config.latent_channels
        yield equal("unet.in_channels", unet.config.in_channels, channels, OTHER_PIPELINES)
        yield equal("unet.out_channels", unet.config.out_channels, channels, "the autoencoder's latent_channels")
        yield size_need("unet.sample_size", unet.config.sample_size)
        width, optional = unet.config.time_cond_proj_dim, "Consistency" not in type(self.pipeline).__name__
        embeds = isinstance(width, int) and width >= 4
        allowed = "at least 4, the width of an embedding" + (", or None" if optional else "")
        yield Need("unet.time_cond_proj_dim", width, embeds or (width is None and optional), allowed)
        yield equal("unet.addition_embed_type", unet.config.addition_embed_type, addition_embed_type)
        yield equal("unet.encoder_hid_dim_type", unet.config.encoder_hid_dim_type, None)
        yield equal("unet.dual_cross_attention", unet.config.dual_cross_attention, False)

    @property
    def embedded_guidance(self) -> bool:
        """Whether the guidance scale is an input of the UNet, as of latent consistency models."""
        return self.denoiser.config.time_cond_proj_dim is not None

    @property
    def no_negative_prompt(self) -> str:  # type: ignore[override]
        why = "this UNet takes the guidance scale as an input, and a negative prompt has no effect"
        return why if self.embedded_guidance else ""

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        return [("tokenizer", self.pipeline.tokenizer.model_max_length, prompts)]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Any:
        guided = guided and not self.embedded_guidance
        with silence_libraries():  # diffusers warns about each truncated prompt at every call
            positive, negative = self.pipeline.encode_prompt(
                list(prompts), self.device, 1, guided, [negative_prompt] * len(prompts)
            )
        condition = torch.cat([negative, positive]) if guided else positive
        return condition.to(self.denoiser.dtype)

    def predict(self, x: Tensor, timestep: float, condition: Any, guidance_scale: float) -> Tensor:
        return self.call_unet(x, timestep, condition, guidance_scale)

    def call_unet(self, x: Tensor, timestep: float, text: Tensor, guidance_scale: float, **inputs: Any) -> Tensor:
        """Return the UNet's output with guidance; `inputs` are more arguments of the UNet."""
        t = torch.full((), timestep, device=x.device)
        if self.embedded_guidance:
            embed, width = self.pipeline.get_guidance_scale_embedding, self.denoiser.config.time_cond_proj_dim
            inputs["timestep_cond"] = embed(torch.tensor([guidance_scale - 1]), width).to(x.device, self.denoiser.dtype)

        def network(x: Tensor) -> Tensor:
            output: Tensor = self.denoiser(x, t, encoder_hidden_states=text, **inputs).sample
            return output

        return apply_cfg(network, x, len(text), guidance_scale)
