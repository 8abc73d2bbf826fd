"""Qwen-Image, also 2512."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draftune.models.common import apply_cfg
from draftune.models.flow import Flow, pack, unpack, unused_context_layers
from draftune.models.needs import Need, equal, moments_needs, of_class, reader_needs
from draftune.models.pixart import Condition
from draftune.sampling.checkpointing import checkpointed

TEXT_TOKENS = 512  # the default of diffusers' pipeline call
NO_NEGATIVE_PROMPT = " "  # of the model card, where guidance is used without a negative prompt
WHY_CHANNELS = "the transformer's channels for the autoencoder's z_dim"


class VideoDecoded(Flow):
    """What Qwen-Image and Krea 2 share: packed latents, and an autoencoder for videos."""

    def needs(self) -> Iterator[Need]:
        vae = self.pipeline.vae
        yield of_class("vae", vae, ("AutoencoderKLQwenImage",))
        yield equal("vae.input_channels", vae.config.input_channels, 3, "rewards take color images")
        channels = vae.config.z_dim
        yield from moments_needs(vae, channels, optional=False)
        yield of_class("transformer", self.denoiser, (self.network,))
        yield equal("transformer.in_channels", self.denoiser.config.in_channels, 4 * channels, WHY_CHANNELS)

    @property
    def channels(self) -> int:
        packed: int = self.denoiser.config.in_channels
        return packed // 4

    def _decode(self, latents: Tensor) -> Tensor:
        vae, recomputed = self.pipeline.vae, torch.is_grad_enabled() and self.checkpointing != "none"
        mean, std = (
            latents.new_tensor(moment)[:, None, None] for moment in (vae.config.latents_mean, vae.config.latents_std)
        )
        frame = (latents * std + mean).unsqueeze(2).to(vae.dtype)
        # `vae.decode` decodes a first frame in the same way, then clamps its pixels, which would remove their gradient.
        # diffusers has no gradient checkpointing for this autoencoder.
        blocks = [block for level in vae.decoder.up_blocks for block in (*level.resnets, *(level.upsamplers or ()))]
        with checkpointed(blocks if recomputed else []):
            frames: Tensor = vae.decoder(vae.post_quant_conv(frame))
        return frames.squeeze(2) / 2 + 0.5


class QwenImage(VideoDecoded):
    """A QwenImagePipeline: transformer, Qwen2.5-VL as text encoder, autoencoder for videos.

    The text embeddings are the language model's last hidden states for a prompt in the pipeline's template. Those of
    the template before the prompt are dropped.

    The guided output of each token is rescaled to the norm of its conditional output.
    """

    encoders = ("text_encoder",)
    network = "QwenImageTransformer2DModel"

    def needs(self) -> Iterator[Need]:
        yield from super().needs()
        config, encoder = self.denoiser.config, self.pipeline.text_encoder
        yield equal("transformer.patch_size", config.patch_size, 2)
        yield equal("transformer.out_channels", config.out_channels, self.channels, WHY_CHANNELS)
        why = "diffusers has no such input"
        yield equal("transformer.guidance_embeds", config.guidance_embeds, False, why)
        yield equal("transformer.use_additional_t_cond", config.get("use_additional_t_cond", False), False, why)
        axes, head = sum(config.axes_dims_rope), config.attention_head_dim
        yield equal("transformer.axes_dims_rope", axes, head, "its sum must equal attention_head_dim")
        yield from reader_needs("text_encoder", self.pipeline.tokenizer, encoder)
        width = encoder.config.get_text_config().hidden_size
        yield equal("transformer.joint_attention_dim", config.joint_attention_dim, width, "the width of text_encoder")

    def unused_layers(self) -> frozenset[str]:
        return unused_context_layers(self.denoiser.transformer_blocks, "transformer_blocks")

    def in_template(self, prompt: str) -> str:
        """Return a prompt in the pipeline's template."""
        text: str = self.pipeline.prompt_template_encode.format(prompt)
        return text

    @property
    def dropped_tokens(self) -> int:
        """The number of the template's tokens before the prompt, whose embeddings are dropped."""
        count: int = self.pipeline.prompt_template_encode_start_idx
        return count

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        return [("tokenizer", self.dropped_tokens + TEXT_TOKENS, [self.in_template(prompt) for prompt in prompts])]

    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Condition:
        negative = [negative_prompt or NO_NEGATIVE_PROMPT] * len(prompts) if guided else []
        # As the pipeline's `encode_prompt`, but without a choice of rows by values, which has no shape before it runs.
        tokens = self.pipeline.tokenizer(
            [self.in_template(prompt) for prompt in negative + prompts],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.dropped_tokens + TEXT_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        # The logits are not used.
        options = {"output_hidden_states": True, "logits_to_keep": 1}
        output = self.pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask, **options)
        text, mask = (rows[:, self.dropped_tokens :] for rows in (output.hidden_states[-1], tokens.attention_mask))
        return Condition(text.to(self.denoiser.dtype), mask.bool())

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        rows, columns = (side // 2 for side in x.shape[2:])

        def network(tokens: Tensor) -> Tensor:
            output: Tensor = self.denoiser(
                tokens,
                encoder_hidden_states=condition.text,
                encoder_hidden_states_mask=condition.mask,
                # The timestep has the network's precision, as in the official pipeline.
                timestep=torch.full((len(tokens),), timestep, device=x.device, dtype=self.denoiser.dtype) / 1000,
                img_shapes=[[(1, rows, columns)]] * len(tokens),
            ).sample
            return output

        return unpack(apply_cfg(network, pack(x), len(condition.text), guidance_scale, norm_axis=-1), rows, columns)
