"""LoRAs for ComfyUI and from its neighbors: every name changes the weight that it stands for in the source of the tool.

The changes are compared in the weights of the networks' original code, which diffusers' own converters of single-file
checkpoints translate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from draftune.lora import read_lora
from draftune.lora.comfyui import by_original_name, comfyui_names
from helpers.lora_changes import BLOCKS, close, product, random_lora
from helpers.lora_keys import COMFYUI, ORIGINAL, TOOLS, comfyui_slots, expand_all

CONVERTERS = {
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
    "ChromaTransformer2DModel": "convert_chroma_transformer_checkpoint_to_diffusers",
    "Flux2Transformer2DModel": "convert_flux2_transformer_checkpoint_to_diffusers",
    "SD3Transformer2DModel": "convert_sd3_transformer_checkpoint_to_diffusers",
    "ZImageTransformer2DModel": "convert_z_image_transformer_checkpoint_to_diffusers",
    "Lumina2Transformer2DModel": "convert_lumina2_to_diffusers",
}


class Checkpoint(dict[str, Tensor]):
    """A checkpoint in which the weights that no LoRA changes are 0."""

    def pop(self, key: str, default: Any = None) -> Tensor:
        return super().pop(key) if key in self else torch.zeros(21504, 1)


def to_diffusers(kind: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the rows of original weights to those of diffusers' layers by the converter of diffusers."""
    from diffusers.loaders import single_file_utils

    convert = getattr(single_file_utils, CONVERTERS[kind])
    checkpoint = Checkpoint({f"{name}.weight": rows for name, rows in weights.items()})
    if kind.startswith("Chroma"):  # whose converter counts these layers
        checkpoint.setdefault("distilled_guidance_layer.layers.0.in_layer.weight", torch.zeros(1, 1))
    converted = convert(checkpoint)
    return {name.removesuffix(".weight"): rows for name, rows in converted.items() if rows.abs().max() > 0}


def in_comfyui(tensors: Mapping[str, Tensor], transformer: nn.Module, hidden: int) -> dict[str, Tensor]:
    """Return the products of the weight changes that ComfyUI makes of a file; fails at a name that it does not know."""
    slots = comfyui_slots(transformer, hidden)
    pieces: dict[str, dict[int, Tensor]] = {}
    for key in tensors:
        name, _, end = key.rpartition(".lora_")
        assert end in ("A.weight", "B.weight")  # no alpha: ComfyUI takes 1 for alpha / rank
        if end == "B.weight":
            slot = slots[name]
            change = product(tensors[f"{name}.lora_A.weight"], tensors[key])
            assert slot.rows in (None, len(change))
            assert slot.first not in pieces.setdefault(slot.weight, {})
            pieces[slot.weight][slot.first] = torch.cat(change.chunk(2)[::-1]) if slot.swapped else change
    changes = {}
    for weight, rows in pieces.items():
        whole = torch.zeros(max(first + len(change) for first, change in rows.items()), 1)
        for first, change in rows.items():
            whole[first : first + len(change)] = change
        changes[weight] = whole
    return changes


@pytest.mark.parametrize(("kind", "layers"), [*((kind, ".+") for kind in CONVERTERS), *BLOCKS.items()])
def test_comfyui_changes_the_same_weights(kind: str, layers: str) -> None:
    transformer, hidden, lora = random_lora(kind, layers)
    tensors = comfyui_names(lora, {"transformer": transformer}).factors()
    changes = to_diffusers(kind, in_comfyui(tensors, transformer, hidden))
    close(changes, {name: product(d.down, d.up) for name, d in lora.of_part("transformer").items()})


@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "PixArtTransformer2DModel"])
def test_comfyui_changes_the_rows_of_its_own_table(kind: str) -> None:
    """diffusers has no converter for these; Qwen-Image has the same names everywhere."""
    transformer, hidden, lora = random_lora(kind)
    tensors = comfyui_names(lora, {"transformer": transformer}).factors()
    changes = in_comfyui(tensors, transformer, hidden)
    assert changes.keys() == set(expand_all(ORIGINAL[kind]))
    deltas = lora.of_part("transformer")
    if kind.startswith("Qwen"):
        close(changes, {name: product(d.down, d.up) for name, d in deltas.items()})
    else:
        block = "transformer_blocks.1"
        parts = [deltas[f"{block}.attn1.to_{name}"] for name in "qkv"]
        assert torch.equal(changes["blocks.1.attn.qkv"], torch.cat([product(d.down, d.up) for d in parts]))
        parts = [deltas[f"{block}.attn2.to_{name}"] for name in "kv"]
        assert torch.equal(changes["blocks.1.cross_attn.kv_linear"], torch.cat([product(d.down, d.up) for d in parts]))


