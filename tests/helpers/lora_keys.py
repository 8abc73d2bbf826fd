"""The names of the layers in LoRA files, by tool and network, written down from the source of these tools.

ComfyUI: `model_lora_keys_unet` and `load_lora` of comfy/lora.py, the tables "..._to_diffusers" of comfy/utils.py, and
the networks of comfy/ldm. sd-scripts: networks/lora_sd3.py, lora_flux.py and lora_lumina.py. musubi-tuner:
networks/lora_flux_2.py, lora_qwen_image.py and lora_zimage.py. ai-toolkit: `convert_lora_weights_before_save` of
extensions_built_in/diffusion_models.

Patterns: {a,b} stands for each of its words, # for the number of a block.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

PARTS = "{layers,noise_refiner,context_refiner}.#"
FLUX_BLOCKS = "double_blocks.#.{img,txt}_{attn.{qkv,proj},mlp.{0,2}} single_blocks.#.{linear1,linear2}"
QWEN = (
    "transformer_blocks.#.{attn.{to_{q,k,v},add_{q,k,v}_proj,to_out.0,to_add_out},"
    "{img,txt}_{mod.1,mlp.net.{0.proj,2}}} {img,txt}_in time_text_embed.timestep_embedder.linear_{1,2} "
    "norm_out.linear proj_out"
)
ORIGINAL = {
    "FluxTransformer2DModel": f"{FLUX_BLOCKS} double_blocks.#.{{img,txt}}_mod.lin single_blocks.#.modulation.lin "
    "{img,txt}_in {time,vector,guidance}_in.{in,out}_layer final_layer.{linear,adaLN_modulation.1}",
    "Flux2Transformer2DModel": f"{FLUX_BLOCKS} {{img,txt}}_in {{time,guidance}}_in.{{in,out}}_layer "
    "{double_stream_modulation_{img,txt},single_stream_modulation}.lin final_layer.{linear,adaLN_modulation.1}",
    "ChromaTransformer2DModel": f"{FLUX_BLOCKS} {{img,txt}}_in final_layer.linear "
    "distilled_guidance_layer.{in_proj,out_proj,layers.#.{in,out}_layer}",
    "SD3Transformer2DModel": "joint_blocks.#.{x,context}_block.{attn.{qkv,proj},mlp.{fc1,fc2},adaLN_modulation.1} "
    "joint_blocks.#.x_block.attn2.{qkv,proj} x_embedder.proj context_embedder {t,y}_embedder.mlp.{0,2} "
    "final_layer.{linear,adaLN_modulation.1}",
    "ZImageTransformer2DModel": f"{PARTS}.{{attention.{{qkv,out}},feed_forward.{{w1,w2,w3}},adaLN_modulation.0}} "
    "x_embedder cap_embedder.1 t_embedder.mlp.{0,2} final_layer.{linear,adaLN_modulation.1}",
    "Lumina2Transformer2DModel": f"{PARTS}.{{attention.{{qkv,out}},feed_forward.{{w1,w2,w3}},adaLN_modulation.1}} "
    "x_embedder cap_embedder.1 t_embedder.mlp.{0,2} final_layer.{linear,adaLN_modulation.1}",
    "QwenImageTransformer2DModel": QWEN,
    "PixArtTransformer2DModel": "blocks.#.{attn.{qkv,proj},cross_attn.{q_linear,kv_linear,proj},mlp.{fc1,fc2}} "
    "{t,csize,ar}_embedder.mlp.{0,2} x_embedder.proj y_embedder.y_proj.{fc1,fc2} t_block.1 final_layer.linear",
}
"""The layers of the original networks by the class in diffusers: ComfyUI reads each as "diffusion_model.NAME"."""

FLUX_ROWS = """
    transformer_blocks.#.attn.to_{q,k,v} = double_blocks.#.img_attn.qkv[{0,1,2}+1]
    transformer_blocks.#.attn.add_{q,k,v}_proj = double_blocks.#.txt_attn.qkv[{0,1,2}+1]
    transformer_blocks.#.attn.{to_out.0,to_add_out} = double_blocks.#.{img,txt}_attn.proj
    {x,context}_embedder = {img,txt}_in
    proj_out = final_layer.linear
"""
FLUX_1_ROWS = """
    transformer_blocks.#.{ff,ff_context}.net.{0.proj,2} = double_blocks.#.{img,txt}_mlp.{0,2}
    single_transformer_blocks.#.attn.to_{q,k,v} = single_blocks.#.linear1[{0,1,2}+1]
    single_transformer_blocks.#.proj_mlp = single_blocks.#.linear1[3+4]
    single_transformer_blocks.#.proj_out = single_blocks.#.linear2
