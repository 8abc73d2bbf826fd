"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.base import Model
from draftune.models.needs import Need, autoencoder_needs, equal, pair, reader_needs, size_need, unet_needs
from draftune.utils.quiet import quiet

OTHER_PIPELINES = (
    "the autoencoder's latent_channels; UNets for inpainting (9) and InstructPix2Pix (8) belong to other pipelines"
)


def width_needs(unet: Any, width: int | None) -> Iterator[Need]:
    """Yield the need that the UNet's cross-attention reads what the text encoders give."""
    found = unet.config.cross_attention_dim
    for dim in dict.fromkeys(found if isinstance(found, (list, tuple)) else (found,)):
        yield equal("unet.cross_attention_dim", dim, width, "the width of the text encoder's output")


class StableDiffusion(Model):
    """A StableDiffusionPipeline: UNet, CLIP text encoder, autoencoder; epsilon or v prediction."""

    lora_prefix = "unet"

    required = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        yield from self.network_needs(addition_embed_type=None)
        encoder = self.pipeline.text_encoder
        kind = type(encoder).__name__
        yield Need("text_encoder", kind, "WithProjection" not in kind, "a text encoder without projection")
        yield from width_needs(self.pipeline.unet, getattr(encoder.config, "hidden_size", None))
        yield from reader_needs("text_encoder", self.pipeline.tokenizer, encoder)

    def network_needs(self, addition_embed_type: str | None) -> Iterator[Need]:
        """Yield what both families of UNets need of the UNet and of the autoencoder."""
        unet, vae = self.pipeline.unet, self.pipeline.vae
        yield from autoencoder_needs(vae)
        yield from unet_needs(unet)
        channels = vae.config.latent_channels
        yield equal("unet.in_channels", unet.config.in_channels, channels, OTHER_PIPELINES)
        yield equal("unet.out_channels", unet.config.out_channels, channels, "the autoencoder's latent_channels")
        yield size_need("unet.sample_size", unet.config.sample_size)
        guided = "a UNet that takes the guidance scale as an input is not supported"
        yield equal("unet.time_cond_proj_dim", unet.config.time_cond_proj_dim, None, guided)
        yield equal("unet.addition_embed_type", unet.config.addition_embed_type, addition_embed_type)
        yield equal("unet.encoder_hid_dim_type", unet.config.encoder_hid_dim_type, None)
        yield equal("unet.dual_cross_attention", unet.config.dual_cross_attention, False)

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
    def own_size(self) -> tuple[int, int]:
        """Height and width of a latent that the UNet was trained for."""
        size = pair(self.pipeline.unet.config.sample_size)
        assert size is not None  # one of the needs
        return size

    @property
    def latent_size(self) -> tuple[int, int]:
        return getattr(self, "_latent_size", self.own_size)

    def set_size(self, height: int | None, width: int | None) -> None:
        scale = self.pipeline.vae_scale_factor
        # The UNet halves the latent at every level but the last and must come back to the same size.
        multiple = scale * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < multiple or value % multiple):
                raise DraftuneError(f"{name} must be a multiple of {multiple} for this model, not {value}")
        rows, columns = self.own_size
        self._latent_size = (height // scale if height else rows, width // scale if width else columns)

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
