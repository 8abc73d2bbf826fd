"""Chroma."""

from __future__ import annotations

import torch
from torch import Tensor

from draftune.models.common import apply_cfg
from draftune.models.flux import PackedFlow
from draftune.models.pixart import Condition
from draftune.sampling.checkpointing import BLOCKS, checkpoint_blocks, checkpointed


class Chroma(PackedFlow):
    """A ChromaPipeline: transformer, T5 text encoder, autoencoder.

    The networks are those of FLUX.1 schnell without CLIP. Guidance is not distilled, so that each guided step makes two
    denoiser calls.

    The transformer gets the attention mask of diffusers' pipeline. It contains the first padding token of each prompt.
    """

    encoders = ("text_encoder",)
    t5 = "text_encoder"
    network = "ChromaTransformer2DModel"

    @property
    def t5_tokens(self) -> int:
        return 512  # the default of diffusers' pipeline call

    def set_checkpointing(self, mode: str) -> None:
        super().set_checkpointing(mode)
        # `predict` recomputes the blocks: diffusers leaves the mask out of the single blocks that it recomputes.
        checkpoint_blocks(self.denoiser, False)

    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Condition:
        text, _, mask, negative, _, negative_mask = self.pipeline.encode_prompt(
            prompts,
            [negative_prompt] * len(prompts),
            self.device,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.t5_tokens,
        )
        if guided:
            text, mask = torch.cat([negative, text]), torch.cat([negative_mask, mask])
        dtype = self.denoiser.dtype
        # The attention adds a mask of numbers to its scores, in its own precision.
        return Condition(text.to(dtype), mask.to(dtype) if mask.is_floating_point() else mask)

    def predict(self, x: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        text, mask = condition
        tokens = x[0, 0].numel() // 4
        mask = torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)
        blocks = [*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks]
        recomputed = torch.is_grad_enabled() and self.checkpointing in BLOCKS
        with checkpointed(blocks if recomputed else []):
            return apply_cfg(
                lambda x: self.velocity(x, timestep, text, attention_mask=mask), x, len(text), guidance_scale
            )
