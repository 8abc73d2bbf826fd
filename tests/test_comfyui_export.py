"""LoRAs exported for ComfyUI by the command line, read by diffusers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_dit import build as build_dit
from test_flow import save_flux
from test_lora_files import same_as_diffusers
from test_sana import save_sana
from test_z_image import TURBO
from test_z_image import build as build_z_image

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.lora import read_lora, save_lora
from draftune.lora.comfyui import comfyui_names
from draftune.lora.names import adaptable_layers, layer_weight
from draftune.models import load_model
from draftune.runs.export import export_lora
from draftune.runs.load import read_deltas
from helpers.errors import mentions, raises
from helpers.lora_changes import BLOCKS, close, product, random_lora
from helpers.lora_keys import UNET, UNET_XL, comfyui_slots, expand_all
from helpers.pipelines import add_random_lora

MIXINS = {
    "FluxTransformer2DModel": ("Flux", ".+"),
    "ChromaTransformer2DModel": ("Flux", BLOCKS["ChromaTransformer2DModel"]),
    "Flux2Transformer2DModel": ("Flux2", ".+"),
    "SD3Transformer2DModel": ("SD3", ".+"),
    "ZImageTransformer2DModel": ("ZImage", ".+"),
    "Lumina2Transformer2DModel": ("Lumina2", BLOCKS["Lumina2Transformer2DModel"]),
    "QwenImageTransformer2DModel": ("QwenImage", ".+"),
}


@pytest.mark.parametrize("kind", MIXINS)
def test_diffusers_reads_the_same_changes(kind: str) -> None:
    from diffusers.loaders import lora_pipeline

    name, layers = MIXINS[kind]
    transformer, _, lora = random_lora(kind, layers)
    tensors = comfyui_names(lora, {"transformer": transformer}).factors()
    read = getattr(lora_pipeline, f"{name}LoraLoaderMixin").lora_state_dict(dict(tensors))
    ends = ("lora_A.weight", "lora_B.weight")
    names = {key.rpartition(".lora_")[0] for key in read}
    changes = {name: product(*(read[f"{name}.{end}"] for end in ends)) for name in names}
    expected = {name: product(d.down, d.up) for name, d in lora.layers.items()}
    if kind.startswith("Flux2"):  # whose reader does not swap scale and shift of the last normalization
        for both in (changes, expected):
            del both["transformer.norm_out.linear"]
    close(changes, expected)


def test_flux_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA of kohya's trainer becomes one for ComfyUI, which diffusers reads too, with both text encoders."""
    folder = save_flux(tmp_path, True)
    networks = load_model(folder).lora_networks
    torch.manual_seed(0)
    tensors = {}
    for part, prefix, ends in (
        ("transformer", "lora_transformer", ("attn.to_q", "attn.to_v", "ff.net.2", "proj_out", "norm_out.linear")),
        ("text_encoder", "lora_te1", ("q_proj", "out_proj", "fc1")),
        ("text_encoder_2", "lora_te3", ("SelfAttention.q", "wi_0")),
    ):
        for name, layer in adaptable_layers(networks[part]):
            if name.endswith(ends):
                own = f"text_model.{name.removeprefix('text_model.')}" if part == "text_encoder" else name
                key = f"{prefix}_{own.replace('.', '_')}"
                out, size = layer_weight(layer).shape
                tensors[f"{key}.lora_down.weight"] = 0.2 * torch.randn(3, size)
                tensors[f"{key}.lora_up.weight"] = 0.2 * torch.randn(out, 3)
                tensors[f"{key}.alpha"] = torch.tensor(6.0)
    source, out_file = tmp_path / "kohya.safetensors", tmp_path / "comfyui.safetensors"
    save_file(tensors, source)
    command = ["export", str(source), "--model", str(folder), "--format"]
    assert main([*command, "comfyui", "--lora-scale", "0.5", "--output", str(out_file)]) == 0
    assert "models/loras" in capsys.readouterr().out
    exported = load_file(out_file)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in exported
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_A.weight" in exported
    slots = comfyui_slots(networks["transformer"], 16)
    assert {key.rpartition(".lora_")[0] for key in exported if key.startswith("transformer.")} <= slots.keys()
    read, original = read_deltas(out_file, str(folder)).layers, read_deltas(source, str(folder)).layers
    assert read.keys() == original.keys()
    for name, delta in read.items():
        assert torch.allclose(delta.change, 0.5 * original[name].change, atol=1e-6), name
    # diffusers has no reader for T5.
    without = {key: tensor for key, tensor in exported.items() if not key.startswith("lora_te3")}
    save_file(without, tmp_path / "without.safetensors")
    same_as_diffusers(folder, tmp_path / "without.safetensors")
    assert main([*command, "kohya", "--output", str(tmp_path / "k.safetensors")]) == 2
    assert mentions(capsys.readouterr().err, "--format kohya comfyui")
    assert main([*command, "comfyui", "--output", str(tmp_path / "folder")]) == 2
    assert mentions(capsys.readouterr().err, "--output --format comfyui")