"""
COMFYUI = {
    "FluxTransformer2DModel": f"""{FLUX_ROWS}{FLUX_1_ROWS}
    transformer_blocks.#.{{norm1,norm1_context}}.linear = double_blocks.#.{{img,txt}}_mod.lin
    single_transformer_blocks.#.norm.linear = single_blocks.#.modulation.lin
    time_text_embed.{{timestep,text,guidance}}_embedder.linear_{{1,2}} = {{time,vector,guidance}}_in.{{in,out}}_layer
    norm_out.linear = ~final_layer.adaLN_modulation.1
    """,
    "ChromaTransformer2DModel": f"{FLUX_ROWS}{FLUX_1_ROWS}",
    "Flux2Transformer2DModel": f"""{FLUX_ROWS}
    transformer_blocks.#.{{ff,ff_context}}.linear_{{in,out}} = double_blocks.#.{{img,txt}}_mlp.{{0,2}}
    single_transformer_blocks.#.attn.{{to_qkv_mlp_proj,to_out}} = single_blocks.#.linear{{1,2}}
    norm_out.linear = ~final_layer.adaLN_modulation.1
    """,
    "SD3Transformer2DModel": """
    transformer_blocks.#.{attn,attn2}.to_{q,k,v} = joint_blocks.#.x_block.{attn,attn2}.qkv[{0,1,2}+1]
    transformer_blocks.#.attn.add_{q,k,v}_proj = joint_blocks.#.context_block.attn.qkv[{0,1,2}+1]
    transformer_blocks.#.{attn,attn2}.to_out.0 = joint_blocks.#.x_block.{attn,attn2}.proj
    transformer_blocks.#.attn.to_add_out = joint_blocks.#.context_block.attn.proj
    transformer_blocks.#.{ff,ff_context}.net.{0.proj,2} = joint_blocks.#.{x,context}_block.mlp.{fc1,fc2}
    transformer_blocks.#.{norm1,norm1_context}.linear = joint_blocks.#.{x,context}_block.adaLN_modulation.1
    transformer_blocks.LAST.norm1_context.linear = ~joint_blocks.LAST.context_block.adaLN_modulation.1
    time_text_embed.{timestep,text}_embedder.linear_{1,2} = {t,y}_embedder.mlp.{0,2}
    context_embedder = context_embedder
    pos_embed.proj = x_embedder.proj
    proj_out = final_layer.linear
    norm_out.linear = ~final_layer.adaLN_modulation.1
    """,
    "ZImageTransformer2DModel": f"""
    {PARTS}.attention.to_{{q,k,v}} = {PARTS}.attention.qkv[{{0,1,2}}+1]
    {PARTS}.attention.to_out.0 = {PARTS}.attention.out
    {PARTS}.feed_forward.{{w1,w2,w3}} = {PARTS}.feed_forward.{{w1,w2,w3}}
    {PARTS}.adaLN_modulation.0 = {PARTS}.adaLN_modulation.0
    all_final_layer.2-1.{{linear,adaLN_modulation.1}} = final_layer.{{linear,adaLN_modulation.1}}
    all_x_embedder.2-1 = x_embedder
    {{cap_embedder.1,t_embedder.mlp.{{0,2}}}} = {{cap_embedder.1,t_embedder.mlp.{{0,2}}}}
    """,
    "Lumina2Transformer2DModel": "",
    "QwenImageTransformer2DModel": "\n".join(f"{name} = {name}" for name in QWEN.split()),
    "PixArtTransformer2DModel": """
    transformer_blocks.#.attn1.to_{q,k,v} = blocks.#.attn.qkv[{0,1,2}+1]
    transformer_blocks.#.attn2.to_q = blocks.#.cross_attn.q_linear
    transformer_blocks.#.attn2.to_{k,v} = blocks.#.cross_attn.kv_linear[{0,1}+1]
    transformer_blocks.#.{attn1,attn2}.to_out.0 = blocks.#.{attn,cross_attn}.proj
    transformer_blocks.#.ff.net.{0.proj,2} = blocks.#.mlp.{fc1,fc2}
    adaln_single.emb.{timestep,resolution,aspect_ratio}_embedder.linear_{1,2} = {t,csize,ar}_embedder.mlp.{0,2}
    adaln_single.linear = t_block.1
    caption_projection.linear_{1,2} = y_embedder.y_proj.{fc1,fc2}
    pos_embed.proj = x_embedder.proj
    proj_out = final_layer.linear
    """,
}
"""The layers that ComfyUI reads as "transformer.NAME": diffusers' name = original name[first row + rows], both in units
of the hidden size; ~ for the halves of the rows swapped."""

TRANSFORMER = "attn{1,2}.{to_{q,k,v},to_out.0},ff.net.{0.proj,2}"
UNET_REST = (
    "{down_blocks.#,mid_block,up_blocks.#}.resnets.{0,1,2}.{conv1,conv2,time_emb_proj,conv_shortcut} "
    "down_blocks.#.downsamplers.0.conv up_blocks.#.upsamplers.0.conv conv_in conv_out time_embedding.linear_{1,2} "
    "add_embedding.linear_{1,2}"
)
ATTENTIONS = "{down_blocks.{0,1,2},mid_block,up_blocks.{1,2,3}}.attentions.{0,1,2}"
ATTENTIONS_XL = "{down_blocks.{1,2},mid_block,up_blocks.{0,1}}.attentions.{0,1,2}"
UNET = f"{ATTENTIONS}.{{proj_in,proj_out,transformer_blocks.0.{{{TRANSFORMER}}}}} {UNET_REST}"
UNET_XL = f"{ATTENTIONS_XL}.{{proj_in,proj_out,transformer_blocks.#.{{{TRANSFORMER}}}}} {UNET_REST}"
"""The layers of the UNets of Stable Diffusion and Stable Diffusion XL that ComfyUI reads by diffusers' names as kohya's
"lora_unet_NAME"."""

TOOLS = {
    ("sd-scripts", "FluxTransformer2DModel"): ("lora_unet_", f"{FLUX_BLOCKS} double_blocks.#.{{img,txt}}_mod.lin"),
    ("sd-scripts", "ChromaTransformer2DModel"): ("lora_unet_", FLUX_BLOCKS),
    ("sd-scripts", "SD3Transformer2DModel"): ("lora_unet_", ORIGINAL["SD3Transformer2DModel"]),
    ("sd-scripts", "Lumina2Transformer2DModel"): ("lora_unet_", f"{ORIGINAL['Lumina2Transformer2DModel']}"),
    ("musubi-tuner", "Flux2Transformer2DModel"): ("lora_unet_", FLUX_BLOCKS),
    ("musubi-tuner", "QwenImageTransformer2DModel"): ("lora_unet_", QWEN.split()[0]),
    ("musubi-tuner", "ZImageTransformer2DModel"): (
        "lora_unet_",
        "layers.#.{attention.{to_{q,k,v},to_out.0},feed_forward.{w1,w2,w3}}",
    ),
    ("ai-toolkit", "Flux2Transformer2DModel"): ("diffusion_model.", ORIGINAL["Flux2Transformer2DModel"]),
    ("ai-toolkit", "ChromaTransformer2DModel"): ("diffusion_model.", ORIGINAL["ChromaTransformer2DModel"]),
    ("ai-toolkit", "QwenImageTransformer2DModel"): ("diffusion_model.", QWEN.split()[0]),
    ("ai-toolkit", "ZImageTransformer2DModel"): (
        "diffusion_model.",
        "layers.#.{attention.{to_{q,k,v},to_out.0},feed_forward.{w1,w2,w3},adaLN_modulation.0}",
    ),
    ("ComfyUI", "SD3Transformer2DModel"): ("diffusion_model.", ORIGINAL["SD3Transformer2DModel"]),
    ("ComfyUI", "ZImageTransformer2DModel"): ("diffusion_model.", ORIGINAL["ZImageTransformer2DModel"]),
    ("ComfyUI", "Lumina2Transformer2DModel"): ("diffusion_model.", ORIGINAL["Lumina2Transformer2DModel"]),
}
"""By tool and class of the transformer: the prefix, and the layers that the tool adapts. "lora_unet_" is followed by
the name with underscores for dots."""


class Slot(NamedTuple):
    """What a LoRA changes in ComfyUI: rows of a weight."""

    weight: str
    first: int = 0
    rows: int | None = None
    swapped: bool = False


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern without # stands for."""
    if not (match := re.search(r"\{([^{}]*)\}", pattern)):
        return [pattern]
    return [
        name
        for word in match[1].split(",")
        for name in expand(pattern[: match.start()] + word + pattern[match.end() :])
    ]


def expand_all(patterns: str, blocks: int = 2) -> list[str]:
    """Return the names that patterns stand for, with the numbers of `blocks` blocks."""
    numbers = [str(i) for i in range(blocks)]
    return [
        name.replace("#", number)
        for pattern in patterns.split()
        for name in expand(pattern)
        for number in (numbers if "#" in name else ("",))
    ]


def comfyui_slots(network: nn.Module, hidden: int, blocks: int = 2) -> dict[str, Slot]:
    """Return what each name changes in ComfyUI."""
    kind = type(network).__name__
    slots = {f"diffusion_model.{name}": Slot(name) for name in expand_all(ORIGINAL[kind], blocks)}
    for line in filter(None, map(str.strip, COMFYUI[kind].replace("LAST", str(blocks - 1)).splitlines())):
        names, places = (expand_all(side, blocks) for side in line.split(" = "))
        for name, place in zip(names, places, strict=True):
            weight, first, rows = re.fullmatch(r"~?([^\[]+)(?:\[(\d)\+(\d)\])?", place).groups()  # type: ignore[union-attr]
            part = (hidden * int(first), hidden * int(rows)) if rows else (0, None)
            slots[f"transformer.{name}"] = Slot(weight, *part, place.startswith("~"))
    return slots
