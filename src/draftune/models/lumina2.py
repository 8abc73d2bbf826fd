"""Lumina-Image 2.0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from draftune.models.common import apply_cfg
from draftune.models.flow import Flow
from draftune.models.needs import Need, autoencoder_needs, equal, multiple, of_class, reader_needs
from draftune.models.pixart import Condition
from draftune.sampling.schedule import Schedule, Step

TEXT_TOKENS = 256  # the default of diffusers' pipeline call


class Lumina2(Flow):
    """A Lumina2Pipeline: transformer, Gemma 2 as text encoder, autoencoder.

    The text embeddings are Gemma's hidden states before its last layer. The pipeline's system prompt comes before each
    prompt.

    The guided output is rescaled to the norm of the conditional one. As in diffusers, each row of each channel has its
    own norm.
    """

    encoders = ("text_encoder",)
    network = "Lumina2Transformer2DModel"
    guided_share = 0.25
    """The share of the steps, from the first one, that use guidance: `cfg_trunc_ratio` of the model card."""

    def needs(self) -> Iterator[Need]:
        transformer, vae, encoder = self.denoiser, self.pipeline.vae, self.pipeline.text_encoder
        yield from autoencoder_needs(vae, shifted=True)
        scale, why = 2 ** (len(vae.config.block_out_channels) - 1), "as diffusers' pipeline assumes"
        yield equal("vae's pixels per latent", scale, self.pipeline.vae_scale_factor, why)
        yield of_class("transformer", transformer, (self.network,))
        config, channels = transformer.config, vae.config.latent_channels
        yield equal("transformer.in_channels", config.in_channels, channels, "the autoencoder's latent_channels")
        yield equal("transformer.out_channels", config.out_channels or channels, channels, "equal to its in_channels")
        yield equal("transformer.patch_size", config.patch_size, self.patch_size)
        yield multiple("transformer.sample_size", config.sample_size, self.patch_size, "its patch_size")
        positions = config.axes_lens
        # Text tokens are counted from 0, and the image comes after them.
        least = TEXT_TOKENS + 1
        allowed = f"at least {least} for the text and 1 for rows and columns"
        yield Need("transformer.axes_lens", positions, positions[0] >= least and min(positions) > 0, allowed)
        heads, axes = config.hidden_size // config.num_attention_heads, sum(config.axes_dim_rope)
        yield equal("transformer.axes_dim_rope", axes, heads, "its sum must equal the width of a head")
        yield from reader_needs("text_encoder", self.pipeline.tokenizer, encoder, TEXT_TOKENS)
        width = encoder.config.hidden_size
        yield equal("transformer.cap_feat_dim", config.cap_feat_dim, width, "the width of text_encoder")

    @property
    def largest(self) -> int:  # type: ignore[override]
        side: int = min(self.denoiser.config.axes_lens[1:])  # in tokens
        return side * self.size_multiple

    @property
    def shift_length(self) -> int:
        # diffusers takes the number of channels. The published scheduler does not use it.
        return self.channels

    def dtype_of(self, part: nn.Module) -> torch.dtype:
        dtype = super().dtype_of(part)
        # Gemma 2 does not work in float16 (diffusers' page on SanaPipeline).
        return torch.float32 if dtype == torch.float16 and part is self.pipeline.text_encoder else dtype

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        before = f"{self.pipeline.system_prompt} <Prompt Start> "  # the negative prompt is encoded without it
        return [("tokenizer", TEXT_TOKENS, [before + prompt for prompt in prompts])]

    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Condition:
        text, mask, negative, negative_mask = self.pipeline.encode_prompt(
            prompts, guided, negative_prompt, device=self.device, max_sequence_length=TEXT_TOKENS
        )
        if guided:
            text, mask = torch.cat([negative, text]), torch.cat([negative_mask, mask])
        return Condition(text.to(self.denoiser.dtype), mask)

    def guidance_at(self, step: Step, schedule: Schedule, guidance_scale: float) -> float:
        guided = schedule.steps[: int(self.guided_share * len(schedule.steps))]
        return guidance_scale if guided and step.timestep >= guided[-1].timestep else 1.0

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        rows = 2 * len(x) if guidance_scale > 1 else len(x)
        text, mask = (tensor[-rows:] for tensor in condition)  # the last rows are those of the prompts

        def network(x: Tensor) -> Tensor:
            # The network's time goes from 0 for noise to 1 for images, so that its output is minus the velocity.
            time = 1 - torch.full((len(x),), timestep, device=x.device) / 1000
            return -self.denoiser(x.to(text.dtype), time, text, mask).sample.to(x.dtype)

        return apply_cfg(network, x, rows, guidance_scale, norm_axis=-1)
