"""Map the layer names in LoRA files of any tool to layers of the pipeline's networks.

Names are compared with dots replaced by underscores, as in kohya's sd-scripts. So one table covers diffusers' names
("down_blocks.0.attentions.0.proj_in"), kohya's ("lora_unet_down_blocks_0_attentions_0_proj_in"), and those of the
networks' original code ("input_blocks.1.1.proj_in", "double_blocks.0.img_attn.qkv").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

LAYERS = (nn.Linear, nn.Conv2d)
TEXT_ENCODER = "text_encoder"
TEXT_NAME = re.compile(r"lora_te\d?_|text_encoders?_|te\d?_|clip_[lg]_|t5(?:xxl)?_")
"""The prefixes of text encoder layers, with underscores."""
WRAPPERS = (
    *("base_model_model_", "module_", "_orig_mod_", "model_diffusion_model_", "diffusion_model_"),
    *("lora_unet_", "lora_transformer_", "lycoris_", "unet_", "transformer_"),
)
"""The prefixes that tools put before a denoiser layer's name."""


class Target(NamedTuple):
    """The layers that one LoRA matrix applies to: several if the original network fuses them into one.

    Attributes:
        layers: PART.LAYER, in the order of the rows of `up`.
        halves_swapped: Whether the two halves of the rows are swapped, as scale and shift in FLUX's last normalization.
    """

    layers: tuple[str, ...]
    halves_swapped: bool = False


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
                for alias, target in original_aliases(network):
                    if all(name in layers for name in target.layers):
                        names = tuple(f"{part}.{name}" for name in target.layers)
                        self.add([alias], target._replace(layers=names))

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


def original_aliases(network: nn.Module) -> Iterator[tuple[str, Target]]:
    """Yield the names in the network's original code and their layers in diffusers, some of which may not exist."""
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        yield from ldm_names(network)
    if kind == "FluxTransformer2DModel":
        yield from flux_names(network)


def ldm_names(unet: nn.Module) -> Iterator[tuple[str, Target]]:
    """Yield the names of the original UNets of CompVis and Stability AI, which kohya's trainer uses for SDXL."""
    inner = (
        *(("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("conv2", "out_layers.3")),
        ("conv_shortcut", "skip_connection"),
    )
    blocks: dict[str, str] = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    blocks["mid_block.attentions.0"] = "middle_block.1"
    for ours, theirs, number in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for i, block in enumerate(getattr(unet, ours)):
            for j in range(len(block.resnets)):
                blocks[f"{ours}.{i}.resnets.{j}"] = f"{theirs}.{number}.0"
                blocks[f"{ours}.{i}.attentions.{j}"] = f"{theirs}.{number}.1"
                number += 1
            if getattr(block, "downsamplers", None):
                yield f"{theirs}.{number}.0.op", Target((f"{ours}.{i}.downsamplers.0.conv",))
                number += 1
            if getattr(block, "upsamplers", None):
                last = 2 if getattr(block, "attentions", None) else 1
                yield f"{theirs}.{number - 1}.{last}.conv", Target((f"{ours}.{i}.upsamplers.0.conv",))
    others = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
    }
    for name, _ in adaptable_layers(unet):
        block, _, layer = name.rpartition(".")
        if block in blocks:
            yield from ((f"{blocks[block]}.{theirs}", Target((name,))) for ours, theirs in inner if ours == layer)
        for attention in (b for b in blocks if ".attentions." in b and name.startswith(f"{b}.")):
            yield name.replace(attention, blocks[attention], 1), Target((name,))
        if name in others:
            yield others[name], Target((name,))


def flux_names(transformer: nn.Module) -> Iterator[tuple[str, Target]]:
    """Yield the names of the original FLUX.1 code, which kohya's trainer uses, and those of XLabs' LoRAs."""
    for i in range(len(transformer.transformer_blocks)):  # type: ignore[arg-type]
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        image = tuple(f"{ours}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
        text = tuple(f"{ours}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
        for stream, number, qkv, out, ff, norm in (
            ("img", 1, image, "attn.to_out.0", "ff", "norm1"),
            ("txt", 2, text, "attn.to_add_out", "ff_context", "norm1_context"),
        ):
            yield f"{theirs}.{stream}_attn.qkv", Target(qkv)
            yield f"{theirs}.processor.qkv_lora{number}", Target(qkv)
            yield f"{theirs}.{stream}_attn.proj", Target((f"{ours}.{out}",))
            yield f"{theirs}.processor.proj_lora{number}", Target((f"{ours}.{out}",))
            yield f"{theirs}.{stream}_mlp.0", Target((f"{ours}.{ff}.net.0.proj",))
            yield f"{theirs}.{stream}_mlp.2", Target((f"{ours}.{ff}.net.2",))
            yield f"{theirs}.{stream}_mod.lin", Target((f"{ours}.{norm}.linear",))
    for i in range(len(transformer.single_transformer_blocks)):  # type: ignore[arg-type]
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        qkv = tuple(f"{ours}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
        yield f"{theirs}.linear1", Target((*qkv, f"{ours}.proj_mlp"))
        yield f"{theirs}.processor.qkv_lora", Target(qkv)
        yield f"{theirs}.linear2", Target((f"{ours}.proj_out",))
        yield f"{theirs}.processor.proj_lora", Target((f"{ours}.proj_out",))
        yield f"{theirs}.modulation.lin", Target((f"{ours}.norm.linear",))
    embedders = (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
    for theirs, ours in embedders:
        yield f"{theirs}.in_layer", Target((f"time_text_embed.{ours}_embedder.linear_1",))
        yield f"{theirs}.out_layer", Target((f"time_text_embed.{ours}_embedder.linear_2",))
    yield "img_in", Target(("x_embedder",))
    yield "txt_in", Target(("context_embedder",))
    yield "final_layer.linear", Target(("proj_out",))
    yield "final_layer.adaLN_modulation.1", Target(("norm_out.linear",), halves_swapped=True)
