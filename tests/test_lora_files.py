"""LoRA files of any tool: what the one reader makes of them, against the weights by hand and against diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import test_sdxl
import torch
from safetensors.torch import load_file, save_file
from test_flow import save_flux
from torch import Tensor, nn

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.lora import FILE_NAME, lora_file, read_lora, save_lora, set_lora_scale, set_lora_scales
from draftune.lora.adapter import attach_lora, load_lora
from draftune.models import DiffusionModel, load_model
from draftune.models.layout import load_layout
from draftune.runs.load import read_deltas, resolve_lora
from draftune.utils.tensors import save_tensors
from helpers.errors import mentions, raises
from helpers.odd_loras import KOHYA, SPELLINGS, encoder, kohya, odd_lora

CASES = 120
PROMPT = ["--prompt", "cat", "--num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(pipeline_folder: Path) -> DiffusionModel:
    return load_model(pipeline_folder)


def draw(model: DiffusionModel) -> Tensor:
    return model.sample_tensors(["cat", "dog"], [3, 4], model.schedule(2), 2.0)


@pytest.mark.parametrize("number", range(CASES))
def test_odd_files(number: int, model: DiffusionModel, tmp_path: Path) -> None:
    """Every file changes each layer as its tensors say, or is refused; it never raises anything else."""
    case = odd_lora(number, model.lora_networks)
    path = case.write(tmp_path)
    if case.refused:
        with pytest.raises(DraftuneError) as error:
            read_lora(path, model.lora_networks, model.name)
        assert "\n" not in str(error.value)
        return
    read = read_lora(path, model.lora_networks, model.name).layers
    assert read.keys() == case.expected.keys()
    for name, change in case.expected.items():
        assert (read[name].change.double() - change).abs().max() < 1e-5 * (1 + change.abs().max()), case.name


def pairs(network: nn.Module, rank: int = 2, ends: tuple[str, ...] = ("",)) -> dict[str, tuple[Tensor, Tensor]]:
    """Random halves for the network's layers."""
    # Of a text encoder diffusers reads the names of its queries in this format only where its outputs are there too.
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.endswith(ends):
            weight = layer.weight
            down = 0.2 * torch.randn(rank, *weight.shape[1:], generator=generator)
            found[name] = down, 0.2 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
    return found


def write(path: Path, halves: dict[str, tuple[Tensor, Tensor]], names: tuple[str, str], **more: Tensor) -> Path:
    tensors = {f"{n}.{half}.weight": t for n, both in halves.items() for half, t in zip(names, both, strict=True)}
    save_file({key: tensor.contiguous() for key, tensor in (tensors | more).items()}, path)
    return path


def same_as_diffusers(folder: Path, lora: Path) -> None:
    """The images are those of diffusers' own reader, and not those of the base model; strength 0 is the base."""
    ours, theirs = load_model(folder), load_model(folder)
    for model in (ours, theirs):
        model.set_size(16, 16)
    plain = draw(ours)
    load_lora(ours, lora)
    drawn = draw(ours)
    theirs.pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    assert (drawn - draw(theirs)).abs().max() < 1e-5
    assert (drawn - plain).abs().max() > 1e-3
    set_lora_scale(ours, 0.0)
    assert torch.equal(draw(ours), plain)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")


