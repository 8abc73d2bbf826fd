"""Name the layers of a LoRA as ComfyUI's LoRA loader does.

ComfyUI runs the networks' original code (`comfy/ldm`). Its loader knows two names of a weight (`comfy/lora.py`):
"diffusion_model." and the original name, for every network; and "transformer." and diffusers' name, for networks with
a table in `comfy/utils.py`. By such a table, queries, keys and values change their rows of the fused weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from draftune.errors import DraftuneError
from draftune.lora.deltas import LoRADelta, LoRADeltas
from draftune.lora.names import adaptable_layers, layer_weight
from draftune.lora.original_names import TABLES, Target, original_names

DIFFUSERS_NAMES = {
    "ChromaTransformer2DModel": r"(?!distilled_guidance_layer\.).+",
    "Flux2Transformer2DModel": r"(single_)?transformer_blocks\..+|(x|context)_embedder|proj_out|norm_out\.linear",
    "FluxTransformer2DModel": r".+",
    "PixArtTransformer2DModel": r".+",
    "QwenImageTransformer2DModel": r".+",
    "SD3Transformer2DModel": r".+",
    "ZImageTransformer2DModel": r"(layers|context_refiner|noise_refiner|cap_embedder|t_embedder)\..+"
    r"|all_(x_embedder|final_layer)\.2-1.*",
}
"""By the class of the transformer: pattern of the layers that ComfyUI knows by diffusers' names."""
CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(mlp|self_attn)\.\w+")


def has_loader(denoiser: nn.Module) -> bool:
    """Return whether ComfyUI loads LoRAs for a denoiser of this class."""
    return is_loaded(type(denoiser).__name__)


def is_loaded(kind: str) -> bool:
    """Return whether ComfyUI loads LoRAs for denoisers of the class of this name."""
    return kind == "UNet2DConditionModel" or kind in DIFFUSERS_NAMES or kind in TABLES


def comfyui_names(lora: LoRADeltas, networks: Mapping[str, nn.Module]) -> LoRADeltas:
    """Rename the layers of a transformer's LoRA, and fuse layers that ComfyUI only knows as one.

    The transformer's layers have diffusers' names if ComfyUI knows all of them, and else the original names.

    Args:
        lora: The LoRA.
        networks: The transformer and the text encoders of its base model by PART; weights may be on the device "meta".

    Raises:
        DraftuneError: ComfyUI has no name for a layer.
    """
    transformer = networks["transformer"]
    pattern = DIFFUSERS_NAMES.get(type(transformer).__name__, "")
    changes = lora.of_part("transformer")
    if all(re.fullmatch(pattern, name) for name in changes):
        named = {f"transformer.{name}": delta for name, delta in changes.items()}
    else:
        named = {f"diffusion_model.{name}": delta for name, delta in by_original_name(changes, transformer).items()}
    for part in lora.parts:
        if part != "transformer":
            named |= {text_name(part, name): delta for name, delta in lora.of_part(part).items()}
    return LoRADeltas(named, lora.base_model, lora.grid)


def by_original_name(changes: Mapping[str, LoRADelta], transformer: nn.Module) -> dict[str, LoRADelta]:
    """Return the changes of a transformer's layers by the layers' names in its original code."""
    layers = dict(adaptable_layers(transformer))
    targets = {
        name: target for name, target in original_names(transformer, layers) if {*target.layers} & changes.keys()
    }
    known = {layer for target in targets.values() for layer in target.layers}
    if missing := sorted(changes.keys() - known):
        raise DraftuneError(
            f"--format comfyui does not support the layer {missing[0]}, which ComfyUI has no name for: use --format "
            "diffusers or merged"
        )
    return {name: fused(target, changes, layers) for name, target in targets.items()}


def fused(target: Target, changes: Mapping[str, LoRADelta], layers: Mapping[str, nn.Module]) -> LoRADelta:
    """Return the change of a fused weight, exactly: the sum of the ranks of the changes of its layers.

    A = [A_1; ...; A_n],  B = diag(B_1, ..., B_n)

    Layers without a change get rows of zeros.
    """
    present = [changes[layer] for layer in target.layers if layer in changes]
    if len(target.layers) == 1 and not target.halves_swapped:
        return present[0]
    ups = [
        changes[layer].up.flatten(1) if layer in changes else torch.zeros(len(layer_weight(layers[layer])), 0)
        for layer in target.layers
    ]
    up = torch.block_diag(*ups)
    if target.halves_swapped:
        up = torch.cat(up.chunk(2)[::-1])
    return LoRADelta(torch.cat([delta.down for delta in present]), up, all(delta.low_rank for delta in present))


def text_name(part: str, name: str) -> str:
    """Return the name of a text encoder's layer in ComfyUI, which knows the layers of CLIP and T5."""
    if CLIP_LAYER.fullmatch(name):
        return f"{part}.{name}"
    if name.startswith("encoder.block."):
        # T5 is ComfyUI's third text encoder beside CLIP, even if there is only one CLIP.
        return f"lora_te{1 if part == 'text_encoder' else 3}_{name.replace('.', '_')}"
    raise DraftuneError(
        f"--format comfyui does not support the layer {part}.{name}, which ComfyUI has no name for: leave the text "
        "encoders out (--skip-text-encoder-lora)"
    )
