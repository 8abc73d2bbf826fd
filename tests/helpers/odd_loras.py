"""LoRA files in many spellings, and broken ones, made by a generator with a fixed seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv2d)

# The blocks of the small UNet of pipelines.py by the names of the original code, written down by hand.
LDM = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def ldm(name: str) -> str:
    block = max((b for b in LDM if name == b or name.startswith(f"{b}.")), key=len)
    rest = name.removeprefix(block)
    if ".resnets." in f".{block}.":
        rest = f".{RESNET[rest.removeprefix('.')]}"
    return LDM[block] + rest


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")
# How a layer of the UNet, and one of the text encoder, is spelled, and the two halves.
SPELLINGS: dict[str, tuple[Callable[[str], str], Callable[[str], str], tuple[str, str]]] = {
    "diffusers": (lambda n: f"unet.{n}", lambda n: f"text_encoder.text_model.{n}", PEFT),
    "diffusers-old": (
        lambda n: f"unet.{n}",
        lambda n: f"text_encoder.text_model.{n}",
        ("lora.down", "lora.up"),
    ),
    "bare": (lambda n: n, lambda n: f"text_encoder.{n}", PEFT),
    "peft": (lambda n: f"base_model.model.{n}", lambda n: f"text_encoder.{n}", PEFT),
    "peft-named": (
        lambda n: f"base_model.model.{n}",
        lambda n: f"text_encoder.{n}",
        ("lora_A.default", "lora_B.default"),
    ),
    "kohya": (kohya, lambda n: f"lora_te_text_model_{n.replace('.', '_')}", KOHYA),
    "kohya-te1": (kohya, lambda n: f"lora_te1_text_model_{n.replace('.', '_')}", KOHYA),
    "kohya-original": (lambda n: kohya(ldm(n)), lambda n: f"lora_te_text_model_{n.replace('.', '_')}", KOHYA),
    "onetrainer": (lambda n: f"unet.{ldm(n)}", lambda n: f"text_encoder.text_model.{n}", KOHYA),
    "comfyui": (lambda n: f"diffusion_model.{ldm(n)}", lambda n: f"text_encoder.text_model.{n}", PEFT),
    "linear-layer": (
        lambda n: f"unet.{n}",
        lambda n: f"text_encoder.text_model.{n}",
        ("lora_linear_layer.down", "lora_linear_layer.up"),
    ),
}


@dataclass
class OddLoRA:
    """A LoRA file and what it must do: the change of each layer's weight, by PART.LAYER, or be refused."""

    name: str
    data: bytes
    suffix: str = ".safetensors"
    expected: dict[str, Tensor] = field(default_factory=dict)
    refused: bool = False

    def write(self, folder: Path) -> Path:
        path = folder / f"lora{self.suffix}"
        path.write_bytes(self.data)
        return path


