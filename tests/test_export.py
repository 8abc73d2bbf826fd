"""LoRAs for other tools: what these read draws the same pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pipeline
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_merge import draw, drawn_with, saved_lora
from torch import Tensor

from draftune.cli.main import main
from draftune.lora import FILE_NAME, LoRADelta, LoRADeltas, load_lora, read_lora, set_lora_scale
from draftune.models import load_model
from draftune.runs.export import export_lora, write_kohya
from draftune.runs.load import read_deltas
from draftune.settings import Settings

# All that every supported version of diffusers reads back from kohya's names.
LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj"),
)
GRID: dict[str, Any] = {"timestep_spacing": "trailing", "set_alpha_to_one": True}


@pytest.fixture(scope="module")
def run(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: its settings, its last LoRA and its best one, with alpha 5 and rank 3."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    for seed, name in enumerate(("lora", "best")):
        saved_lora(pipeline_folder, folder / name, seed, 3, 5.0, LAYERS)
    settings = Settings(str(pipeline_folder), "brightness", method="draft-k(k=2)", prompts="animals", seed=7, **GRID)
    (folder / "config.yaml").write_text(settings.to_yaml())
    return folder


def tuned(base: Path, lora: Path, scale: float = 1.0) -> Tensor:
    """Base and LoRA on the run's grid."""
    model = load_model(base)
    model.set_grid(**GRID)
    load_lora(model, lora)
    set_lora_scale(model, scale)
    return draw(model)


