"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.base import Model
from draftune.models.flow import keep_wide
from draftune.models.needs import Need, equal, multiple, patch_needs, reader_needs
from draftune.utils.quiet import quiet


class Condition(NamedTuple):
    """Of the prompts, where guided after those of the negative prompt: T5's [B, tokens, width], and its mask."""

    text: Tensor
    mask: Tensor


class PixArt(Model):
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
    def denoiser(self) -> Any:
        return self.pipeline.transformer

    @property
    def parts(self) -> Sequence[nn.Module]:
        return self.pipeline.transformer, self.pipeline.text_encoder, self.pipeline.vae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        return config.in_channels, *getattr(self, "_latent_size", (config.sample_size, config.sample_size))

    def set_size(self, height: int | None, width: int | None) -> None:
        scale, config = self.pipeline.vae_scale_factor, self.pipeline.transformer.config
        multiple, own = scale * config.patch_size, config.sample_size
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < multiple or value % multiple):
                raise DraftuneError(f"{name} must be a multiple of {multiple} for this model, not {value}")
        self._latent_size = ((height or own * scale) // scale, (width or own * scale) // scale)

    def to(self, device: torch.device | str, precision: str = "no") -> Model:
        super().to(device, precision)
        if precision == "fp16":
            keep_wide(self.pipeline.text_encoder)
        return self

    @property
    def max_tokens(self) -> int:
        """How many tokens of a prompt T5 is given: 120 in PixArt-alpha, 300 in PixArt-Sigma, as diffusers has it."""
        limit: int = inspect.signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return limit

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        with quiet():
            texts = self.pipeline._text_preprocessing(list(prompts), clean_caption=True)
        return [("tokenizer", self.max_tokens, texts)]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Condition:
        # Without autocast, which would take every layer of T5 to half precision. A prompt that is cut to what the
        # encoder reads is announced at every call.
        with quiet(), torch.autocast(self.device.type, enabled=False):
            text, mask, negative_text, negative_mask = self.pipeline.encode_prompt(
                list(prompts), guided, negative_prompt, device=self.device, clean_caption=True
            )
        if guided:
            text, mask = torch.cat([negative_text, text]), torch.cat([negative_mask, mask])
        return Condition(text.to(self.denoiser.dtype), mask)

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        text, mask = condition
        guided = len(text) > len(x)
        output = self.pipeline.transformer(
            torch.cat([x, x]) if guided else x,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=torch.tensor(timestep, device=x.device).expand(len(text)),
            added_cond_kwargs=self.size_said(len(text), text),
        ).sample
        # What is left out is the learned variance, which DDIM has no use for.
        output = output[:, : x.shape[1]]
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return negative + guidance_scale * (positive - negative)

    def size_said(self, count: int, like: Tensor) -> dict[str, Tensor | None]:
        """What the transformer of PixArt-alpha at 1024 pixels is told of the picture's size, the others nothing."""
        if not self.pipeline.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        size, aspect = like.new_tensor([height, width]), like.new_tensor([height / width])
        return {"resolution": size.repeat(count, 1), "aspect_ratio": aspect.repeat(count, 1)}

    def decode_raw(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample / 2 + 0.5
