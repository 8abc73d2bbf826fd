"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from draftune.models.base import DiffusionModel
from draftune.models.common import apply_cfg
from draftune.models.flow import keep_wide
from draftune.models.needs import Need, equal, multiple, patch_needs, reader_needs
from draftune.utils.quiet import silence_libraries


class Condition(NamedTuple):
    """Text embeddings and their attention mask. With guidance, negative prompts come first.

    Attributes:
        text: `[B, tokens, width]`.
        mask: `[B, tokens]`.
    """

    text: Tensor
    mask: Tensor


class PixArt(DiffusionModel):
    """A PixArtAlphaPipeline or a PixArtSigmaPipeline: transformer, T5 text encoder, autoencoder."""

    lora_prefix = "transformer"
    required = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        yield from patch_needs(self.pipeline, ("PixArtTransformer2DModel", "Transformer2DModel"))
        config, t5 = self.pipeline.transformer.config, self.pipeline.text_encoder
        yield from reader_needs("text_encoder", self.pipeline.tokenizer, t5)
        inner = config.num_attention_heads * config.attention_head_dim
        yield equal("transformer.caption_channels", config.caption_channels, t5.config.d_model, "the width of T5")
        yield equal("transformer.cross_attention_dim", config.cross_attention_dim, inner, "the width of its blocks")
        if self.pipeline.transformer.use_additional_conditions:
            yield multiple("transformer.attention_head_dim", inner, 3, "times its heads, as three numbers are embedded")

    @property
    def size_multiple(self) -> int:
        patch: int = self.denoiser.config.patch_size
        return self.pixels_per_latent * patch

    def place(self, part: nn.Module, device: torch.device | str) -> None:
        super().place(part, device)
        if self.autocast_dtype is torch.float16 and part is self.pipeline.text_encoder:
            keep_wide(part)

    @property
    def max_tokens(self) -> int:
        """The number of T5 tokens per prompt, diffusers' default: 120 for PixArt-alpha, 300 for PixArt-Sigma."""
        limit: int = inspect.signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return limit

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        with silence_libraries():
            texts = self.pipeline._text_preprocessing(list(prompts), clean_caption=True)
        return [("tokenizer", self.max_tokens, texts)]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Condition:
        # Without autocast, which would run every layer of T5 in half precision, also those of `keep_wide`.
        # Quiet, since diffusers warns about each truncated prompt at every call.
        with silence_libraries(), torch.autocast(self.device.type, enabled=False):
            text, mask, negative_text, negative_mask = self.pipeline.encode_prompt(
                list(prompts), guided, negative_prompt, device=self.device, clean_caption=True
            )
        if guided:
            text, mask = torch.cat([negative_text, text]), torch.cat([negative_mask, mask])
        return Condition(text.to(self.denoiser.dtype), mask)

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        text, mask = condition
        t, size = torch.full((len(text),), timestep, device=x.device), self.size_condition(len(text), text)

        def network(x: Tensor) -> Tensor:
            output: Tensor = self.denoiser(
                x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t, added_cond_kwargs=size
            ).sample
            return output[:, : x.shape[1]]  # without the learned variance, which DDIM does not use

        return apply_cfg(network, x, len(text), guidance_scale)

    def size_condition(self, count: int, like: Tensor) -> dict[str, Tensor | None]:
        """Return the image size as input of the transformer, which only PixArt-alpha at 1024 pixels takes."""
        if not self.pipeline.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.pixels_per_latent for side in self.latent_size)
        size, aspect = like.new_tensor([height, width]), like.new_tensor([height / width])
        return {"resolution": size.repeat(count, 1), "aspect_ratio": aspect.repeat(count, 1)}