def odd_lora(number: int, networks: Mapping[str, nn.Module]) -> OddLoRA:
    """Make the case of this number for a pipeline's "unet" and "text_encoder"; every second one is broken."""
    rng = Random(number)
    generator = torch.Generator().manual_seed(number)
    spelling = rng.choice(list(SPELLINGS))
    unet_name, text_name, halves = SPELLINGS[spelling]
    unet = {n: m for n, m in networks["unet"].named_modules() if isinstance(m, LAYERS)}
    text = {n: m for n, m in networks["text_encoder"].named_modules() if isinstance(m, nn.Linear)}
    chosen = {f"unet.{n}": (unet_name(n), unet[n]) for n in rng.sample(sorted(unet), rng.randint(1, 12))}
    if rng.random() < 0.3:
        for n in rng.sample(sorted(text), rng.randint(1, len(text))):
            inner = n.removeprefix("text_model.")
            chosen[f"text_encoder.text_model.{inner}"] = (text_name(inner), text[n])
    alphas = rng.choice(["none", "tensors", "metadata"])
    dora = rng.random() < 0.2
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    whole_alpha = rng.choice([1.0, 4.0, 6.5])
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for full, (name, layer) in chosen.items():
        weight = layer.weight.detach().double()  # type: ignore[operator, union-attr]
        rank = rng.choice([1, 2, 3, 8])
        down = (0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)).to(dtype)
        up = (0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)).to(dtype)
        change = torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())
        if weight.ndim == 4 and max(weight.shape[2:]) > 1 and rng.random() < 0.3:
            # LoCon's middle matrix: up [out, r1], mid [r1, r2, h, w], down [r2, in].
            mid = (0.3 * torch.randn(rank, 2, *weight.shape[2:], generator=generator)).to(dtype)
            down = (0.3 * torch.randn(2, weight.shape[1], 1, 1, generator=generator)).to(dtype)
            tensors[f"{name}.lora_mid.weight"] = mid
            parts = up.double().flatten(1), mid.double(), down.double().flatten(1)
            change = torch.einsum("or,rshw,si->oihw", *parts)
        elif weight.ndim == 2 and rng.random() < 0.1:
            down, up = down[..., None, None], up[..., None, None]  # as if of a convolution of 1 x 1
        tensors[f"{name}.{halves[0]}.weight"], tensors[f"{name}.{halves[1]}.weight"] = down, up
        alpha = float(rank)
        if alphas == "tensors" and rng.random() < 0.8:
            alpha = rng.choice([1.0, 2.0, 0.25 * rank])
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=rng.choice([torch.float32, torch.float16]))
        elif alphas == "metadata":
            alpha = whole_alpha
        change = change * alpha / rank
        if dora and rng.random() < 0.7:
            by_output = rng.random() < 0.5
            value = weight + change
            axis = 0 if by_output else 1
            norms = torch.linalg.vector_norm(value, dim=[i for i in range(value.ndim) if i != axis], keepdim=True)
            magnitude = (norms * (0.5 + torch.rand(norms.shape, generator=generator))).float()
            if by_output and rng.random() < 0.5:
                tensors[f"{name}.lora_magnitude_vector"] = magnitude.flatten()
            else:
                tensors[f"{name}.dora_scale"] = magnitude
            change = magnitude.double() * value / norms - weight
        expected[full] = change
    metadata = {"format": "pt"}
    if alphas == "metadata":
        config = {"r": 4, "lora_alpha": whole_alpha, "alpha_pattern": {}, "rank_pattern": {}}
        both = {f"{part}.{key}": value for part in ("unet", "text_encoder") for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(rng.choice([config, both]))
    order = list(tensors.items())
    rng.shuffle(order)
    tensors = {key: tensor.contiguous() for key, tensor in order}
    if number % 2 == 0:
        return OddLoRA(f"{spelling}, alphas {alphas}, {dtype}", save(tensors, metadata), expected=expected)
    return broken(rng, spelling, tensors, metadata, halves)


def broken(
    rng: Random, spelling: str, tensors: dict[str, Tensor], metadata: dict[str, str], halves: tuple[str, str]
) -> OddLoRA:
    """Break a good file in one way."""
    key = rng.choice([key for key in tensors if key.endswith(f".{halves[0]}.weight")])
    name = key.removesuffix(f".{halves[0]}.weight")
    up = f"{name}.{halves[1]}.weight"
    faults: dict[str, Callable[[], dict[str, Tensor] | bytes | str]] = {
        "half": lambda: without(tensors, rng.choice([key, up])),
        "no pairs": lambda: {f"{name}.alpha": torch.tensor(1.0)},
        "alpha alone": lambda: {**tensors, f"{name}x.alpha": torch.tensor(1.0)},
        "unknown layer": lambda: {**tensors, **renamed(tensors, name, f"{name}_more")},
        "misspelled": lambda: renamed(tensors, name, name[:-1]) | {k: v for k, v in tensors.items() if name not in k},
        "other block": lambda: (
            {k.replace("blocks", "blokcs"): v for k, v in tensors.items()} | {"x.alpha": torch.ones(())}
        ),
        "wide": lambda: {**tensors, key: torch.cat([tensors[key], tensors[key]], 1)},
        "tall": lambda: {**tensors, up: torch.cat([tensors[up], tensors[up]])},
        "ranks differ": lambda: {**tensors, up: torch.cat([tensors[up], tensors[up]], 1)},
        "one dimension": lambda: {**tensors, key: tensors[key].flatten()},
        "no rank": lambda: {**tensors, key: tensors[key][:0], up: tensors[up][:, :0].contiguous()},
        "nan": lambda: {**tensors, key: tensors[key] * float("nan")},
        "infinite": lambda: {**tensors, up: tensors[up].float() * float("inf")},
        "integers": lambda: {**tensors, key: tensors[key].to(torch.int8)},
        "alphas": lambda: {**tensors, f"{name}.alpha": torch.ones(3)},
        "infinite alpha": lambda: {**tensors, f"{name}.alpha": torch.tensor(float("inf"))},
        "twice": lambda: {**tensors, **twice(tensors, name, spelling)},
        "bias": lambda: {**tensors, f"{name}.lora_B.bias": torch.ones(3)},
        "diff": lambda: {**tensors, f"{name}.diff": torch.ones(3)},
        "norm": lambda: {**tensors, "unet.mid_block.resnets.0.norm1.diff": torch.ones(3)},
        "weight": lambda: {**tensors, "unet.conv_in.weight": torch.ones(3)},
        "loha": lambda: {f"{name}.{k}": torch.ones(2, 2) for k in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
        "lokr": lambda: {**tensors, f"{name}.lokr_w1": torch.ones(2, 2)},
        "embedding": lambda: {**tensors, "bundle_emb.cat.string_to_param.*": torch.ones(1, 16)},
        "magnitudes": lambda: {**tensors, f"{name}.dora_scale": torch.ones(1, 999)},
        "second encoder": lambda: {**tensors, **encoder("lora_te2_text_model_encoder_layers_0_mlp_fc1")},
        "t5": lambda: {**tensors, **encoder("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q")},
        "only text": lambda: encoder("text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        "nothing": dict,
        "other model": lambda: {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(1, 4)},
        "metadata list": lambda: "[1]",
        "metadata text": lambda: "{",
        "metadata alpha": lambda: json.dumps({"unet.lora_alpha": "much"}),
        "metadata pattern": lambda: json.dumps({"unet.alpha_pattern": {"to_q": "much"}}),
        "cut": lambda: save(tensors, metadata)[: rng.randint(0, 200)],
        "cut late": lambda: save(tensors, metadata)[:-3],
        "text": lambda: b"<html>not found</html>",
        "pickle": lambda: b"PK\x03\x04",
    }
    fault = rng.choice(list(faults))
    made = faults[fault]()
    suffix = ".bin" if fault == "pickle" else ".safetensors"
    if isinstance(made, str):
        made = save(tensors, {"lora_adapter_metadata": made})
    if isinstance(made, dict):
        made = save({k: v.contiguous() for k, v in made.items()}, metadata)
    return OddLoRA(f"{fault} in {spelling}", made, suffix, refused=True)


def without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k != key}


def renamed(tensors: dict[str, Tensor], name: str, new: str) -> dict[str, Tensor]:
    return {new + k.removeprefix(name): v.clone() for k, v in tensors.items() if k.startswith(f"{name}.")}


def twice(tensors: dict[str, Tensor], name: str, spelling: str) -> dict[str, Tensor]:
    """The layer once more, in another spelling."""
    prefix = next(
        (p for p in ("base_model.model.", "diffusion_model.", "unet.", "lora_unet_") if name.startswith(p)), ""
    )
    other = "transformer." if prefix != "transformer." else "unet."
    if name.startswith(("text_encoder.", "lora_te")):
        plain = name.removeprefix("text_encoder.").removeprefix("lora_te_").removeprefix("lora_te1_")
        return renamed(tensors, name, f"text_encoder.{plain}" if name.startswith("lora") else f"lora_te_{plain}")
    return renamed(tensors, name, other + name.removeprefix(prefix))


def encoder(name: str) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(32, 2)}