@pytest.mark.parametrize("spelling", ["diffusers", "diffusers-old", "kohya"])
@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "with-text-encoder"])
def test_stable_diffusion(
    spelling: str, text: bool, model: DiffusionModel, pipeline_folder: Path, tmp_path: Path
) -> None:
    unet_name, text_name, names = SPELLINGS[spelling]
    halves = {unet_name(name): both for name, both in pairs(model.denoiser, 2, ATTENTION).items()}
    other = 2 if version("diffusers").startswith("0.35.") else 3  # 0.35 applies a wrong scale where ranks differ
    halves |= {unet_name(name): both for name, both in pairs(model.denoiser, other, ("attn2.to_k", "conv1")).items()}
    path = write(tmp_path / "lora.safetensors", halves, names)
    if text:
        inner = pairs(model.pipeline.text_encoder, 2, ("q_proj", "out_proj", "fc1"))
        both_names = ("lora_linear_layer.down", "lora_linear_layer.up") if spelling == "diffusers-old" else names
        encoders = {text_name(name.removeprefix("text_model.")): both for name, both in inner.items()}
        text_tensors = load_file(write(tmp_path / "text.safetensors", encoders, both_names))
        save_file(load_file(path) | text_tensors, path)
    same_as_diffusers(pipeline_folder, path)


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_stable_diffusion_xl_of_kohya(spelling: str, tmp_path: Path) -> None:
    """kohya's trainer uses the UNet of the original code, whose blocks are numbered otherwise."""
    folder = tmp_path / "model"
    test_sdxl.build_pipeline(tmp_path / "parts").save_pretrained(folder)
    networks = load_model(folder).lora_networks
    original = {
        "down_blocks.1.attentions.0": "input_blocks.4.1",
        "down_blocks.1.attentions.1": "input_blocks.5.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.attentions.2": "output_blocks.2.1",
    }
    halves = {}
    for name, both in pairs(networks["unet"], 4, (*ATTENTION, "proj_in", "ff.net.0.proj")).items():
        block = next(b for b in original if name.startswith(b))
        halves[kohya(name.replace(block, original[block]) if spelling == "original" else name)] = both
    for part, number in (("text_encoder", 1), ("text_encoder_2", 2)):
        for name, both in pairs(networks[part], 2, ("q_proj", "out_proj", "fc2")).items():
            inner = name.removeprefix("text_model.").replace(".", "_")
            halves[f"lora_te{number}_text_model_{inner}"] = both
    alphas = {f"{name}.alpha": torch.tensor(1.0) for name in halves}
    same_as_diffusers(folder, write(tmp_path / "lora.safetensors", halves, KOHYA, **alphas))
    # Exported by kohya's names again, both text encoders are numbered as he numbers them.
    out = tmp_path / "again.safetensors"
    arguments = ["export", str(tmp_path / "lora.safetensors"), "--model", str(folder), "--format", "kohya"]
    assert main([*arguments, "--output", str(out)]) == 0
    again = {key.partition(".")[0] for key in load_file(out)}
    assert {key for key in again if "_te" in key} == {key for key in halves if "_te" in key}
    same_as_diffusers(folder, out)


FUSED = {
    "double_blocks_0_img_attn_qkv": (16, 48),
    "double_blocks_0_img_attn_proj": (16, 16),
    "double_blocks_0_txt_attn_qkv": (16, 48),
    "double_blocks_0_txt_attn_proj": (16, 16),
    "double_blocks_0_img_mlp_0": (16, 64),
    "double_blocks_0_img_mlp_2": (64, 16),
    "double_blocks_0_txt_mlp_0": (16, 64),
    "double_blocks_0_img_mod_lin": (16, 96),
    "double_blocks_0_txt_mod_lin": (16, 96),
    "single_blocks_0_linear2": (80, 16),
    "single_blocks_0_modulation_lin": (16, 48),
}


def flux_halves(names: dict[str, tuple[int, int]], prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {
        prefix + name: (0.3 * torch.randn(4, size, generator=generator), 0.3 * torch.randn(out, 4, generator=generator))
        for name, (size, out) in names.items()
    }


def test_flux_of_kohya(tmp_path: Path) -> None:
    """Queries, keys and values are one layer there, three in diffusers."""
    folder = save_flux(tmp_path, True)
    halves = flux_halves(FUSED, "lora_unet_")
    alphas = {f"{name}.alpha": torch.tensor(2.0) for name in halves}
    path = write(tmp_path / "lora.safetensors", halves, KOHYA, **alphas)
    same_as_diffusers(folder, path)
    # diffusers knows the sizes of the published model's single blocks alone; the rows are those of the weights.
    more = flux_halves({"single_blocks_0_linear1": (16, 112)}, "lora_unet_")
    read = read_lora(write(tmp_path / "single.safetensors", more, KOHYA), load_layout(str(folder)), "flux").layers
    whole = next(up @ down for down, up in more.values())
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    parts = [read[f"transformer.single_transformer_blocks.0.{name}"].change for name in names]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    # Scale and shift of the last normalization are swapped.
    last = flux_halves({"final_layer_adaLN_modulation_1": (16, 32)}, "lora_unet_")
    read = read_lora(write(tmp_path / "last.safetensors", last, KOHYA), load_layout(str(folder)), "flux").layers
    whole = next(up @ down for down, up in last.values())
    assert torch.allclose(read["transformer.norm_out.linear"].change, torch.cat([whole[16:], whole[:16]]), atol=1e-6)


def test_flux_of_ai_toolkit_and_xlabs(tmp_path: Path) -> None:
    folder = save_flux(tmp_path, True)
    own = pairs(load_model(folder).denoiser, 3, ("attn.to_q", "add_k_proj", "proj_mlp", "norm1.linear"))
    path = write(
        tmp_path / "a.safetensors", {f"transformer.{n}": both for n, both in own.items()}, ("lora_A", "lora_B")
    )
    same_as_diffusers(folder, path)
    sizes = {"qkv_lora1": (16, 48), "qkv_lora2": (16, 48), "proj_lora1": (16, 16), "proj_lora2": (16, 16)}
    xlabs = flux_halves(sizes, "double_blocks.0.processor.")
    same_as_diffusers(folder, write(tmp_path / "x.safetensors", xlabs, ("down", "up")))


def test_a_file_of_another_family_is_refused_before_anything_is_written(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path / "flux.safetensors", flux_halves(FUSED, "lora_unet_"), KOHYA))
    for command in (
        ["sample", path, *PROMPT, "--output", str(tmp_path / "out.png")],
        ["merge", path, "--output", str(tmp_path / "out")],
        ["export", path, "--format", "diffusers", "--output", str(tmp_path / "out")],
        ["train", "--init-lora", path, "--reward", "brightness", "--prompts", "animals", "--steps", "1"],
    ):
        if command[0] == "train":
            command += ["--output", str(tmp_path / "out"), "--num-inference-steps", "2"]
        capsys.readouterr()
        assert main([*command, "--model", str(pipeline_folder)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draftune: ")]
        assert len(lines) == 1
        assert mentions(lines[0], "lora_unet_double_blocks_0")
    assert [file.name for file in tmp_path.iterdir()] == ["flux.safetensors"]


def peft_dora(model: DiffusionModel, path: Path) -> Path:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"], use_dora=True, init_lora_weights=False)
    model.denoiser.add_adapter(config, "default")
    with torch.no_grad():
        for name, parameter in model.denoiser.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.5)
    tensors = get_peft_model_state_dict(model.denoiser, adapter_name="default")
    save_file({f"base_model.model.{key}": t.detach().contiguous() for key, t in tensors.items()}, path)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["to_q", "conv1"]}
    path.with_name("adapter_config.json").write_text(json.dumps(said))
    return path


