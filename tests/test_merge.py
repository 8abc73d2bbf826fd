"""LoRAs added: the pictures are those of all of them active at once, whichever tool wrote them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.lora import (
    CONFIG,
    FILE_NAME,
    add_lora,
    load_lora,
    lora_parameters,
    read_lora,
    save_lora,
    saved_grid,
    set_lora_scales,
)
from draftune.models import DiffusionModel, load_model
from draftune.runs.load import load_for_sampling, read_deltas
from draftune.runs.merge import merge_loras, weighted
from helpers.errors import mentions, raises
from helpers.pipelines import build_pipeline

ATTENTION = ("to_q", "to_out.0")
CONVOLUTIONS = ("to_q", "conv_in", "conv1", "time_emb_proj", "ff.net.2", "proj_in")


def random_lora(base: Path, seed: int, rank: int, alpha: float, targets: Sequence[str]) -> DiffusionModel:
    """A model with a LoRA that does something already."""
    model = load_model(base)
    add_lora(model, rank, alpha, targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def saved_lora(base: Path, folder: Path, seed: int, rank: int, alpha: float, targets: Sequence[str]) -> Path:
    """Such a LoRA in a folder of its own."""
    save_lora(random_lora(base, seed, rank, alpha, targets), folder)
    return folder


def draw(model: DiffusionModel) -> Tensor:
    return model.sample_tensors(["cat", "dog"], [3, 4], model.schedule(3), 2.0)


def drawn_with(base: Path, *sources: tuple[Path, float]) -> Tensor:
    """What diffusers draws with these LoRAs active at these weights."""
    model = load_model(base)
    for i, (source, _) in enumerate(sources):
        load_lora(model, source, f"lora-{i}")
    if sources:
        set_lora_scales(model, {f"lora-{i}": weight for i, (_, weight) in enumerate(sources)})
    return draw(model)


@pytest.fixture(scope="module")
def loras(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs of other ranks, alphas and layers; the first's folder has an @ in its name."""
    folder = tmp_path_factory.mktemp("loras")
    return (
        saved_lora(pipeline_folder, folder / "a@home", 0, 2, 3.0, ATTENTION),
        saved_lora(pipeline_folder, folder / "b", 1, 3, 1.5, CONVOLUTIONS),
    )


def test_a_lora_of_convolutions_and_attention_is_loaded_whole(pipeline_folder: Path, tmp_path: Path) -> None:
    """diffusers takes from the first name, here conv_in's, how it is to read all the others."""
    model = random_lora(pipeline_folder, 1, 3, 1.5, CONVOLUTIONS)
    save_lora(model, tmp_path)
    assert torch.equal(drawn_with(pipeline_folder, (tmp_path, 1.0)), draw(model))


