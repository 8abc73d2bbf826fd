"""Unconditional pixel-space models: DDPM and DDIM pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draftune.models.needs import Need, equal, multiple, one_of, size_need, unet_needs
from draftune.models.stable_diffusion import UNetFamily


class Pixels(UNetFamily):
    """A DDPMPipeline or a DDIMPipeline: a UNet without text input.

    Prompts and guidance have no effect on the images; a reward may still use the prompts. Both pipelines are sampled
    with DDIM, and x_0 is clipped as in the scheduler's config.
    """

    pixel_space = True
    few_step_samplers = False  # DDIMPipeline replaces them itself
    pixels_per_latent = 1
    required = ("unet", "scheduler")

    def needs(self) -> Iterator[Need]:
        config = self.pipeline.unet.config
        yield from unet_needs(self.pipeline.unet, "UNet2DModel")
        yield one_of("unet.in_channels", config.in_channels, (1, 3), "for images in gray or in color")
        yield equal("unet.out_channels", config.out_channels, config.in_channels, "its in_channels")
        yield size_need("unet.sample_size", config.sample_size)
        for side in self.own_size:
            yield multiple("unet.sample_size", side, self.size_multiple, "halved at every level but the last")

    def without_effect(self, guidance_scale: float) -> str:
        return f"{self.name!r} is unconditional"

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> None:
        """Return None: the network takes no condition."""

    def predict(self, x: Tensor, timestep: float, condition: None, guidance_scale: float) -> Tensor:
        output: Tensor = self.denoiser(x, torch.full((), timestep, device=x.device)).sample
        return output

    def _decode(self, latents: Tensor) -> Tensor:
        # Rewards take three channels: gray images are repeated.
        return (latents / 2 + 0.5).expand(-1, 3, -1, -1)
