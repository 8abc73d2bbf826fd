"""Which layer of a network a name in a LoRA file means, in the spelling of any tool.

A name is looked up with dots as underscores, as kohya's sd-scripts write them. So one table serves diffusers' names
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
"""How the names of layers of text encoders begin, with underscores."""
WRAPPERS = (
    *("base_model_model_", "module_", "_orig_mod_", "model_diffusion_model_", "diffusion_model_"),
    *("lora_unet_", "lora_transformer_", "lycoris_", "unet_", "transformer_"),
)
"""What tools put before a denoiser's layer."""


class Target(NamedTuple):
    """The layers that one matrix of a file stands for: several where the original network fuses them."""

    layers: tuple[str, ...]
    """PART.LAYER, in the order of the rows of `up`."""
    halves_swapped: bool = False
    """Whether the rows' two halves are swapped, as scale and shift are in FLUX's last normalization."""


class NameTable:
    """The layers of a pipeline's networks by all names that LoRA files have for them.

    Args:
        networks: by PART, the denoiser's prefix ("unet", "transformer") first, then the text encoders by their names
            in the pipeline ("text_encoder", "text_encoder_2", ...).
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.layers: dict[str, nn.Module] = {}
        """The layers by PART.LAYER."""
        self.targets: dict[str, Target | None] = {}
        """By a name with underscores; None where two layers have it."""
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
        for name in names:
            flat = name.replace(".", "_")
            known = self.targets.setdefault(flat, target)
            if known != target:
                self.targets[flat] = None

    def find(self, name: str) -> Target | None:
        """Return the layers that a file's name means, None where there are none or it is not clear which."""
        targets = {self.targets.get(n) for n in unwrapped(name)} - {None}
        return targets.pop() if len(targets) == 1 else None


def unwrapped(name: str) -> set[str]:
    """Return a name with underscores, and what is left of it without what tools put before it."""
    found = {name.replace(".", "_")}
    while more := {n.removeprefix(w) for n in found for w in WRAPPERS if n.startswith(w)} - found:
        found |= more
    return found


def is_text(name: str) -> bool:
    """Return whether a name is that of a text encoder's layer."""
    return any(TEXT_NAME.match(n) for n in unwrapped(name))


def adaptable_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear and convolution layers by name; of a layer that carries LoRAs already, the layer itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            yield name, module.get_base_layer()
        elif isinstance(module, LAYERS) and not name.startswith(inside):
            yield name, module


def canonical(part: str, name: str) -> str:
    """Return a layer's name as LoRA files spell it: with the "text_model." of CLIP, which transformers 5 dropped."""
    return f"text_model.{name}" if part.startswith(TEXT_ENCODER) and name.startswith("encoder.layers.") else name


def in_network(part: str, name: str, network: nn.Module) -> str:
    """Return the name in the network of a layer by its canonical name."""
    plain = name.removeprefix("text_model.")
    is_clip = part.startswith(TEXT_ENCODER) and not hasattr(network, "text_model")
    return plain if is_clip else name


def own_aliases(name: str) -> Iterator[str]:
    """Yield the names of diffusers' oldest format, in which a LoRA belonged to an attention processor."""
    attention, _, layer = name.removesuffix(".0").rpartition(".")
    if layer in ("to_q", "to_k", "to_v", "to_out"):
        yield f"{attention}.processor.{layer}_lora"
        yield f"{attention}.{layer}"


def text_prefixes(part: str, encoders: list[str]) -> list[str]:
    """Return what the names of a text encoder's layers begin with."""
    number = part.removeprefix(f"{TEXT_ENCODER}_") if part != TEXT_ENCODER else "1"
    prefixes = [f"{part}_", f"lora_te{number}_"]
    if part == TEXT_ENCODER:
        prefixes.append("lora_te_")
    if f"{TEXT_ENCODER}_3" not in encoders and part == f"{TEXT_ENCODER}_2":
        prefixes.append("lora_te3_")  # kohya calls T5 the third one in FLUX too, whose pipeline has two
    return prefixes


def text_aliases(name: str) -> Iterator[str]:
    """Yield the names of a text encoder's layer, with and without CLIP's "text_model.", and diffusers' oldest ones."""
    plain = name.removeprefix("text_model.")
    attention, _, layer = plain.rpartition(".")
    spellings = [plain]
    if layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
        spellings.append(f"{attention}.to_{layer.removesuffix('_proj')}_lora")
    for spelling in spellings:
        yield spelling
        yield f"text_model.{spelling}"


def original_aliases(network: nn.Module) -> Iterator[tuple[str, Target]]:
    """Yield the names of the network's original code, with diffusers' layers; some may not be there."""
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        yield from ldm_names(network)
    if kind == "FluxTransformer2DModel":
        yield from flux_names(network)


def ldm_names(unet: nn.Module) -> Iterator[tuple[str, Target]]:
    """Yield the names of CompVis' and Stability's UNets, which kohya's trainer uses for SDXL."""
    inner = (
        *(("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("conv2", "out_layers.3")),
        ("conv_shortcut", "skip_connection"),
    )
    blocks: dict[str, str] = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    blocks["mid_block.attentions.0"] = "middle_block.1"
    number = 1
    for i, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        for j in range(len(block.resnets)):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if getattr(block, "downsamplers", None):
            yield f"input_blocks.{number}.0.op", Target((f"down_blocks.{i}.downsamplers.0.conv",))
            number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):  # type: ignore[arg-type]
        last = 2 if getattr(block, "attentions", None) else 1
        for j in range(len(block.resnets)):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if getattr(block, "upsamplers", None):
            yield f"output_blocks.{number - 1}.{last}.conv", Target((f"up_blocks.{i}.upsamplers.0.conv",))
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
    """Yield the names of Black Forest Labs' FLUX.1, which kohya's trainer uses, and of XLabs' LoRAs."""
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