def test_a_mix_draws_what_both_draw(pipeline_folder: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = loras
    out = tmp_path / "mixed"
    assert main(["merge", f"{a}@0.7", f"{b / FILE_NAME}@-0.5", "--output", str(out)]) == 0
    both = drawn_with(pipeline_folder, (a, 0.7), (b, -0.5))
    mixed = drawn_with(pipeline_folder, (out, 1.0))
    assert (mixed - both).abs().max() < 1e-5
    for other in ([], [(a, 0.7)], [(b, -0.5)], [(a, 0.7), (b, 0.5)]):
        assert (drawn_with(pipeline_folder, *other) - mixed).abs().max() > 1e-2

    with safe_open(out / FILE_NAME, "pt") as file:
        said = file.metadata()
    assert said["base_model"] == str(pipeline_folder)
    assert said["merged_from"] == f"{a}@0.7 + {b / FILE_NAME}@-0.5"
    config = json.loads(said[CONFIG])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (5, 5)
    assert len(config["unet.target_modules"]) * 2 == len(load_file(out / FILE_NAME))


def test_a_mix_is_drawn_on_the_grid_of_its_loras(pipeline_folder: Path, tmp_path: Path) -> None:
    for name, spacing in (("a", "trailing"), ("b", "trailing"), ("c", "leading")):
        model = random_lora(pipeline_folder, 0, 2, 2, ATTENTION)
        model.set_sampler_options(spacing, True)
        save_lora(model, tmp_path / name)
    merge_loras([(tmp_path / "a", 1.0), (tmp_path / "b", 0.5)], tmp_path / "same")
    merge_loras([(tmp_path / "a", 1.0), (tmp_path / "c", 0.5)], tmp_path / "differ")
    assert saved_grid(tmp_path / "same") == {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    assert saved_grid(tmp_path / "differ") == {}
    drawn, _ = load_for_sampling(str(tmp_path / "same"), device="cpu")
    own, _ = load_for_sampling(str(tmp_path / "differ"), device="cpu")
    assert drawn.sampler_options == {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    published = {"timestep_spacing": "leading", "set_alpha_to_one": False}
    assert own.sampler_options == load_model(pipeline_folder).sampler_options == published
    kohya = tmp_path / "same.safetensors"
    assert main(["export", str(tmp_path / "same"), "--format", "kohya", "--output", str(kohya)]) == 0
    assert saved_grid(kohya) == saved_grid(tmp_path / "same")


def test_a_lora_is_loaded_whole_or_not_at_all(pipeline_folder: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    """diffusers says nothing of layers that the model has not, of a missing half and of ranks that differ."""
    tensors, path = load_file(loras[0] / FILE_NAME), tmp_path / "lora.safetensors"
    name = next(key for key in tensors if ".lora.down" in key)
    more = {key.replace("unet.", "unet.no.such."): tensor.clone() for key, tensor in tensors.items()}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (tensors | more, "no.such"),
        ({key: tensor for key, tensor in tensors.items() if key != name}, name.partition(".lora")[0]),
        (tensors | {name: tensors[name][:1].clone()}, name.partition(".lora")[0]),
        (tensors | {name: tensors[name] * float("nan")}, "finite"),
    ]
    for changed, message in cases:
        save_file(changed, path)
        with raises(DraftuneError, message):
            load_lora(load_model(pipeline_folder), path)


def test_others_may_read_a_lora(loras: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    assert (loras[0] / FILE_NAME).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_mix_is_mixed_again(pipeline_folder: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = loras
    merge_loras([(a, 1.0), (b, 0.5)], tmp_path / "once")
    merge_loras([(tmp_path / "once", 0.5), (a, -0.5)], tmp_path / "twice")
    expected = drawn_with(pipeline_folder, (b, 0.25))
    assert (drawn_with(pipeline_folder, (tmp_path / "twice", 1.0)) - expected).abs().max() < 1e-5


def test_layers_that_only_one_lora_changes_get_no_more_ranks_than_the_others(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    a = saved_lora(pipeline_folder, tmp_path / "a", 0, 4, 4, ("to_q",))
    b = saved_lora(pipeline_folder, tmp_path / "b", 1, 2, 2, ("to_k",))
    tensors = load_file(merge_loras([(a, 1), (b, 1)], tmp_path / "mixed"))
    assert {len(tensor) for name, tensor in tensors.items() if "lora.down" in name} == {4}
    expected = drawn_with(pipeline_folder, (a, 1), (b, 1))
    assert (drawn_with(pipeline_folder, (tmp_path / "mixed", 1)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("names", ["lora.down", "lora_A", "mixed"])
def test_a_lora_of_another_tool(pipeline_folder: Path, loras: tuple[Path, Path], tmp_path: Path, names: str) -> None:
    """Without metadata rank is that of the shapes, and alpha is the rank or what an alpha among the tensors says."""
    _, b = loras
    tensors = load_file(b / FILE_NAME)
    if names == "mixed":
        # As some versions of diffusers write them: peft's names for what is no attention.
        renamed = {key: key if ".to_q." in key else in_peft(key) for key in tensors}
    else:
        renamed = {key: in_peft(key) if names == "lora_A" else key for key in tensors}
    save_file({renamed[key]: tensor for key, tensor in tensors.items()}, tmp_path / "foreign.safetensors")
    merge_loras([(tmp_path / "foreign.safetensors", 0.5)], tmp_path / "mixed", str(pipeline_folder))
    # The file that it was made of has the alpha 1.5 and the rank 3.
    expected = drawn_with(pipeline_folder, (b, 1.0))
    assert (drawn_with(pipeline_folder, (tmp_path / "mixed", 1)) - expected).abs().max() < 1e-5

    alphas = {key.partition(".lora.down")[0] + ".alpha": torch.tensor(1.5) for key in tensors if ".lora.down" in key}
    save_file({renamed[key]: tensor for key, tensor in tensors.items()} | alphas, tmp_path / "alphas.safetensors")
    with_alphas, without = (
        read_deltas(tmp_path / f"{name}.safetensors", str(pipeline_folder)) for name in ("alphas", "foreign")
    )
    assert with_alphas.layers.keys() == without.layers.keys()
    for name, layer in with_alphas.layers.items():
        assert torch.allclose(layer.change, 0.5 * without.layers[name].change)


def in_peft(key: str) -> str:
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def test_ranks_and_alphas_by_patterns(pipeline_folder: Path, tmp_path: Path) -> None:
    """A LoRA of peft's with a rank and an alpha of their own for some layers, and scaled by the rank's root."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = build_pipeline(tmp_path / "parts")
    patterns = {"rank_pattern": {"attn1.to_q": 3}, "alpha_pattern": {"attn1.to_q": 5, "to_k": 2}}
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "to_k"], init_lora_weights=False, use_rslora=True, **patterns
    )
    pipeline.unet.add_adapter(config, "default")
    said = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_k"], "use_rslora": True, **patterns}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet, adapter_name="default")),
        unet_lora_adapter_metadata=said,
    )
    layers = read_lora(tmp_path / "lora", {"unet": build_pipeline(tmp_path / "again").unet}, "tiny").of_part("unet")
    modules = dict(pipeline.unet.named_modules())
    assert len(layers) == sum(name.endswith((".to_q", ".to_k")) for name in modules)
    for name, layer in layers.items():
        assert torch.allclose(layer.change, modules[name].get_delta_weight("default"), atol=1e-6)


def test_the_same_command_again_replaces_its_own_file_alone(
    loras: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(lora) for lora in loras)
    out = tmp_path / "mixed"
    out.mkdir()
    command = ["merge", f"{a}@0.7", b, "--output", str(out)]
    save_file({"old": torch.ones(1)}, out / FILE_NAME, {"merged_from": f"{a}@0.7 + {b}@1.0"})
    assert main(command) == 0
    first = (out / FILE_NAME).read_bytes()
    assert len(read_deltas(out).layers) > 1
    assert main(["merge", f"{a}@0.6", b, "--output", str(out)]) == 2
    assert mentions(capsys.readouterr().err, out)
    (out / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert (out / FILE_NAME).read_bytes() == first
    assert main(["merge", a, "--output", str(loras[1])]) == 2
    assert main(["merge", a, "--output", str(out / "notes.txt")]) == 2
    assert mentions(capsys.readouterr().err, "notes.txt folder")
    assert (out / "notes.txt").read_text() == "mine"


def test_weights(tmp_path: Path) -> None:
    assert weighted("runs/a@0.7") == ("runs/a", 0.7)
    assert weighted("runs/a") == ("runs/a", 1.0)
    assert weighted("me@home/a") == ("me@home/a", 1.0)
    assert weighted("me@home/a@2@-1e-1") == ("me@home/a@2", -0.1)
    with raises(DraftuneError, "weight", tmp_path, "'0,5'"):
        weighted(f"{tmp_path}@0,5")


def test_mistakes(
    pipeline_folder: Path, loras: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(lora) for lora in loras)
    tensors = load_file(loras[1] / FILE_NAME)
    name = next(key for key in tensors if ".lora.down" in key)

    def variant(file: str, change: dict[str, Tensor | None], metadata: dict[str, str] | None = None) -> str:
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(changed, tmp_path / file, metadata)
        return str(tmp_path / file)

    wider = {key: torch.cat([value, value], 1) for key, value in tensors.items() if "to_q.lora.down" in key}
    encoder = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}
    kohya = {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}
    odd = {name: torch.ones(2, 16), name.replace("down", "up"): torch.ones(16, 3)}
    base = {"base_model": str(pipeline_folder)}
    save_file(kohya, tmp_path / "loha.safetensors", base)
    (tmp_path / "text.safetensors").write_text("no tensors")
    cases = {
        "LoRA nowhere": ["nowhere@0.5"],
        "weight nan": [f"{a}@nan"],
        "weight inf": [a, f"{b}@inf"],
        f"{pipeline_folder} other/model": [a, variant("other.safetensors", {}, {"base_model": "other/model"})],
        "other.safetensors other/model": [a, str(tmp_path / "other.safetensors")],
        "wider.safetensors unet.": [a, variant("wider.safetensors", wider, base)],
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj up": [variant("encoder.safetensors", encoder, base)],
        "DoRA unet.conv_in --format merged": [
            variant("dora.safetensors", {"unet.conv_in.lora_magnitude_vector": torch.ones(8)}, base)
        ],
        "half.safetensors half": [variant("half.safetensors", {name: None}, base)],
        "rank.safetensors shape": [variant("rank.safetensors", odd, base)],
        "hada_w1_a": [str(tmp_path / "loha.safetensors")],
        "metadata.safetensors": [variant("metadata.safetensors", {}, {CONFIG: "[1]"})],
        "text.safetensors": [str(tmp_path / "text.safetensors")],
        "nobody.safetensors --model": [variant("nobody.safetensors", {})],
    }  # fmt: skip
    for message, sources in cases.items():
        code = main(["merge", *sources, "--output", str(tmp_path / "new")])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), (sources, lines)
        assert mentions(lines[0], message), (message, lines[0])
    assert not (tmp_path / "new").exists()


def test_one_model_under_two_names(pipeline_folder: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = loras
    shutil.copytree(pipeline_folder, tmp_path / "copy")
    c = saved_lora(tmp_path / "copy", tmp_path / "c", 2, 1, 1, ATTENTION)
    out = str(tmp_path / "mixed")
    assert main(["merge", str(a), str(c), "--output", out]) == 2
    assert main(["merge", str(a), str(c), "--output", out, "--model", str(tmp_path / "copy")]) == 0
    assert read_deltas(out).base_model == str(tmp_path / "copy")
    assert main(["sample", out, "--prompt", "cat", "--num-inference-steps", "2", "--output", f"{out}.png"]) == 0
    expected = drawn_with(pipeline_folder, (a, 1.0), (c, 1.0))
    assert (drawn_with(pipeline_folder, (Path(out), 1.0)) - expected).abs().max() < 1e-5
