"""GGUF transformers: they draw like their decoded weights, and a LoRA on them has the gradient of these."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.lora import add_lora, lora_parameters, set_lora_scale
from draftune.models import DiffusionModel, load_model
from draftune.models.quantization import is_quantized
from draftune.runs.load import load_for_sampling
from draftune.sampling.sampler import rollout
from draftune.utils.single_file import infer_pipeline, read_header
from helpers.errors import mentions, raises
from helpers.single_files import flux_of, flux_of_any_width, state_of

gguf = pytest.importorskip("gguf")

from helpers.gguf_files import unstacked, write_gguf  # noqa: E402

KINDS = {
    "img_mlp.0.weight": "Q4_K",
    "linear2.weight": "Q4_K",
    "img_attn.proj.weight": "Q4_0",
    "txt_mlp.2.weight": "Q5_1",
    "norm.query_norm.scale": "BF16",
    "final_layer.linear.weight": "BF16",
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "ff.net.0.proj"]


@pytest.fixture(autouse=True)
def of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_of_any_width(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 dev whose rows are long enough for the blocks of every type."""
    import test_flow

    model = test_flow.save_flux(tmp_path_factory.mktemp("flux"), guidance_embeds=True)
    shutil.rmtree(model / "transformer")
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    for name, parameter in transformer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.06 if parameter.ndim > 1 else 0.1)
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            torch.nn.init.ones_(parameter)
    transformer.save_pretrained(model / "transformer")
    return model


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The GGUF file of its transformer, and the weights that it stands for by gguf's own decoder."""
    path = tmp_path_factory.mktemp("gguf") / "flux.gguf"
    plain = state_of(folder / "transformer")
    return path, unstacked(plain, write_gguf(path, flux_of(plain), KINDS))


def decoded(model: DiffusionModel) -> dict[str, Tensor]:
    """The weights of the model's transformer, those in GGUF blocks decoded as diffusers does in every call."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return {key: dequantize_gguf_tensor(value).float() for key, value in model.denoiser.state_dict().items()}


def plain_model(folder: Path, weights: dict[str, Tensor]) -> DiffusionModel:
    model = load_model(folder)
    model.denoiser.load_state_dict(weights)
    return model


def images(model: DiffusionModel) -> Tensor:
    model.set_size(16, 16)
    return model.sample_tensors(["a cat"], [0], model.schedule(2), 3.5)


def gradient(model: DiffusionModel, mode: str) -> Tensor:
    model.set_size(16, 16)
    model.set_checkpointing(mode)
    schedule = model.schedule(2)
    denoise = model.denoiser_for(["a cat"], schedule, 3.5)
    latents = rollout(denoise, schedule.steps, model.noise(torch.Generator().manual_seed(0), 1))
    parameters = list(lora_parameters(model).values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(model.decode(latents).mean(), parameters)])


def with_lora(model: DiffusionModel) -> DiffusionModel:
    torch.manual_seed(0)
    add_lora(model, 2, targets=TARGETS)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_weights_are_those_of_the_file(folder: Path, file: tuple[Path, dict[str, Tensor]]) -> None:
    path, known = file
    model = load_model(path, base_pipeline=str(folder))
    weights = decoded(model)
    assert weights.keys() == known.keys()
    for key, value in known.items():
        # diffusers decodes in half precision.
        assert (weights[key] - value).abs().max() <= 2e-3 * value.abs().max(), key
    header = read_header(path)
    assert infer_pipeline(header) == ("FluxPipeline", "black-forest-labs/FLUX.1-dev")
    assert {"Q8_0", "Q4_K", "Q4_0", "Q5_1", "BF16", "F16", "F32"} == set(header.types.values())
    assert is_quantized(model.denoiser)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_images(folder: Path, file: tuple[Path, dict[str, Tensor]], precision: str) -> None:
    model = load_model(file[0], precision, base_pipeline=str(folder)).to("cpu", precision)
    plain = plain_model(folder, decoded(model)).to("cpu", precision)
    assert (images(model) - images(plain)).abs().max() < (1e-5 if precision == "no" else 2e-2)
    assert images(model).std() > 0.01


@pytest.mark.parametrize("mode", ["none", "blocks", "both"])
def test_gradient_of_a_lora(folder: Path, file: tuple[Path, dict[str, Tensor]], mode: str) -> None:
    model = load_model(file[0], base_pipeline=str(folder))
    plain = with_lora(plain_model(folder, decoded(model)))
    ours, theirs = gradient(with_lora(model), mode), gradient(plain, mode)
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_run(folder: Path, file: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    values: dict[str, Any] = {"num_inference_steps": 2, "batch_size": 1, "steps": 2, "height": 16, "width": 16}
    values |= {"eval_prompts": "", "log_images_steps": 0, "output": str(tmp_path / "run"), "mixed_precision": "no"}
    values |= {"method": "draft_k(k=1)", "base_pipeline": str(folder), "learning_rate": 0.01}
    draftune.train(str(file[0]), "brightness", "animals", **values)
    draftune.train(str(file[0]), "brightness", "animals", **values | {"steps": 3})
    model, _ = load_for_sampling(str(tmp_path / "run"))
    assert is_quantized(model.denoiser)
    tuned = images(model)
    set_lora_scale(model, 0.0)
    assert (images(model) - tuned).abs().max() > 1e-4
    draftune.export_lora(tmp_path / "run", tmp_path / "lora")
    with raises(DraftuneError, "--format merged quantized"):
        draftune.export_lora(tmp_path / "run", tmp_path / "merged", "merged")
    # The LoRA fits the unquantized model.
    load_for_sampling(str(tmp_path / "lora"), str(folder))


def test_refusals(
    folder: Path, file: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file[0].read_bytes()[:5000])
    (tmp_path / "text.gguf").write_text("no GGUF")
    (tmp_path / "empty.gguf").write_bytes(b"")
    unknown = tmp_path / "unknown.gguf"
    write_gguf(unknown, {"weight": torch.zeros(2, 2)}, {})
    deep = {**state_of(folder / "transformer")}
    write_gguf(tmp_path / "deep.gguf", flux_of(deep) | {"double_blocks.1.img_mod.lin.bias": torch.zeros(9)}, {})
    cases = (
        (file[0], "", "black-forest-labs/FLUX.1-dev --base-pipeline"),
        (cut, folder, "GGUF truncated"),
        (tmp_path / "text.gguf", folder, "GGUF"),
        (tmp_path / "empty.gguf", folder, "GGUF"),
        (unknown, "", "--base-pipeline"),
        (tmp_path / "deep.gguf", folder, "transformer --base-pipeline"),
    )
    for path, base, said in cases:
        command = ["train", "--model", str(path), "--reward", "brightness", "--prompts", "animals"]
        command += ["--base-pipeline", str(base)] if base else []
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert mentions(line, said), line
