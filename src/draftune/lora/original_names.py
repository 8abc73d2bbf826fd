"""Map the layer names in the networks' original code, which other tools use in LoRA files, to layers of diffusers.

The tables were written from the original code of the networks, ComfyUI's `comfy/utils.py` and kohya's trainers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import nn


class Target(NamedTuple):
    """The layers that one LoRA matrix applies to: several if the original network fuses them into one.

    Attributes:
        layers: In the order of the rows of `up`.
        halves_swapped: Whether the two halves of the rows are swapped, as scale and shift in FLUX's last normalization.
    """

    layers: tuple[str, ...]
    halves_swapped: bool = False


def to(*layers: str, halves_swapped: bool = False) -> Target:
    """Return the target with these layers."""
    return Target(layers, halves_swapped)


def blocks(original: str, own: str, layers: Mapping[str, str]) -> dict[str, Target]:
    """Return the targets in numbered blocks.

    Args:
        original: The block's name in the original code, with {} for its number.
        own: The block's name in diffusers.
        layers: By a layer's name in the original block: the names in diffusers' block, separated by spaces.
    """
    return {f"{original}.{name}": to(*(f"{own}.{layer}" for layer in names.split())) for name, names in layers.items()}


FLUX_ATTENTION = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
FLUX_OUTER = {
    "img_in": to("x_embedder"),
    "txt_in": to("context_embedder"),
    "final_layer.linear": to("proj_out"),
    "final_layer.adaLN_modulation.1": to("norm_out.linear", halves_swapped=True),
}
FLUX = {
    **blocks(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            **FLUX_ATTENTION,
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
    ),
    **blocks(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        {
            "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
        },
    ),
    "time_in.in_layer": to("time_text_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": to("time_text_embed.timestep_embedder.linear_2"),
    "vector_in.in_layer": to("time_text_embed.text_embedder.linear_1"),
    "vector_in.out_layer": to("time_text_embed.text_embedder.linear_2"),
    "guidance_in.in_layer": to("time_text_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": to("time_text_embed.guidance_embedder.linear_2"),
    **FLUX_OUTER,
}
XLABS = {
    **blocks(
        "double_blocks.{}.processor",
        "transformer_blocks.{}.attn",
        {
            "qkv_lora1": "to_q to_k to_v",
            "qkv_lora2": "add_q_proj add_k_proj add_v_proj",
            "proj_lora1": "to_out.0",
            "proj_lora2": "to_add_out",
        },
    ),
    **blocks(
        "single_blocks.{}.processor",
        "single_transformer_blocks.{}",
        {"qkv_lora": "attn.to_q attn.to_k attn.to_v", "proj_lora": "proj_out"},
    ),
}
CHROMA = {
    **FLUX,
    "distilled_guidance_layer.in_proj": to("distilled_guidance_layer.in_proj"),
    "distilled_guidance_layer.out_proj": to("distilled_guidance_layer.out_proj"),
    **blocks(
        "distilled_guidance_layer.layers.{}",
        "distilled_guidance_layer.layers.{}",
        {"in_layer": "linear_1", "out_layer": "linear_2"},
    ),
}
FLUX_2 = {
    **blocks(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            **FLUX_ATTENTION,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    **blocks(
        "single_blocks.{}",
        "single_transformer_blocks.{}.attn",
        {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"},
    ),
    "time_in.in_layer": to("time_guidance_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": to("time_guidance_embed.timestep_embedder.linear_2"),
    "guidance_in.in_layer": to("time_guidance_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": to("time_guidance_embed.guidance_embedder.linear_2"),
    "double_stream_modulation_img.lin": to("double_stream_modulation_img.linear"),
    "double_stream_modulation_txt.lin": to("double_stream_modulation_txt.linear"),
    "single_stream_modulation.lin": to("single_stream_modulation.linear"),
    **FLUX_OUTER,
}
SD3 = {
    **blocks(
        "joint_blocks.{}",
        "transformer_blocks.{}",
        {
            "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
    ),
    "x_embedder.proj": to("pos_embed.proj"),
    "context_embedder": to("context_embedder"),
    "t_embedder.mlp.0": to("time_text_embed.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": to("time_text_embed.timestep_embedder.linear_2"),
    "y_embedder.mlp.0": to("time_text_embed.text_embedder.linear_1"),
    "y_embedder.mlp.2": to("time_text_embed.text_embedder.linear_2"),
    "final_layer.linear": to("proj_out"),
    "final_layer.adaLN_modulation.1": to("norm_out.linear", halves_swapped=True),
}
Z_IMAGE = {
    "x_embedder": to("all_x_embedder.2-1"),
    "t_embedder.mlp.0": to("t_embedder.mlp.0"),
    "t_embedder.mlp.2": to("t_embedder.mlp.2"),
    "cap_embedder.1": to("cap_embedder.1"),
    "final_layer.linear": to("all_final_layer.2-1.linear"),
    "final_layer.adaLN_modulation.1": to("all_final_layer.2-1.adaLN_modulation.1"),
}
LUMINA_2 = {
    "x_embedder": to("x_embedder"),
    "t_embedder.mlp.0": to("time_caption_embed.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": to("time_caption_embed.timestep_embedder.linear_2"),
    "cap_embedder.1": to("time_caption_embed.caption_embedder.1"),
    "final_layer.linear": to("norm_out.linear_2"),
    "final_layer.adaLN_modulation.1": to("norm_out.linear_1"),
}
for part in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
    Z_IMAGE |= blocks(
        part,
        part,
        {
            "attention.qkv": "attention.to_q attention.to_k attention.to_v",
            "attention.out": "attention.to_out.0",
            "feed_forward.w1": "feed_forward.w1",
            "feed_forward.w2": "feed_forward.w2",
            "feed_forward.w3": "feed_forward.w3",
            "adaLN_modulation.0": "adaLN_modulation.0",
        },
    )
    LUMINA_2 |= blocks(
        part,
        part,
        {
            "attention.qkv": "attn.to_q attn.to_k attn.to_v",
            "attention.out": "attn.to_out.0",
            "feed_forward.w1": "feed_forward.linear_1",
            "feed_forward.w2": "feed_forward.linear_2",
            "feed_forward.w3": "feed_forward.linear_3",
            "adaLN_modulation.1": "norm1.linear",
        },
    )

TABLES: dict[str, Mapping[str, Target]] = {
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX_2,
    "ChromaTransformer2DModel": CHROMA,
    "SD3Transformer2DModel": SD3,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA_2,
}
"""By the class of the transformer: the targets by their names in the original code, with {} for a block's number."""