ATTENTION = r"transformer_blocks\.0\.attn\.(to_q|to_v|to_out\.0|add_k_proj)"


@pytest.mark.parametrize(
    ("kind", "layers", "prefix"),
    [
        ("Flux2Transformer2DModel", rf"{ATTENTION}|single_transformer_blocks\.1\.attn\.to_out", "transformer."),
        ("Flux2Transformer2DModel", rf"{ATTENTION}|single_stream_modulation\.linear", "diffusion_model."),
        ("ChromaTransformer2DModel", ATTENTION, "transformer."),
        ("ChromaTransformer2DModel", rf"{ATTENTION}|distilled_guidance_layer\.in_proj", "diffusion_model."),
        ("Lumina2Transformer2DModel", r"layers\.0\.attn\.to_q|layers\.1\.attn\.to_v", "diffusion_model."),
    ],
)
def test_some_layers(kind: str, layers: str, prefix: str, tmp_path: Path) -> None:
    """A file has one sort of names. Of a fused weight, the rows of a layer without a LoRA do not change."""
    transformer, hidden, lora = random_lora(kind, layers)
    tensors = comfyui_names(lora, {"transformer": transformer}).factors()
    assert all(key.startswith(prefix) for key in tensors)
    assert in_comfyui(tensors, transformer, hidden)
    save_file(tensors, tmp_path / "lora.safetensors")
    read = read_lora(tmp_path / "lora.safetensors", {"transformer": transformer}, "some/model").layers
    for name, delta in read.items():
        known = lora.layers.get(name)
        change = product(delta.down, delta.up)
        expected = product(known.down, known.up) if known else torch.zeros(len(change), 1)
        assert (change - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert lora.layers.keys() <= read.keys()


@pytest.mark.parametrize("kind", COMFYUI)
def test_an_export_is_read_back(kind: str, tmp_path: Path) -> None:
    transformer, _, lora = random_lora(kind)
    save_file(comfyui_names(lora, {"transformer": transformer}).factors(), tmp_path / "lora.safetensors")
    read = read_lora(tmp_path / "lora.safetensors", {"transformer": transformer}, "some/model")
    products = [{name: product(d.down, d.up) for name, d in both.layers.items()} for both in (read, lora)]
    close(*products)


@pytest.mark.parametrize(("tool", "kind"), TOOLS)
def test_files_of_other_tools(tool: str, kind: str, tmp_path: Path) -> None:
    """Every layer of the list is read, with the rows of fused layers where diffusers' converter has them."""
    transformer, _, lora = random_lora(kind)
    prefix, patterns = TOOLS[tool, kind]
    # The sizes of the original layers are those of the export; the names are those of the list.
    sizes = {name: (d.down, d.up) for name, d in lora.of_part("transformer").items()}
    if kind in CONVERTERS:
        changes = by_original_name(lora.of_part("transformer"), transformer)
        sizes |= {name: (delta.down, delta.up) for name, delta in changes.items()}
    names = [name for name in expand_all(patterns) if name in sizes]
    # Missing are only layers that the last block of SD3, or one of two blocks, does not have.
    assert len(names) >= 0.75 * len(expand_all(patterns))
    tensors, weights = {}, {}
    for name in names:
        down, up = (torch.randn(3, *sizes[name][0].shape[1:]), torch.randn(len(sizes[name][1]), 3))
        up = up.reshape(*up.shape, *[1] * (down.ndim - 2))
        weights[name] = 0.5 * product(down, up)
        key = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
        ends = ("lora_down", "lora_up") if prefix == "lora_unet_" else ("lora_A", "lora_B")
        tensors |= {f"{key}.{end}.weight": t for end, t in zip(ends, (down, up), strict=True)}
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "lora.safetensors")
    read = read_lora(tmp_path / "lora.safetensors", {"transformer": transformer}, "some/model").of_part("transformer")
    expected = weights if weights.keys() <= lora.of_part("transformer").keys() else to_diffusers(kind, weights)
    close({name: product(d.down, d.up) for name, d in read.items()}, expected)
