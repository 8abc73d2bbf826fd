"""Saved pipelines as checkpoints in one file, in the original layouts: the inverse of diffusers' conversions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
DENOISER = "model.diffusion_model."


def state_of(folder: Path) -> State:
    """The weights of one network, from all its files."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def renamed(state: State, *rules: tuple[str, Any], prefix: str = "") -> State:
    """The state dict with each rule applied to every key, and a prefix."""
    named = {}
    for key, value in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        assert prefix + key not in named, key
        named[prefix + key] = value
    return named


def joined(state: State, pattern: str, parts: Iterable[str], new: str) -> State:
    """The state dict with the tensors of several layers stacked into one: q, k and v into qkv."""
    state = dict(state)
    first, *_ = parts = list(parts)
    for key in [key for key in state if re.search(pattern.format(first), key)]:
        found = re.search(pattern.format(first), key)
        assert found is not None
        names = [key.replace(found[0], found[0].replace(first, part)) for part in parts]
        state[re.sub(pattern.format(first), new, key)] = torch.cat([state.pop(name) for name in names])
    return state


def swapped(state: State, *starts: str) -> State:
    """The state dict with scale and shift exchanged in these layers, which diffusers orders the other way round."""
    return {k: torch.cat(v.chunk(2)[::-1]) if k.startswith(starts) else v for k, v in state.items()}


RESNET = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1")]
RESNET += [("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]


def unet_of(state: State) -> State:
    """A UNet in the layout of latent diffusion (Stable Diffusion, SDXL)."""
    layers = 1 + max(int(k.split(".")[3]) for k in state if k.startswith("down_blocks.0.resnets"))

    inner_block = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)")

    def rename(key: str) -> str:
        if found := inner_block.match(key):
            side, block, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            if side == "down":
                at = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else index)
            else:
                at = block * (layers + 1) + (layers if kind == "upsamplers" else index)
            attends = any(k.startswith(f"{side}_blocks.{block}.attentions") for k in state)
            inner = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + attends}[kind]
            start = f"{'input' if side == 'down' else 'output'}_blocks.{at}.{inner}."
            if kind == "downsamplers":
                return start + rest.replace("conv.", "op.")
            if kind == "resnets":
                for old, new in RESNET:
                    rest = rest.replace(old + ".", new + ".")
            return start + rest
        if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
            at, rest = 1 if found[1] == "attentions" else 2 * int(found[2]), found[3]
            if found[1] == "resnets":
                for old, new in RESNET:
                    rest = rest.replace(old + ".", new + ".")
            return f"middle_block.{at}.{rest}"
        for old, new in (
            ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("add_embedding.linear_1", "label_emb.0.0"),
            ("add_embedding.linear_2", "label_emb.0.2"),
            ("conv_in", "input_blocks.0.0"),
            ("conv_norm_out", "out.0"),
            ("conv_out", "out.2"),
        ):
            key = key.replace(old, new)
        return key

    return {DENOISER + rename(key): value for key, value in state.items()}


