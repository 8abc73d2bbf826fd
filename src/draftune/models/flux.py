"""FLUX.1: dev and schnell."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from draftune.models.common import Condition
from draftune.models.flow import Flow, pack, unpack, unused_context_layers
from draftune.models.needs import Need, equal, reader_needs


class PackedFlow(Flow):
    """What FLUX.1 and Chroma share: a transformer of double and single blocks on packed latents."""

    def needs(self) -> Iterator[Need]:
        yield from super().needs()
        config = self.denoiser.config
        yield equal("transformer.patch_size", config.patch_size, 1)
        axes, head = sum(config.axes_dims_rope), config.attention_head_dim
        yield equal("transformer.axes_dims_rope", axes, head, "its sum must equal attention_head_dim")

    def read_channels(self, latent_channels: int) -> int:
        return 4 * latent_channels  # each token packs 2 x 2 latents

    @property
    def channels(self) -> int:
        packed: int = self.denoiser.config.in_channels
        return packed // 4

    def unused_layers(self) -> frozenset[str]:
        # The single blocks use the text tokens of the last double block.
        if len(self.denoiser.single_transformer_blocks):
            return frozenset()
        return unused_context_layers(self.denoiser.transformer_blocks, "transformer_blocks")

    def velocity(self, x: Tensor, timestep: float, text: Tensor, **inputs: Tensor | None) -> Tensor:
        """Call the transformer.

        Args:
            x: Noisy latents, `[B, C, H, W]`.
            timestep: In units of training steps.
            text: Text embeddings, `[B, tokens, width]`.
            inputs: The transformer's other inputs.

        Returns:
            The velocity, `[B, C, H, W]`.
        """
        batch, device = len(x), x.device
        rows, columns = (side // 2 for side in x.shape[2:])
        # Position ids: (0, row, column) for image tokens, the origin for text tokens.
        axes = (torch.arange(side, device=device).float() for side in (1, rows, columns))
        output: Tensor = self.denoiser(
            pack(x),
            # The timestep has the network's precision, as in the official pipeline.
            timestep=torch.full((batch,), timestep, device=device, dtype=self.denoiser.dtype) / 1000,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=torch.cartesian_prod(*axes),
            **inputs,
        ).sample
        return unpack(output, rows, columns)


class Flux(PackedFlow):
    """A FluxPipeline: transformer, CLIP and T5 text encoders, autoencoder.

    Guidance is distilled: the guidance scale is an input of dev's transformer, and schnell ignores it. Each step makes
    one denoiser call, and there is no negative prompt. The text embeddings are T5's, the pooled ones CLIP's.
    """

    encoders = ("text_encoder", "text_encoder_2")
    t5 = "text_encoder_2"
    network = "FluxTransformer2DModel"
    no_negative_prompt = "FLUX.1 takes no negative prompt, since its guidance is distilled"

    def needs(self) -> Iterator[Need]:
        yield from super().needs()
        config, clip = self.denoiser.config, self.pipeline.text_encoder
        yield from reader_needs("text_encoder", self.pipeline.tokenizer, clip)
        pooled = clip.config.hidden_size
        yield equal(
            "transformer.pooled_projection_dim", config.pooled_projection_dim, pooled, "the width of text_encoder"
        )

    @property
    def t5_tokens(self) -> int:
        # The limits that the published models were trained with.
        return 512 if self.denoiser.config.guidance_embeds else 256

    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Condition:
        length = self.t5_tokens
        text, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        return Condition(text.to(self.denoiser.dtype), pooled.to(self.denoiser.dtype))

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        guidance = torch.full((len(x),), guidance_scale, device=x.device, dtype=torch.float32)
        guidance_input = guidance if self.denoiser.config.guidance_embeds else None
        text, pooled = condition
        return self.velocity(x, timestep, text, pooled_projections=pooled, guidance=guidance_input)