def test_dora(pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It draws what peft draws, is the base model at strength 0, and half of it is half of the way."""
    theirs, ours = load_model(pipeline_folder), load_model(pipeline_folder)
    (tmp_path / "dora").mkdir()
    path = peft_dora(theirs, tmp_path / "dora" / "adapter_model.safetensors")
    plain = draw(ours)
    deltas = load_lora(ours, tmp_path / "dora")
    drawn = draw(ours)
    assert (drawn - draw(theirs)).abs().max() < 1e-5
    assert (drawn - plain).abs().max() > 1e-2
    set_lora_scale(ours, 0.0)
    assert torch.equal(draw(ours), plain)
    set_lora_scale(ours, 0.5)
    half = load_model(pipeline_folder)
    with torch.no_grad():
        for name, delta in deltas.of_part("unet").items():
            half.denoiser.get_submodule(name).weight.add_(0.5 * delta.change)
    assert (draw(ours) - draw(half)).abs().max() < 1e-5
    # A merged model holds it; a LoRA file can't.
    base = ["--model", str(pipeline_folder)]
    assert main(["export", str(path), *base, "--format", "merged", "--output", str(tmp_path / "merged")]) == 0
    assert (draw(load_model(tmp_path / "merged")) - drawn).abs().max() < 1e-4
    for command in (["merge", str(path), "--output"], ["export", str(path), "--format", "kohya", "--output"]):
        capsys.readouterr()
        assert main([*command, str(tmp_path / "out.safetensors"), *base]) == 2
        assert mentions(capsys.readouterr().err, "--format merged")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture
def with_text(model: DiffusionModel, tmp_path: Path) -> Path:
    halves = {kohya(name): both for name, both in pairs(model.denoiser, 2, ("to_q",)).items()}
    text = pairs(model.pipeline.text_encoder, 2, ("q_proj", "out_proj"))
    halves |= {f"lora_te_text_model_{n.removeprefix('text_model.').replace('.', '_')}": b for n, b in text.items()}
    return write(tmp_path / "text.safetensors", halves, KOHYA)


def test_text_encoders(with_text: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    """Layers of a text encoder are drawn with, mixed, merged, trained on, or left out where the user says so."""
    base, skip = ["--model", str(pipeline_folder)], ["--skip-text-encoder-lora"]
    model = load_model(pipeline_folder)
    whole = load_lora(model, with_text)
    expected = draw(model)
    assert whole.parts == ["unet", "text_encoder"]
    denoiser_alone = load_model(pipeline_folder)
    load_lora(denoiser_alone, with_text, skip_text_encoder=True)
    assert (draw(denoiser_alone) - expected).abs().max() > 1e-3

    def loaded(path: Path) -> Tensor:
        model = load_model(pipeline_folder)
        load_lora(model, path)
        return draw(model)

    assert main(["merge", str(with_text), "--output", str(tmp_path / "mixed"), *base]) == 0
    assert (loaded(tmp_path / "mixed") - expected).abs().max() < 1e-5
    same_as_diffusers(pipeline_folder, tmp_path / "mixed" / FILE_NAME)
    assert main(["merge", str(with_text), "--output", str(tmp_path / "less"), *base, *skip]) == 0
    assert (loaded(tmp_path / "less") - draw(denoiser_alone)).abs().max() < 1e-5
    assert main(["export", str(with_text), "--format", "merged", "--output", str(tmp_path / "merged"), *base]) == 0
    assert (draw(load_model(tmp_path / "merged")) - expected).abs().max() < 1e-4
    run = tmp_path / "run"
    arguments = ["train", *base, "--reward", "brightness", "--prompts", "animals", "--steps", "1", "--batch-size", "1"]
    arguments += ["--method", "draft_k(k=1)", "--num-inference-steps", "2", "--num-log-prompts", "1", "--device", "cpu"]
    more = ["--learning-rate", "1e-9", "--init-lora", str(with_text), "--output", str(run)]
    assert main([*arguments, *more]) == 0
    assert read_deltas(run).parts == ["unet", "text_encoder"]
    assert (loaded(run) - expected).abs().max() < 1e-4


def test_files_and_folders(model: DiffusionModel, tmp_path: Path) -> None:
    halves = {f"unet.{name}": both for name, both in pairs(model.denoiser, 2, ("to_q",)).items()}
    folder = tmp_path / "lora"
    folder.mkdir()
    alone = write(folder / "style.safetensors", halves, ("lora_A", "lora_B"))
    assert lora_file(folder) == alone
    write(folder / "other.safetensors", halves, ("lora_A", "lora_B"))
    with raises(DraftuneError, "2 .safetensors"):
        lora_file(folder)
    peft = write(folder / "adapter_model.safetensors", halves, ("lora_A", "lora_B"))
    assert lora_file(folder) == peft
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_lora_weights.bin").write_bytes(b"")
    with raises(DraftuneError, "pytorch_lora_weights.bin pickle safetensors"):
        lora_file(tmp_path / "pickled")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2}))
    with raises(DraftuneError, "LOHA"):
        read_lora(folder, model.lora_networks, model.name)


def test_equal_loras_are_equal_files(pipeline_folder: Path, tmp_path: Path) -> None:
    """The library writes metadata in a random order."""
    from helpers.pipelines import add_random_lora

    metadata = {f"key {i}": "é" * i for i in range(20)}
    for name in ("a", "b"):
        model = load_model(pipeline_folder)
        add_random_lora(model)
        save_lora(model, tmp_path / name)
        save_tensors(tmp_path / f"{name}.safetensors", {"x": torch.arange(3)}, metadata)
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    from safetensors import safe_open

    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("x"), torch.arange(3))


def test_a_loaded_lora_is_saved_as_it_is(pipeline_folder: Path, with_text: Path, tmp_path: Path) -> None:
    """Layers of different ranks and of a text encoder too, whose strengths one rank for all would change."""
    model = load_model(pipeline_folder)
    more = {f"unet.{name}": both for name, both in pairs(model.denoiser, 5, ("to_v",)).items()}
    other = load_file(write(tmp_path / "more.safetensors", more, ("lora_A", "lora_B")))
    save_file(load_file(with_text) | other, with_text)
    whole = load_lora(model, with_text).layers
    set_lora_scale(model, 0.3)
    save_lora(model, tmp_path / "saved")
    again = read_deltas(tmp_path / "saved", str(pipeline_folder)).layers
    assert again.keys() == whole.keys()
    assert all(torch.allclose(again[name].change, delta.change, atol=1e-6) for name, delta in whole.items())
    with raises(DraftuneError, "LoRA 'default'"):
        load_lora(model, with_text)


def test_magnitudes_of_swapped_rows_are_swapped_too(tmp_path: Path) -> None:
    """A DoRA of magnitudes as they are changes nothing where up · down is 0."""
    networks = load_model(save_flux(tmp_path, True)).lora_networks
    weight = networks["transformer"].norm_out.linear.weight.detach()
    own = torch.cat([weight[16:], weight[:16]]).norm(dim=1, keepdim=True)
    name = "lora_unet_final_layer_adaLN_modulation_1"
    halves = {name: (torch.ones(1, 16), torch.zeros(32, 1))}
    path = write(tmp_path / "dora.safetensors", halves, KOHYA, **{f"{name}.dora_scale": own})
    assert read_lora(path, networks, "flux").layers["transformer.norm_out.linear"].change.abs().max() < 1e-6


def test_a_dora_of_a_row_of_zeros_stays_finite(pipeline_folder: Path, tmp_path: Path) -> None:
    networks = load_model(pipeline_folder).lora_networks
    weight = networks["unet"].conv_in.weight
    with torch.no_grad():
        weight[0] = 0
    out, size = len(weight), weight.shape[1]
    halves = {"unet.conv_in": (torch.zeros(1, size, 3, 3), torch.zeros(out, 1, 1, 1))}
    more = {"unet.conv_in.dora_scale": torch.ones(out, 1, 1, 1)}
    path = write(tmp_path / "dora.safetensors", halves, ("lora_A", "lora_B"), **more)
    change = read_lora(path, networks, "tiny").layers["unet.conv_in"].change
    assert change.isfinite().all()
    assert (change[0] == 0).all()


@pytest.mark.parametrize("wrapper", ["", "base_model.model.", "lycoris_"])
def test_wrapped_text_encoders_are_skipped_too(model: DiffusionModel, tmp_path: Path, wrapper: str) -> None:
    text = encoder(f"{wrapper}text_encoder.text_model.encoder.layers.0.mlp.fc1")
    halves = {f"unet.{name}": both for name, both in pairs(model.denoiser, 2, ("to_q",)).items()}
    path = write(tmp_path / "lora.safetensors", halves, KOHYA, **text)
    assert read_lora(path, model.lora_networks, "tiny").parts == ["unet", "text_encoder"]
    assert read_lora(path, model.lora_networks, "tiny", skip_text_encoder=True).parts == ["unet"]
    # Names of text encoders that are not known are left out too.
    path = write(tmp_path / "other.safetensors", halves, KOHYA, **encoder("clip_l.transformer.text_model.x.fc1"))
    assert read_lora(path, model.lora_networks, "tiny", skip_text_encoder=True).parts == ["unet"]


def test_loaded_loras_stay_frozen_and_are_known_by_name(pipeline_folder: Path, with_text: Path) -> None:
    model = load_model(pipeline_folder)
    for name in ("a", "b"):
        load_lora(model, with_text, name)
    set_lora_scales(model, {"a": 0.5, "b": 1.0})
    networks = model.lora_networks.values()
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())
    with raises(DraftuneError, "LoRA 'c'"):
        set_lora_scales(model, {"a": 1.0, "c": 1.0})


def test_a_folder_of_another_tools_run(with_text: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    """A config.yaml beside a folder lora/ is not always that of a run of draftune."""
    folder = tmp_path / "project" / "lora"
    folder.mkdir(parents=True)
    with_text.rename(folder / "style.safetensors")
    (folder.parent / "config.yaml").write_text("job: extension\n")
    assert not resolve_lora(str(folder / "style.safetensors"), str(pipeline_folder)).in_run


def test_attaching_draws_no_random_numbers(pipeline_folder: Path, with_text: Path) -> None:
    model = load_model(pipeline_folder)
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    attach_lora(model, read_lora(with_text, model.lora_networks, model.name))
    assert torch.equal(torch.rand(1), wanted)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.denoiser.parameters())


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (encoder("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "--skip-text-encoder-lora"),
        ({"unet.conv_in.lora_B.bias": torch.ones(8)}, "unet.conv_in.lora_B.bias"),
        ({"unet.no_such.lora_A.weight": torch.ones(1, 2), "unet.no_such.lora_B.weight": torch.ones(2, 1)}, "no_such"),
    ],
)
def test_what_has_no_place_is_named(
    extra: dict[str, Tensor], named: str, with_text: Path, model: DiffusionModel
) -> None:
    save_file(load_file(with_text) | extra, with_text)
    with raises(DraftuneError, named):
        read_lora(with_text, model.lora_networks, model.name)


def test_the_layout_is_that_of_the_model(pipeline_folder: Path, tmp_path: Path) -> None:
    """Without any weights the same layers are there, with the same shapes."""
    build: Callable[[], Any] = lambda: save_flux(tmp_path, True)  # noqa: E731
    for folder in (str(pipeline_folder), str(build()), "emoji"):
        layout, networks = load_layout(folder), load_model(folder).lora_networks
        assert layout.keys() == networks.keys()
        for part, network in networks.items():
            shapes = {name: tensor.shape for name, tensor in network.named_parameters()}
            # Weights that are tied when they are loaded are there twice.
            assert shapes.items() <= {name: p.shape for name, p in layout[part].named_parameters()}.items()
            assert all(parameter.is_meta for parameter in layout[part].parameters())