def original_names(network: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Yield the layers' names in the denoiser's original code, and their targets.

    Args:
        network: The denoiser.
        layers: The names of its layers in diffusers.
    """
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        yield from ((name, target) for name, target in ldm_names(network, layers) if target.layers[0] in layers)
    for name, target in expanded(TABLES.get(kind, {}), layers):
        block, is_context, _ = target.layers[0].partition(".norm1_context.")
        if is_context and f"{block}.ff_context.net.0.proj" not in layers:
            # SD3's last block only normalizes the context: with scale and shift, in diffusers the scale first.
            target = target._replace(halves_swapped=True)
        yield name, target


def xlabs_names(network: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Yield the names of XLabs' LoRAs for FLUX.1 and their targets; see `original_names`."""
    if type(network).__name__ == "FluxTransformer2DModel":
        yield from expanded(XLABS, layers)


def expanded(table: Mapping[str, Target], layers: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Yield a table's targets whose layers all exist, with each block's number."""
    numbers = sorted({part for layer in layers for part in layer.split(".") if part.isdigit()}, key=int)
    for name, target in table.items():
        for number in numbers if "{}" in name else ("",):
            names = tuple(layer.replace("{}", number) for layer in target.layers)
            if all(layer in layers for layer in names):
                yield name.replace("{}", number), target._replace(layers=names)


def ldm_names(unet: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, Target]]:
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
    for name in layers:
        block, _, layer = name.rpartition(".")
        if block in blocks:
            yield from ((f"{blocks[block]}.{theirs}", Target((name,))) for ours, theirs in inner if ours == layer)
        for attention in (b for b in blocks if ".attentions." in b and name.startswith(f"{b}.")):
            yield name.replace(attention, blocks[attention], 1), Target((name,))
        if name in others:
            yield others[name], Target((name,))
