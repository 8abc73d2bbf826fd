"""Krea 2: Raw and Turbo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftune.models.common import apply_cfg
from draftune.models.flow import pack, unpack
from draftune.models.needs import Need, equal, reader_needs
from draftune.models.pixart import Condition
from draftune.models.qwen_image import VideoDecoded

TEXT_TOKENS = 512  # the default of diffusers' pipeline call
SIZE = 1024  # of diffusers' pipeline, in pixels
DISTILLED_MU = 1.15  # of diffusers' pipeline


class Krea2(VideoDecoded):
    """A Krea2Pipeline: transformer, Qwen3-VL as text encoder, autoencoder for videos.

    The text embeddings are the hidden states of several layers of the language model, `[B, tokens, layers, width]`.

    The guidance scale is that of `apply_cfg`. diffusers' scale s for this pipeline is smaller by 1, since its guided
    output is positive + s * (positive - negative).
    """

    encoders = ("text_encoder",)
    network = "Krea2Transformer2DModel"

    def needs(self) -> Iterator[Need]:
        yield from super().needs()
        pipeline, config = self.pipeline, self.denoiser.config
        yield equal("pipeline's patch_size", pipeline.config.patch_size, 2)
        encoder = pipeline.text_encoder.config.get_text_config()
        yield from reader_needs("text_encoder", pipeline.tokenizer, pipeline.text_encoder)
        width = encoder.hidden_size
        yield equal("transformer.text_hidden_dim", config.text_hidden_dim, width, "the width of text_encoder")
        layers = pipeline.text_encoder_select_layers
        why = "the number of text_encoder_select_layers"
        yield equal("transformer.num_text_layers", config.num_text_layers, len(layers), why)
        most = encoder.num_hidden_layers
        ok = all(0 <= layer <= most for layer in layers)
        yield Need("text_encoder_select_layers", layers, ok, f"numbers from 0 to {most}, the layers of text_encoder")

    @property
    def own_size(self) -> tuple[int, int]:
        side = SIZE // self.pixels_per_latent
        return side, side

    def mu(self, num_inference_steps: int) -> float | None:
        mu = super().mu(num_inference_steps)
        return DISTILLED_MU if mu is not None and self.pipeline.config.is_distilled else mu

    def place(self, part: nn.Module, device: torch.device | str) -> None:
        norms: list[Any] = [layer for layer in part.modules() if type(layer).__name__ == "Krea2RMSNorm"]
        weights = [norm.weight.detach() for norm in norms]
        super().place(part, device)
        # As in diffusers, the scales of the norms, which are 1 plus these weights, are not rounded.
        for norm, weight in zip(norms, weights, strict=True):
            norm.weight = nn.Parameter(weight.to(device, self.dtype), norm.weight.requires_grad)

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        pipeline = self.pipeline
        limit = TEXT_TOKENS + pipeline.prompt_template_encode_start_idx
        limit -= pipeline.prompt_template_encode_num_suffix_tokens
        return [("tokenizer", limit, [pipeline.prompt_template_encode_prefix + prompt for prompt in prompts])]

    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Condition:
        texts = [negative_prompt] * len(prompts) + prompts if guided else prompts
        text, mask = self.pipeline.encode_prompt(texts, self.device, max_sequence_length=TEXT_TOKENS)
        # The transformer does not know the order of text tokens, so that padding can be dropped from between them.
        used = [i for i, is_used in enumerate(mask.any(0).tolist()) if is_used]
        return Condition(text[:, used].to(self.denoiser.dtype), mask[:, used])

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        text, mask = condition
        rows, columns = (side // 2 for side in x.shape[2:])
        positions = self.pipeline.prepare_position_ids(text.shape[1], rows, columns, x.device)

        def network(tokens: Tensor) -> Tensor:
            # The timestep has the network's precision, as in the official pipeline.
            time = torch.full((len(tokens),), timestep, device=x.device) / 1000
            output: Tensor = self.denoiser(tokens.to(text.dtype), text, time.to(text.dtype), positions, mask).sample
            return output.to(tokens.dtype)

        return unpack(apply_cfg(network, pack(x), len(text), guidance_scale), rows, columns)
