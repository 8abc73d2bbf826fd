"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from draftune.models.flow import Flow, unused_context_layers
from draftune.models.needs import Need, equal, multiple, of_class, reader_needs


class Condition(NamedTuple):
    """What the transformer is told; where guided, of the negative prompts first."""

    text: Tensor
    """[B, tokens, width]: both CLIP encoders side by side, then T5, or zeros where the pipeline has none."""
    pooled: Tensor
    """[B, width]: the CLIP encoders' whole texts side by side."""


class StableDiffusion3(Flow):
    """A StableDiffusion3Pipeline: transformer, two CLIP text encoders, T5 where it is there, autoencoder."""

    encoders = ("text_encoder", "text_encoder_2")
    t5 = "text_encoder_3"
    network = "SD3Transformer2DModel"

    def needs(self) -> Iterator[Need]:
        yield from super().needs()
        config, encoders = self.denoiser.config, [getattr(self.pipeline, part) for part in self.encoders]
        # Both are padded to the first tokenizer's length.
        length = self.pipeline.tokenizer.model_max_length
        for part, encoder in zip(self.encoders, encoders, strict=True):
            yield of_class(part, encoder, ("CLIPTextModelWithProjection",))
            tokenizer = getattr(self.pipeline, part.replace("text_encoder", "tokenizer"))
            yield from reader_needs(part, tokenizer, encoder, length)
        pooled = sum(encoder.config.projection_dim for encoder in encoders)
        yield equal("transformer.pooled_projection_dim", config.pooled_projection_dim, pooled, "of both CLIP encoders")
        # diffusers pads the narrower text with zeros, and would cut the wider one.
        width = sum(encoder.config.hidden_size for encoder in encoders)
        wide = config.joint_attention_dim
        yield Need(
            "transformer.joint_attention_dim", wide, width <= wide, f"at least {width}, that of both CLIP encoders"
        )
        inner = config.num_attention_heads * config.attention_head_dim
        yield equal(
            "transformer.caption_projection_dim", config.caption_projection_dim, inner, "the width of its blocks"
        )
        yield multiple("transformer.sample_size", config.sample_size, config.patch_size, "its patch_size")
        most = config.pos_embed_max_size * config.patch_size
        yield Need("transformer.sample_size", config.sample_size, config.sample_size <= most, f"at most {most}")

    @property
    def channels(self) -> int:
        channels: int = self.denoiser.config.in_channels
        return channels

    @property
    def patch_size(self) -> int:
        size: int = self.denoiser.config.patch_size
        return size

    @property
    def largest(self) -> int | None:
        side: int = self.denoiser.config.pos_embed_max_size  # in tokens
        return side * self.patch_size

    @property
    def t5_tokens(self) -> int:
        return 256  # diffusers' default

    def unused_layers(self) -> frozenset[str]:
        return unused_context_layers(self.denoiser.transformer_blocks, "transformer_blocks")

    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Condition:
        text, negative_text, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt,
            max_sequence_length=self.t5_tokens,
        )
        if guided:
            text, pooled = torch.cat([negative_text, text]), torch.cat([negative_pooled, pooled])
        return Condition(text.to(self.denoiser.dtype), pooled.to(self.denoiser.dtype))

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        guided = len(condition.text) > len(x)
        output: Tensor = self.denoiser(
            torch.cat([x, x]) if guided else x,
            timestep=torch.full((len(condition.text),), timestep, device=x.device),
            encoder_hidden_states=condition.text,
            pooled_projections=condition.pooled,
        ).sample
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return negative + guidance_scale * (positive - negative)
