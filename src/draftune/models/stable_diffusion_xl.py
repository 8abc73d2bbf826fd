"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from draftune.models.common import Condition, decode_vae
from draftune.models.needs import Need, check_parts, equal, moments_needs, of_class, reader_needs
from draftune.models.stable_diffusion import StableDiffusion, width_needs
from draftune.utils.quiet import silence_libraries


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline: UNet, two CLIP text encoders, autoencoder.

    The text embeddings are the penultimate layers of both text encoders, concatenated. The pooled embedding is that of
    the second one. The size condition is that of an uncropped original of the image's size, as by default in diffusers.
    An empty negative prompt is passed to diffusers as None: its embedding is zero if the pipeline has
    `force_zeros_for_empty_prompt`.
    """

    required = ("unet", "text_encoder_2", "tokenizer_2", "vae", "scheduler")
    optional = ("text_encoder",)

    def needs(self) -> Iterator[Need]:
        pipeline, config = self.pipeline, self.pipeline.unet.config
        yield from self.network_needs(addition_embed_type="text_time")
        yield from moments_needs(pipeline.vae, pipeline.vae.config.latent_channels)
        pooled = pipeline.text_encoder_2
        yield of_class("text_encoder_2", pooled, ("CLIPTextModelWithProjection",))
        readers = [("text_encoder_2", pipeline.tokenizer_2, pooled)]
        if pipeline.text_encoder is not None:
            check_parts(pipeline, self.name, ["tokenizer"])
            readers.insert(0, ("text_encoder", pipeline.tokenizer, pipeline.text_encoder))
        for reader in readers:
            yield from reader_needs(*reader)
        lengths = [tokenizer.model_max_length for _, tokenizer, _ in readers]
        yield equal("tokenizer_2's model_max_length", lengths[-1], lengths[0], "both embeddings are concatenated")
        yield from width_needs(pipeline.unet, sum(encoder.config.hidden_size for *_, encoder in readers))
        width, sizes = config.projection_class_embeddings_input_dim, 6 * config.addition_time_embed_dim
        key, why = "unet.projection_class_embeddings_input_dim", "the refiner (2560) is not supported"
        yield equal(key, width, sizes + pooled.config.projection_dim, why)

    def dtype_of(self, part: nn.Module) -> torch.dtype:
        dtype = super().dtype_of(part)
        # The published autoencoder overflows in float16 and sets `force_upcast`.
        overflows = self.pipeline.vae.config.force_upcast and part is self.pipeline.vae
        return torch.float32 if overflows and dtype == torch.float16 else dtype

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        tokenizers = {name: getattr(self.pipeline, name) for name in ("tokenizer", "tokenizer_2")}
        return [(name, each.model_max_length, prompts) for name, each in tokenizers.items() if each is not None]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Condition:
        guided = guided and not self.embedded_guidance
        with silence_libraries():  # diffusers warns about each truncated prompt at every call
            text, negative_text, pooled, negative_pooled = self.pipeline.encode_prompt(
                list(prompts),
                device=self.device,
                do_classifier_free_guidance=guided,
                negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
            )
        if guided:
            text, pooled = torch.cat([negative_text, text]), torch.cat([negative_pooled, pooled])
        return Condition(text.to(self.denoiser.dtype), pooled.to(self.denoiser.dtype))

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        text, pooled = condition
        size = [side * self.pixels_per_latent for side in self.latent_size]
        # In pixels: height and width of the original, top and left of the crop, height and width of the image.
        # Made on the device: a copy from main memory would wait for all calls before it.
        sizes = torch.stack([text.new_full((), side) for side in (*size, 0, 0, *size)]).expand(len(text), -1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.call_unet(x, timestep, text, guidance_scale, added_cond_kwargs=added)

    def _decode(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        moments = config.latents_std, config.latents_mean
        if None in moments:
            std, mean = latents.new_ones(()), latents.new_zeros(())
        else:
            std, mean = (latents.new_tensor(moment).view(1, -1, 1, 1) for moment in moments)
        return decode_vae(self.pipeline.vae, latents, std, mean)
