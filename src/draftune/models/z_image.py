"""Z-Image: base and Turbo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draftune.models.common import apply_cfg
from draftune.models.flow import Flow, chat_text
from draftune.models.needs import Need, autoencoder_needs, chat_need, equal, multiple, of_class, reader_needs

TEXT_TOKENS = 512  # diffusers' default, which the published models are sampled with
SIZE = 1024  # of diffusers' pipeline, in pixels


class ZImage(Flow):
    """A ZImagePipeline: transformer, language model as text encoder, autoencoder.

    The text embeddings are the language model's hidden states before its last layer, for a prompt in its chat template.
    Each prompt has as many of them as tokens, so that a condition is a list.

    The guidance scale is that of `apply_cfg`. diffusers' scale s for this pipeline is smaller by 1, since its guided
    output is positive + s * (positive - negative).
    """

    encoders = ("text_encoder",)
    network = "ZImageTransformer2DModel"

    def needs(self) -> Iterator[Need]:
        transformer, vae = self.denoiser, self.pipeline.vae
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        yield from autoencoder_needs(vae, shifted=True)
        yield of_class("transformer", transformer, (self.network,))
        config, channels = transformer.config, vae.config.latent_channels
        yield equal("transformer.in_channels", config.in_channels, channels, "the autoencoder's latent_channels")
        patches = list(zip(config.all_patch_size, config.all_f_patch_size, strict=False))
        why = "all_patch_size and all_f_patch_size in pairs"
        yield Need("transformer's patches", patches, (self.patch_size, 1) in patches, "a list with (2, 1)", why)
        positions = config.axes_lens
        # Text tokens are counted from 1, and the image comes after them.
        least = TEXT_TOKENS + 2
        allowed = f"at least {least} for the text and 1 for rows and columns"
        yield Need("transformer.axes_lens", positions, positions[0] >= least and min(positions) > 0, allowed)
        yield from reader_needs("text_encoder", tokenizer, encoder, TEXT_TOKENS)
        yield chat_need(tokenizer)
        yield multiple("text_encoder.num_hidden_layers", encoder.config.num_hidden_layers, 1)
        width = encoder.config.hidden_size
        yield equal("transformer.cap_feat_dim", config.cap_feat_dim, width, "the width of text_encoder")

    @property
    def own_size(self) -> tuple[int, int]:
        side = SIZE // self.pixels_per_latent
        return side, side

    @property
    def largest(self) -> int:  # type: ignore[override]
        side: int = min(self.denoiser.config.axes_lens[1:])  # in tokens
        return side * self.size_multiple

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        return [("tokenizer", TEXT_TOKENS, [self.chat(prompt) for prompt in prompts])]

    def chat(self, prompt: str) -> str:
        """Return a prompt in the tokenizer's chat template, as diffusers' pipeline fills it."""
        return chat_text(self.pipeline.tokenizer, prompt, thinking=True)

    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> list[Tensor]:
        positive, negative = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=guided,
            negative_prompt=[negative_prompt] * len(prompts),
            max_sequence_length=TEXT_TOKENS,
        )
        return [text.to(self.denoiser.dtype) for text in [*negative, *positive]]

    def predict(self, x: Tensor, timestep: float, condition: list[Tensor], guidance_scale: float) -> Tensor:
        def network(x: Tensor) -> Tensor:
            # The network's time goes from 0 for noise to 1 for images, so that its output is minus the velocity.
            time = (1000 - torch.full((len(x),), timestep, device=x.device)) / 1000
            latents = list(x.to(self.denoiser.dtype).unsqueeze(2).unbind())
            outputs = self.denoiser(latents, time, condition, return_dict=False)[0]
            return -torch.stack(outputs).squeeze(2).to(x.dtype)

        return apply_cfg(network, x, len(condition), guidance_scale)
