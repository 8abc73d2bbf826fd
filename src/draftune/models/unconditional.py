"""Unconditional models of pixels: DDPM and DDIM pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.base import Model
from draftune.models.needs import Need, equal, multiple, one_of, pair, size_need, unet_needs


class Pixels(Model):
    """A DDPMPipeline or a DDIMPipeline: a UNet alone, which draws pictures without being told what to draw.

    Prompts and guidance change nothing but what a reward makes of them. Both are drawn by DDIM, clipped where the
    scheduler's config says so.
    """

    lora_prefix = "unet"
    in_pixels = True
    required = ("unet", "scheduler")

    def needs(self) -> Iterator[Need]:
        config = self.pipeline.unet.config
        yield from unet_needs(self.pipeline.unet, "UNet2DModel")
        yield one_of("unet.in_channels", config.in_channels, (1, 3), "of images in grey or in colour")
        yield equal("unet.out_channels", config.out_channels, config.in_channels, "its in_channels")
        yield size_need("unet.sample_size", config.sample_size)
        for side in self.own_size:
            yield multiple("unet.sample_size", side, self.multiple, "halved at every level but the last")

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
        size = pair(self.pipeline.unet.config.sample_size)
        assert size is not None  # one of the needs
        return size

    @property
    def multiple(self) -> int:
        """Of what each side must be a multiple: the UNet halves it and must come back to the same size."""
        levels: int = len(self.pipeline.unet.config.block_out_channels)
        return 2 ** (levels - 1)

    def set_size(self, height: int | None, width: int | None) -> None:
        multiple = self.multiple
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < multiple or value % multiple):
                raise DraftuneError(f"{name} must be a multiple of {multiple} for this model, not {value}")
        self._size = (height or self.own_size[0], width or self.own_size[1])

    def without_effect(self, guidance_scale: float) -> str:
        return f"{self.name!r} draws without being told what"

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> None:
        """Nothing: the network takes no condition."""

    def predict(self, x: Tensor, timestep: float, condition: None, guidance_scale: float) -> Tensor:
        output: Tensor = self.pipeline.unet(x, torch.tensor(timestep, device=x.device)).sample
        return output

    def decode_raw(self, latents: Tensor) -> Tensor:
        # Grey pictures are made coloured, which rewards want.
        return (latents / 2 + 0.5).expand(-1, 3, -1, -1)