def test_diffusers_with_the_scale_in_the_weights(
    pipeline_folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lora"
    command = ["export", str(run), "--format", "diffusers", "--output", str(out)]
    assert main([*command, "--lora-scale", "0.6"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(out)
    assert f"pipe.load_lora_weights({str(out)!r})" in printed[1]
    assert "timestep_spacing='trailing', set_alpha_to_one=True" in printed[1]
    drawn = drawn_with(pipeline_folder, (out, 1.0))
    assert (drawn - drawn_with(pipeline_folder, (run, 0.6))).abs().max() < 1e-5
    assert (drawn - drawn_with(pipeline_folder, (run, 1.0))).abs().max() > 1e-2
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("best", [False, True])
def test_kohya(pipeline_folder: Path, run: Path, tmp_path: Path, best: bool) -> None:
    out = export_lora(run, tmp_path / "glossy.safetensors", "kohya", best=best)
    tensors = load_file(out)
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up, alpha = (tensors[f"{key}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert (down.shape, up.shape, alpha.shape, float(alpha)) == ((3, 16), (16, 3), (), 3.0)
    assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape == (3, 16, 3, 3)
    assert all(name.count(".") == (1 if name.endswith("alpha") else 2) for name in tensors)
    with safe_open(out, "pt") as file:
        said = file.metadata()
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_seed"]) == ("3", "3.0", "7")
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "3.0"}
    assert said["ss_training_comment"].startswith("draftune: draft-k(k=2) on brightness, prompts animals")
    assert said["base_model"] == str(pipeline_folder)

    original = drawn_with(pipeline_folder, (run / ("best" if best else "lora"), 1.0))
    model = load_model(pipeline_folder)
    model.pipeline.load_lora_weights(str(out.parent), weight_name=out.name)
    assert (draw(model) - original).abs().max() < 1e-5
    assert (draw(load_model(pipeline_folder)) - original).abs().max() > 1e-2


def through_kohya(unet: torch.nn.Module, folder: Path) -> int:
    """Write a LoRA of every layer, each known by its number, by kohya's names; returns how many come back."""
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    deltas = {}
    for i, (name, layer) in enumerate(layers.items()):
        out, *rest = layer.weight.shape
        ones = [1] * (len(rest) - 1)
        deltas[f"unet.{name}"] = LoRADelta(torch.full((1, *rest), i + 1.0), torch.ones(out, 1, *ones))
    write_kohya(LoRADeltas(deltas, "some/model"), folder / "x", folder / "all.safetensors", torch.float32)
    read = read_lora(folder / "all.safetensors", {"unet": unet}, "some/model").layers
    numbers = {name: float(delta.down.max()) for name, delta in read.items()}
    assert numbers == {f"unet.{name}": i + 1.0 for i, name in enumerate(layers)}
    return len(layers)


def test_kohya_names_of_stable_diffusion_are_read_back(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    assert through_kohya(unet, tmp_path) == 282


def test_kohya_is_read_as_a_source(pipeline_folder: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "glossy.safetensors"
    assert main(["export", str(run), "--format", "kohya", "--output", str(out)]) == 0
    layers, original = read_deltas(out).layers, read_deltas(run).layers
    assert layers.keys() == original.keys()
    for name, layer in layers.items():
        assert torch.allclose(layer.change, original[name].change)
    command = ["--prompt", "cat", "--num-inference-steps", "2", "--cpu"]
    assert main(["sample", str(out), *command, "--output", str(tmp_path / "a.png")]) == 0
    assert main(["sample", str(run / "lora" / FILE_NAME), *command, "--output", str(tmp_path / "b.png")]) == 0
    assert main(["merge", f"{out}@0.5", f"{run}@-0.5", "--output", str(tmp_path / "nothing")]) == 0
    nothing = drawn_with(pipeline_folder, (tmp_path / "nothing", 1.0))
    assert (nothing - drawn_with(pipeline_folder)).abs().max() < 1e-5


def test_half(pipeline_folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(run), "--format", "kohya", "--dtype", "fp16"]
    assert main([*command, "--output", str(tmp_path / "half.safetensors")]) == 0
    tensors = load_file(tmp_path / "half.safetensors")
    assert {t.dtype for name, t in tensors.items() if not name.endswith("alpha")} == {torch.float16}
    halved, original = read_deltas(tmp_path / "half.safetensors").layers, read_deltas(run).layers
    for name, layer in halved.items():
        assert torch.allclose(
            layer.change, original[name].change, rtol=0, atol=1e-3 * original[name].change.abs().max()
        )
    export_lora(run, tmp_path / "merged", "merged", dtype="fp16")
    stored = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert (draw(load_model(tmp_path / "merged")) - tuned(pipeline_folder, run)).abs().max() < 1e-2
    assert main([*command, "--output", str(tmp_path / "big.safetensors"), "--lora-scale", "1e7"]) == 2
    assert "not finite in torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "big.safetensors").exists()


def test_merged(pipeline_folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    assert main(["export", str(run), "--format", "merged", "--output", str(out), "--lora-scale", "0.7"]) == 0
    assert f"DiffusionPipeline.from_pretrained({str(out)!r})" in capsys.readouterr().out
    expected = tuned(pipeline_folder, run, 0.7)
    model = load_model(out)
    assert (draw(model) - expected).abs().max() < 1e-4
    assert (tuned(pipeline_folder, run, 1.0) - expected).abs().max() > 1e-2
    assert not getattr(model.denoiser, "peft_config", {})
    assert not any("lora" in name for name in load_file(out / "unet" / "diffusion_pytorch_model.safetensors"))
    assert str(pipeline_folder) not in "".join(path.read_text() for path in out.rglob("*.json"))
    assert list(tmp_path.iterdir()) == [out]
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["clip_sample"], scheduler["thresholding"]) == (False, False)

    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert {key: pipeline.scheduler.config[key] for key in GRID} == GRID
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        ["cat", "dog"], latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="pt"
    ).images  # fmt: skip
    assert (pictures - expected).abs().max() < 1e-4


def test_merged_of_another_base(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = build_pipeline(tmp_path / "parts")
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, block_out_channels=(8, 24))
    pipeline.save_pretrained(tmp_path / "other")
    command = ["export", str(run), "--format", "merged", "--model", str(tmp_path / "other")]
    assert main([*command, "--output", str(tmp_path / "merged")]) == 2
    assert "which do not fit unet." in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "there.safetensors").write_text("mine")
    new, file = str(tmp_path / "new"), str(tmp_path / "new.safetensors")
    best = str(run / "lora")
    cases = {
        "invalid choice: 'onnx'": [str(run), "--format", "onnx", "--output", new],
        "must be a .safetensors file with --format kohya": [str(run), "--format", "kohya", "--output", new],
        "must be a folder with --format merged": [str(run), "--format", "merged", "--output", file],
        "full' already exists": [str(run), "--format", "merged", "--output", str(tmp_path / "full")],
        "there.safetensors' already exists": [
            *(str(run), "--format", "kohya", "--output", str(tmp_path / "there.safetensors"))
        ],
        "--lora-scale must be finite, not nan": [str(run), "--format", "diffusers", "--output", new, "--lora-scale", "nan"],
        "has no best LoRA": [best, "--format", "diffusers", "--output", new, "--best"],
        "no LoRA at": [str(tmp_path / "full"), "--format", "diffusers", "--output", new],
        "unknown model 'nonsense'": [str(run), "--format", "merged", "--output", new, "--model", "nonsense"],
        "required: --format": [str(run), "--output", new],
    }
    for message, argv in cases.items():
        code = main(["export", *argv])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), (argv, lines)
        assert message in lines[0], (message, lines[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "there.safetensors"]
    assert (tmp_path / "there.safetensors").read_text() == "mine"