def vae_of(state: State, prefix: str = "first_stage_model.") -> State:
    """An autoencoder in the layout of latent diffusion."""
    ups = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks"))
    state = renamed(
        state,
        (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"up_blocks\.(\d+)", lambda found: f"up.{ups - 1 - int(found[1])}"),
        (r"down_blocks", "down"),
        (r"resnets", "block"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        prefix=prefix,
    )
    is_conv = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {k: v[:, :, None, None] if is_conv.search(k) else v for k, v in state.items()}


def clip_of(state: State, prefix: str) -> State:
    """A CLIP text encoder in the layout of transformers."""
    start = "" if any(key.startswith("text_model.") for key in state) else "text_model."
    return {prefix + ("" if key.startswith("text_projection") else start) + key: v for key, v in state.items()}


def open_clip_of(state: State, prefix: str) -> State:
    """A CLIP text encoder in the layout of OpenCLIP."""
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    state = joined(state, r"{}_proj\.(weight|bias)$", "qkv", r"in_proj_\1")
    state = renamed(
        state,
        (r"encoder\.layers\.", "transformer.resblocks."),
        (r"layer_norm(\d)", r"ln_\1"),
        (r"self_attn", "attn"),
        (r"fc1", "c_fc"),
        (r"fc2", "c_proj"),
        (r"embeddings\.token_embedding", "token_embedding"),
        (r"embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"final_layer_norm", "ln_final"),
        (r"text_projection\.weight", "text_projection"),
    )
    return {prefix + k: v.T.contiguous() if k == "text_projection" else v for k, v in state.items()}


def sd3_of(state: State, prefix: str = DENOISER) -> State:
    """Stable Diffusion 3's transformer in the layout of Stability AI."""
    last = max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks"))
    state = swapped(state, "norm_out", f"transformer_blocks.{last}.norm1_context.linear")
    state = joined(state, r"(attn2?)\.to_{}\.", ["q", "k", "v"], r"x_block.\1.qkv.")
    state = joined(state, r"attn\.add_{}_proj\.", ["q", "k", "v"], "context_block.attn.qkv.")
    return renamed(
        state,
        (r"transformer_blocks", "joint_blocks"),
        (r"(?<=\d\.)(attn2?)\.norm_([qk])\.", r"x_block.\1.ln_\2."),
        (r"attn\.norm_added_([qk])\.", r"context_block.attn.ln_\1."),
        (r"(?<=\d\.)(attn2?)\.to_out\.0", r"x_block.\1.proj"),
        (r"attn\.to_add_out", "context_block.attn.proj"),
        (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
        (r"norm1\.linear", "x_block.adaLN_modulation.1"),
        (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
        (r"ff_context\.net\.2", "context_block.mlp.fc2"),
        (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
        (r"ff\.net\.2", "x_block.mlp.fc2"),
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj", "x_embedder.proj"),
        (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
        (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"),
        prefix=prefix,
    )


def flux_of(state: State, prefix: str = "") -> State:
    """FLUX.1's transformer in the layout of Black Forest Labs."""
    single = {k: v for k, v in state.items() if k.startswith("single_transformer_blocks")}
    double = swapped({k: v for k, v in state.items() if k not in single}, "norm_out")
    single = renamed(single, (r"attn\.to_", "to_"), (r"proj_mlp", "to_mlp"))
    single = joined(single, r"to_{}\.", ["q", "k", "v", "mlp"], "linear1.")
    single = renamed(
        single,
        (r"single_transformer_blocks", "single_blocks"),
        (r"attn\.norm_q\.weight", "norm.query_norm.scale"),
        (r"attn\.norm_k\.weight", "norm.key_norm.scale"),
        (r"norm\.linear", "modulation.lin"),
        (r"proj_out", "linear2"),
        prefix=prefix,
    )
    double = joined(double, r"attn\.to_{}\.", ["q", "k", "v"], "img_attn.qkv.")
    double = joined(double, r"attn\.add_{}_proj\.", ["q", "k", "v"], "txt_attn.qkv.")
    return single | renamed(
        double,
        (r"^transformer_blocks", "double_blocks"),
        (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
        (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
        (r"\.attn\.to_out\.0", ".img_attn.proj"),
        (r"\.attn\.to_add_out", ".txt_attn.proj"),
        (r"norm1_context\.linear", "txt_mod.lin"),
        (r"norm1\.linear", "img_mod.lin"),
        (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
        (r"ff_context\.net\.2", "txt_mlp.2"),
        (r"ff\.net\.0\.proj", "img_mlp.0"),
        (r"ff\.net\.2", "img_mlp.2"),
        (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
        (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
        (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
        (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
        (r"^context_embedder", "txt_in"),
        (r"^x_embedder", "img_in"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"),
        prefix=prefix,
    )


def z_image_of(state: State, prefix: str = "") -> State:
    """Z-Image's transformer in the layout of Tongyi-MAI."""
    state = joined(state, r"attention\.to_{}\.", ["q", "k", "v"], "attention.qkv.")
    return renamed(
        state,
        (r"all_(final_layer|x_embedder)\.2-1", r"\1"),
        (r"attention\.to_out\.0", "attention.out"),
        (r"attention\.norm_([qk])", r"attention.\1_norm"),
        prefix=prefix,
    )


DENOISERS: dict[str, Callable[[State], State]] = {
    "FluxPipeline": flux_of,
    "StableDiffusionPipeline": unet_of,
    "StableDiffusionXLPipeline": unet_of,
    "StableDiffusion3Pipeline": sd3_of,
    "ZImagePipeline": z_image_of,
}


def denoiser_of(model: Path) -> State:
    """The denoiser of a saved pipeline in its original layout."""
    kind = json.loads((model / "model_index.json").read_text())["_class_name"]
    return DENOISERS[kind](state_of(next(model / part for part in ("unet", "transformer") if (model / part).exists())))


def others_of(model: Path) -> State:
    """The autoencoder and the text encoders of a saved pipeline in the layout of its checkpoints."""
    kind = json.loads((model / "model_index.json").read_text())["_class_name"]
    state = vae_of(state_of(model / "vae"), "vae." if kind == "FluxPipeline" else "first_stage_model.")
    one, two, three = (state_of(model / f"text_encoder{end}") for end in ("", "_2", "_3"))
    if kind == "StableDiffusionPipeline":
        state |= clip_of(one, "cond_stage_model.transformer.")
    elif kind == "StableDiffusionXLPipeline":
        state |= clip_of(one, "conditioner.embedders.0.transformer.")
        state |= open_clip_of(two, "conditioner.embedders.1.model.")
    elif kind == "StableDiffusion3Pipeline":
        state |= clip_of(one, "text_encoders.clip_l.transformer.")
        state |= clip_of(two, "text_encoders.clip_g.transformer.")
        state |= renamed(three, prefix="text_encoders.t5xxl.transformer.")
    elif kind == "FluxPipeline":
        state |= clip_of(one, "text_encoders.clip_l.transformer.")
        state |= renamed(two, prefix="text_encoders.t5xxl.transformer.")
    return state


def write(path: Path, state: State, dtype: torch.dtype | None = None) -> Path:
    """Save a state dict, in another precision if one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: (v if dtype is None else v.to(dtype)).contiguous() for k, v in state.items()}, path)
    return path


def flux_of_any_width(monkeypatch: Any) -> None:
    """Let diffusers convert a FLUX.1 of another width than the published 3072, which its conversion assumes."""
    split, published = torch.split, (3072, 3072, 3072, 12288)

    def of_width(tensor: Tensor, sizes: Any, dim: int = 0) -> Any:
        width = tensor.shape[0] // 7
        return split(tensor, (width, width, width, 4 * width) if sizes == published else sizes, dim)

    monkeypatch.setattr(torch, "split", of_width)
