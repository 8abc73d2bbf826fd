"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from draftune.models.needs import Need, check_parts, equal, moments_needs, of_class, reader_needs
from draftune.models.stable_diffusion import StableDiffusion, width_needs
from draftune.utils.quiet import quiet


class Condition(NamedTuple):
    """What the UNet is told; where guided, of the negative prompts first."""

    text: Tensor
    """[B, tokens, width]: the penultimate layers of both text encoders, side by side."""
    pooled: Tensor
    """[B, width]: the second encoder's whole text."""
    sizes: Tensor
    """[B, 6] in pixels: height and width of the original, top and left of the crop, height and width of the picture."""


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline: UNet, two CLIP text encoders, autoencoder.

    As diffusers does by default, the picture is said to be an original of its size, not cropped. An empty negative
    prompt is none, which is zeros where the pipeline has `force_zeros_for_empty_prompt`.
    """

    required = ("unet", "text_encoder_2", "tokenizer_2", "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        pipeline, config = self.pipeline, self.pipeline.unet.config
        yield from self.network_needs(addition_embed_type="text_time")
        yield from moments_needs(pipeline.vae)
        pooled = pipeline.text_encoder_2
        yield of_class("text_encoder_2", pooled, ("CLIPTextModelWithProjection",))
        readers = [("text_encoder_2", pipeline.tokenizer_2, pooled)]
        if pipeline.text_encoder is not None:
            check_parts(pipeline, self.name, ["tokenizer"])
            readers.insert(0, ("text_encoder", pipeline.tokenizer, pipeline.text_encoder))
        for reader in readers:
            yield from reader_needs(*reader)
        lengths = [tokenizer.model_max_length for _, tokenizer, _ in readers]
        yield equal("tokenizer_2's model_max_length", lengths[-1], lengths[0], "both texts are read side by side")
        yield from width_needs(pipeline.unet, sum(encoder.config.hidden_size for *_, encoder in readers))
        told, sizes = config.projection_class_embeddings_input_dim, 6 * config.addition_time_embed_dim
        key, why = "unet.projection_class_embeddings_input_dim", "the refiner (2560) is not supported"
        yield equal(key, told, sizes + pooled.config.projection_dim, why)

    @property
    def parts(self) -> Sequence[nn.Module]:
        parts = self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.pipeline.vae
        return [part for part in parts if part is not None]

    def dtype_of(self, part: nn.Module) -> torch.dtype:
        dtype = super().dtype_of(part)
        # The published autoencoder overflows in float16.
        overflows = self.pipeline.vae.config.force_upcast and part is self.pipeline.vae
        return torch.float32 if overflows and dtype == torch.float16 else dtype

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        tokenizers = {name: getattr(self.pipeline, name) for name in ("tokenizer", "tokenizer_2")}
        return [(name, used.model_max_length, prompts) for name, used in tokenizers.items() if used is not None]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Condition:
        with quiet():  # a prompt that is cut to what the encoders read is announced at every call
            text, negative_text, pooled, negative_pooled = self.pipeline.encode_prompt(
                list(prompts),
                device=self.device,
                do_classifier_free_guidance=guided,
                negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
            )
        if guided:
            text, pooled = torch.cat([negative_text, text]), torch.cat([negative_pooled, pooled])
        size = [side * self.pipeline.vae_scale_factor for side in self.latent_size]
        sizes = torch.tensor([[*size, 0, 0, *size]], device=self.device).expand(len(text), -1)
        dtype = self.denoiser.dtype
        return Condition(text.to(dtype), pooled.to(dtype), sizes.to(dtype))

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        told = {"text_embeds": condition.pooled, "time_ids": condition.sizes}
        return self.guided(x, timestep, condition.text, guidance_scale, added_cond_kwargs=told)

    def decode_raw(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor
        moments = vae.config.latents_mean, vae.config.latents_std
        if None not in moments:
            mean, std = (latents.new_tensor(moment).view(1, -1, 1, 1) for moment in moments)
            latents = latents * std + mean
        with torch.autocast(self.device.type, enabled=False):  # in the weights' own precision
            pictures: Tensor = vae.decode(latents).sample / 2 + 0.5
            return pictures
