"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from draftune.models.common import Condition, apply_cfg
from draftune.models.flow import Flow, unused_context_layers
from draftune.models.needs import Need, equal, multiple, of_class, reader_needs


class StableDiffusion3(Flow):
    """A StableDiffusion3Pipeline: transformer, two CLIP text encoders, optionally T5, autoencoder.

    The text embeddings of both CLIP encoders are concatenated and followed by T5's, or zeros without T5. The pooled
    embeddings of both CLIP encoders are concatenated.
    """

    encoders = ("text_encoder", "text_encoder_2")
    t5 = "text_encoder_3"
    network = "SD3Transformer2DModel"

    def needs(self) -> Iterator[Need]:
        yield from super().needs()
        config, encoders = self.denoiser.config, [getattr(self.pipeline, part) for part in self.encoders]
        # diffusers pads the prompts of both CLIP encoders to the first tokenizer's length.
        length = self.pipeline.tokenizer.model_max_length
        for part, encoder in zip(self.encoders, encoders, strict=True):
            yield of_class(part, encoder, ("CLIPTextModelWithProjection",))
            tokenizer = getattr(self.pipeline, part.replace("text_encoder", "tokenizer"))
            yield from reader_needs(part, tokenizer, encoder, length)
        pooled = sum(encoder.config.projection_dim for encoder in encoders)
        yield equal("transformer.pooled_projection_dim", config.pooled_projection_dim, pooled, "of both CLIP encoders")
        # diffusers pads CLIP's narrower embeddings with zeros. A negative padding would cut wider ones.
        width = sum(encoder.config.hidden_size for encoder in encoders)
        wide = config.joint_attention_dim
        yield Need(
            "transformer.joint_attention_dim", wide, width <= wide, f"at least {width}, the width of both CLIP encoders"
        )
        inner = config.num_attention_heads * config.attention_head_dim
        yield equal(
            "transformer.caption_projection_dim", config.caption_projection_dim, inner, "the width of its blocks"
        )
        yield multiple("transformer.sample_size", config.sample_size, config.patch_size, "its patch_size")
        most = config.pos_embed_max_size * config.patch_size
        yield Need("transformer.sample_size", config.sample_size, config.sample_size <= most, f"at most {most}")

    @property
    def patch_size(self) -> int:
        size: int = self.denoiser.config.patch_size
        return size

    def sigmas(self, num_inference_steps: int) -> None:
        return None

    @property
    def largest(self) -> int:  # type: ignore[override]
        side: int = self.denoiser.config.pos_embed_max_size  # in tokens
        return side * self.size_multiple

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
        text, pooled = condition
        t = torch.full((len(text),), timestep, device=x.device)

        def network(x: Tensor) -> Tensor:
            output: Tensor = self.denoiser(x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled).sample
            return output

        return apply_cfg(network, x, len(text), guidance_scale)
