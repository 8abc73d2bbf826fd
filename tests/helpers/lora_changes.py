"""LoRAs of the layers of transformers of the published widths, and the comparison of their changes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from draftune.lora import LoRADelta, LoRADeltas
from draftune.lora.names import adaptable_layers, layer_weight

BLOCKS = {
    "Flux2Transformer2DModel": r"(single_)?transformer_blocks\..+|norm_out\.linear",
    "ChromaTransformer2DModel": r"(single_)?transformer_blocks\..+",
    "Lumina2Transformer2DModel": r"(layers|\w+_refiner)\..+",
}
"""Layers that people adapt, where all of a network's layers have other names in the file."""


def network(kind: str) -> tuple[nn.Module, int]:
    """Return a transformer with two blocks of each sort, and widths of the published model, without weights.

    Also returns its hidden size.
    """
    import diffusers
    from accelerate import init_empty_weights

    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    flux = {"num_layers": 2, "num_single_layers": 2}
    config, hidden = {
        "FluxTransformer2DModel": ({**flux, "guidance_embeds": True}, 3072),
        "ChromaTransformer2DModel": ({**flux, "approximator_layers": 2}, 3072),
        "Flux2Transformer2DModel": ({**flux, "num_attention_heads": 24, "joint_attention_dim": 7680}, 3072),
        "SD3Transformer2DModel": (
            {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "dual_attention_layers": (0,)},
            128,
        ),
        "ZImageTransformer2DModel": ({"n_layers": 2}, 3840),
        "Lumina2Transformer2DModel": ({"num_layers": 2}, 2304),
        "QwenImageTransformer2DModel": ({"num_layers": 2}, 3072),
        "PixArtTransformer2DModel": (
            {"num_layers": 2, "use_additional_conditions": True, "caption_channels": 64},
            1152,
        ),
    }[kind]
    with init_empty_weights():
        return getattr(diffusers, kind)(**config), hidden


def vector(size: int) -> torch.Tensor:
    """Return an input of a layer, the same for every layer of this size, to compare changes of large weights by."""
    return torch.cos(torch.arange(size, dtype=torch.float32))[:, None]


def random_lora(kind: str, layers: str = ".+") -> tuple[nn.Module, int, LoRADeltas]:
    """Return a network, its hidden size and a LoRA of rank 2 of its layers that match a pattern."""
    transformer, hidden = network(kind)
    torch.manual_seed(0)
    deltas = {}
    for name, layer in adaptable_layers(transformer):
        if re.fullmatch(layers, name):
            out, *rest = layer_weight(layer).shape
            ones = [1] * (len(rest) - 1)
            deltas[f"transformer.{name}"] = LoRADelta(torch.randn(2, *rest), torch.randn(out, 2, *ones))
    return transformer, hidden, LoRADeltas(deltas, "some/model")


def product(down: Tensor, up: Tensor) -> Tensor:
    """Return the change's product with `vector`."""
    return up.flatten(1) @ (down.flatten(1) @ vector(down[0].numel()))


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, rows in ours.items():
        assert rows.shape == theirs[name].shape, name
        assert (rows - theirs[name]).abs().max() < 1e-5 * rows.abs().max(), name
