"""Unconditional models of pixels: DDPM and DDIM pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.base import Model, wants_betas

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Pixels(Model):
    """A DDPMPipeline or a DDIMPipeline: a UNet alone, which draws pictures without being told what to draw.

    Prompts and guidance change nothing but what a reward makes of them. Both are drawn by DDIM, clipped where the
    scheduler's config says so.
    """

    lora_prefix = "unet"
    in_pixels = True

    def __init__(self, pipeline: DiffusionPipeline, name: str) -> None:
        config = pipeline.unet.config
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            raise DraftuneError(f"{name!r} draws classes, which its {type(pipeline).__name__} can't name")
        channels = config.in_channels, config.out_channels
        if channels not in ((1, 1), (3, 3)):
            said = f"reads {channels[0]} channels and gives {channels[1]}"
            raise DraftuneError(f"{name!r} {said}: grey pictures have 1 of both, coloured ones 3")
        if config.sample_size is None:
            raise DraftuneError(f"{name!r} does not say how large its pictures are: its UNet lacks sample_size")
        wants_betas(pipeline, name)
        super().__init__(pipeline, name)

    @property
    def denoiser(self) -> Any:
        return self.pipeline.unet

    @property
    def parts(self) -> Sequence[nn.Module]:
        return (self.pipeline.unet,)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.pipeline.unet.config.in_channels, *getattr(self, "_size", self.own_size)

    @property
    def own_size(self) -> tuple[int, int]:
        size = self.pipeline.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def set_size(self, height: int | None, width: int | None) -> None:
        # The UNet halves the picture at every level but the last and must come back to the same size.
        multiple = 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < multiple or value % multiple):
                raise DraftuneError(f"{name} must be a multiple of {multiple} for this model, not {value}")
        self._size = (height or self.own_size[0], width or self.own_size[1])

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> None:
        """Nothing: the network takes no condition."""

    def predict(self, x: Tensor, timestep: float, condition: None, guidance_scale: float) -> Tensor:
        output: Tensor = self.pipeline.unet(x, torch.tensor(timestep, device=x.device)).sample
        return output

    def decode_raw(self, latents: Tensor) -> Tensor:
        # Grey pictures are made coloured, which rewards want.
        return (latents / 2 + 0.5).expand(-1, 3, -1, -1)