def test_of_a_unet_it_is_that_of_kohya(pipeline_folder: Path, tmp_path: Path) -> None:
    model = load_model(pipeline_folder)
    add_random_lora(model)
    save_lora(model, tmp_path / "lora")
    for kind in ("comfyui", "kohya"):
        export_lora(tmp_path / "lora", tmp_path / kind / "lora.safetensors", kind, model=str(pipeline_folder))
    files = [(tmp_path / kind / "lora.safetensors").read_bytes() for kind in ("comfyui", "kohya")]
    assert files[0] == files[1]


def test_comfyui_knows_all_layers_of_the_published_unets() -> None:
    from accelerate import init_empty_weights

    xl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    for config, names in (({"cross_attention_dim": 768}, UNET), (xl, UNET_XL)):
        with init_empty_weights():
            unet = UNet2DConditionModel(**config)
        assert {name for name, _ in adaptable_layers(unet)} <= set(expand_all(names, 10))


@pytest.mark.parametrize("build", [save_sana, build_dit])
def test_networks_without_a_loader(build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build(tmp_path)
    model = load_model(folder)
    add_random_lora(model)
    save_lora(model, tmp_path / "lora")
    command = ["export", str(tmp_path / "lora"), "--model", str(folder), "--format"]
    capsys.readouterr()
    for kind in ("comfyui", "kohya"):
        assert main([*command, kind, "--output", str(tmp_path / "lora.safetensors")]) == 2
        error = capsys.readouterr().err.strip()
        assert mentions(error, f"--format {kind} diffusers merged {type(model.denoiser).__name__}")
        assert "\n" not in error
    assert not (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize(("key", "kind"), [("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"), ("diff", "whole weights")])
def test_other_adapters_are_named(key: str, kind: str, tmp_path: Path) -> None:
    transformer, _, lora = random_lora("QwenImageTransformer2DModel", "img_in")
    for more in ({}, lora.factors()):
        save_file(more | {f"diffusion_model.txt_in.{key}": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
        with raises(DraftuneError, kind):
            read_lora(tmp_path / "lora.safetensors", {"transformer": transformer}, "some/model")


def test_a_layer_that_comfyui_has_no_name_for() -> None:
    transformer, _, lora = random_lora("Flux2Transformer2DModel", "x_embedder")
    lora.layers["transformer.other"] = lora.layers["transformer.x_embedder"]
    with raises(DraftuneError, "--format comfyui other"):
        comfyui_names(lora, {"transformer": transformer})
    del lora.layers["transformer.other"]
    lora.layers["text_encoder.layers.0.mlp.up_proj"] = lora.layers["transformer.x_embedder"]
    with raises(DraftuneError, "--skip-text-encoder-lora text_encoder.layers.0.mlp.up_proj"):
        comfyui_names(lora, {"transformer": transformer})


def test_training_starts_from_a_fused_lora(tmp_path: Path) -> None:
    folder = build_z_image(tmp_path, TURBO)
    model = load_model(folder)
    torch.manual_seed(0)
    layer = "diffusion_model.layers.0.attention.qkv"
    width = model.denoiser.config.dim
    halves = {f"{layer}.lora_A.weight": torch.randn(2, width), f"{layer}.lora_B.weight": torch.randn(3 * width, 2)}
    source, run = tmp_path / "comfyui.safetensors", tmp_path / "run"
    save_file(halves, source)
    arguments = ["train", "--model", str(folder), "--reward", "brightness", "--prompts", "animals", "--steps", "1"]
    arguments += ["--method", "draft_k(k=1)", "--batch-size", "1", "--num-log-prompts", "1", "--device", "cpu"]
    arguments += ["--num-inference-steps", "2", "--height", "32", "--width", "32", "--guidance-scale", "1"]
    more = ["--learning-rate", "1e-9", "--init-lora", str(source), "--output", str(run)]
    assert main([*arguments, *more]) == 0
    whole = next(iter(halves.values())), list(halves.values())[1]
    parts = [read_deltas(run).layers[f"transformer.layers.0.attention.to_{name}"].change for name in "qkv"]
    assert (torch.cat(parts) - whole[1] @ whole[0]).abs().max() < 1e-5
