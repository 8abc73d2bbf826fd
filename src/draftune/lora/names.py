"""Map the layer names in LoRA files of any tool to layers of the pipeline's networks.

Names are compared with dots replaced by underscores, as in kohya's sd-scripts. So one table covers diffusers' names
("down_blocks.0.attentions.0.proj_in"), kohya's ("lora_unet_down_blocks_0_attentions_0_proj_in"), and those of the
networks' original code ("input_blocks.1.1.proj_in", "double_blocks.0.img_attn.qkv").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from draftune.lora.original_names import Target, original_names, xlabs_names
from draftune.utils.tensors import is_quantized_weight

LAYERS = (nn.Linear, nn.Conv2d)
TEXT_ENCODER = "text_encoder"
TEXT_NAME = re.compile(r"lora_te\d?_|text_encoders?_|te\d?_|clip_[lg]_|t5(?:xxl)?_")
"""The prefixes of text encoder layers, with underscores."""
WRAPPERS = (
    *("base_model_model_", "module_", "_orig_mod_", "model_diffusion_model_", "diffusion_model_"),
    *("lora_unet_", "lora_transformer_", "lycoris_", "unet_", "transformer_"),
)
"""The prefixes that tools put before a denoiser layer's name."""


class NameTable:
    """A lookup table from the names in LoRA files to the layers of a pipeline's networks.

    Args:
        networks: By PART: the denoiser ("unet" or "transformer"), then the text encoders by their names in the pipeline
            ("text_encoder", "text_encoder_2", ...).

    Attributes:
        layers: The layers by PART.LAYER.
        targets: By a name with underscores; None for a name that is ambiguous.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.layers: dict[str, nn.Module] = {}
        self.targets: dict[str, Target | None] = {}
        encoders = [part for part in networks if part.startswith(TEXT_ENCODER)]
        for part, network in networks.items():
            layers = dict(adaptable_layers(network))
            self.layers |= {f"{part}.{canonical(part, name)}": layer for name, layer in layers.items()}
            if part in encoders:
                prefixes = text_prefixes(part, encoders)
                for name in layers:
                    for alias in text_aliases(name):
                        self.add([prefix + alias for prefix in prefixes], Target((f"{part}.{canonical(part, name)}",)))
            else:
                for name in layers:
                    self.add([name, *own_aliases(name)], Target((f"{part}.{name}",)))
                for alias, target in (*original_names(network, layers), *xlabs_names(network, layers)):
                    self.add([alias], target._replace(layers=tuple(f"{part}.{name}" for name in target.layers)))

    def add(self, names: list[str], target: Target) -> None:
        """Add names of one target; a name that already has another target becomes ambiguous."""
        for name in names:
            flat = name.replace(".", "_")
            known = self.targets.setdefault(flat, target)
            if known != target:
                self.targets[flat] = None

    def find(self, name: str) -> Target | None:
        """Return the target of a name in a file; None if the name is unknown or ambiguous."""
        targets = {self.targets.get(n) for n in unwrapped(name)} - {None}
        return targets.pop() if len(targets) == 1 else None


def unwrapped(name: str) -> set[str]:
    """Return a name with underscores, and the same name without any combination of the prefixes of tools."""
    names = {name.replace(".", "_")}
    while more := {n.removeprefix(w) for n in names for w in WRAPPERS if n.startswith(w)} - names:
        names |= more
    return names


def is_text(name: str) -> bool:
    """Return whether a name belongs to a text encoder's layer."""
    return any(TEXT_NAME.match(n) for n in unwrapped(name))


def adaptable_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear and convolution layers by name; for layers with a LoRA, the original layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            yield name, module.get_base_layer()
        elif isinstance(module, LAYERS) and not name.startswith(inside):
            yield name, module


def layer_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight; of a quantized layer a tensor on the device "meta", since its weight is packed."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, nn.Linear) and is_quantized_weight(weight):
        return torch.empty(layer.out_features, layer.in_features, device="meta")
    return weight


def canonical(part: str, name: str) -> str:
    """Return a layer's name as in LoRA files: with CLIP's prefix "text_model.", which transformers 5 removed."""
    return f"text_model.{name}" if part.startswith(TEXT_ENCODER) and name.startswith("encoder.layers.") else name


def in_network(part: str, name: str, network: nn.Module) -> str:
    """Return a layer's name in the network, given its canonical name."""
    plain = name.removeprefix("text_model.")
    is_clip = part.startswith(TEXT_ENCODER) and not hasattr(network, "text_model")
    return plain if is_clip else name


def own_aliases(name: str) -> Iterator[str]:
    """Yield a layer's names in diffusers' oldest format, in which LoRAs belonged to attention processors."""
    attention, _, layer = name.removesuffix(".0").rpartition(".")
    if layer in ("to_q", "to_k", "to_v", "to_out"):
        yield f"{attention}.processor.{layer}_lora"
        yield f"{attention}.{layer}"


def text_prefixes(part: str, encoders: list[str]) -> list[str]:
    """Return the possible prefixes of a text encoder's layers."""
    number = part.removeprefix(f"{TEXT_ENCODER}_") if part != TEXT_ENCODER else "1"
    prefixes = [f"{part}_", f"lora_te{number}_"]
    if part == TEXT_ENCODER:
        prefixes.append("lora_te_")
    if f"{TEXT_ENCODER}_3" not in encoders and part == f"{TEXT_ENCODER}_2":
        prefixes.append("lora_te3_")  # kohya's name of T5, also for FLUX, which has only two text encoders
    return prefixes


def text_aliases(name: str) -> Iterator[str]:
    """Yield a text encoder layer's names: with and without CLIP's "text_model.", and in diffusers' oldest format."""
    plain = name.removeprefix("text_model.")
    attention, _, layer = plain.rpartition(".")
    spellings = [plain]
    if layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
        spellings.append(f"{attention}.to_{layer.removesuffix('_proj')}_lora")
    for spelling in spellings:
        yield spelling
        yield f"text_model.{spelling}"
