"""Prompt embeddings: encoded once, equal to direct encoding, with the text encoders freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

import draftune
from draftune.errors import DraftuneError
from draftune.lora import load_lora
from draftune.models import load_model
from draftune.models.prompt_embeddings import split, stack, text_encoders
from draftune.training.trainer import Trainer
from helpers.embeddings import PROMPTS, close, direct, files, on_meta, same
from helpers.errors import mentions, raises
from helpers.every_family import TEXT_FAMILIES, every_family

RAGGED = ("qwen_image", "krea2", "krea2_turbo")
"""Families whose rows are as long as the longest prompt of a batch, with the negative prompt."""
SMALL: dict[str, Any] = {
    "method": "draft_k(k=1)",
    "batch_size": 2,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "negative_prompt": "a bad dog",
    "learning_rate": 0.01,
    "lora_rank": 2,
    "log_images_steps": 2,
    "num_log_prompts": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return every_family(tmp_path_factory.mktemp("families"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The token ids of each call of a CLIP text encoder."""
    calls: list[list[list[int]]] = []
    forward = CLIPTextModel.forward

    def counted(self: Any, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(input_ids.tolist())
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    return calls


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_rows_equal_direct_encoding(saved: dict[str, Path], prompt_cache: Path, family: str, precision: str) -> None:
    plain = load_model(saved[family], precision).to("cpu", precision)
    model = load_model(saved[family], precision, text_encoders=False).to("cpu", precision)
    again = load_model(saved[family], precision, text_encoders=False).to("cpu", precision)
    assert model.embeddings is not None
    assert again.embeddings is not None
    negative = "" if plain.no_negative_prompt else "a bad dog"
    for prompts, negative_prompt in ((PROMPTS, negative), (PROMPTS[1:] * 2, negative), (PROMPTS, "")):
        for guided in (False, True):
            rows = [split(direct(plain, [prompt], negative_prompt, guided)) for prompt in prompts]
            alone = [row[0] for row in rows if len(row) > 1] + [row[-1] for row in rows]
            embedded = model.embeddings.condition(prompts, negative_prompt, guided)
            tolerance = 1e-5 if precision == "no" else 0.05
            if family in RAGGED:
                assert close(embedded, stack(alone), tolerance)
            else:
                assert same(embedded, stack(alone))
            assert same(again.embeddings.condition(prompts, negative_prompt, guided), embedded)
            assert close(embedded, direct(plain, prompts, negative_prompt, guided), tolerance)
    assert on_meta(again)
    assert (model.embeddings.rounds > 0, again.embeddings.rounds) == (True, 0)  # `again` read them from the disk


def test_the_embedded_model_is_the_same_in_batches_of_any_size() -> None:
    plain, model = load_model("emoji"), load_model("emoji", text_encoders=False)
    assert model.embeddings is not None
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert same(model.embeddings.condition(prompts, "", True), direct(plain, prompts, "", True))


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_images_are_the_same(saved: dict[str, Path], family: str) -> None:
    plain, model = load_model(saved[family]), load_model(saved[family], text_encoders=False)
    for each in (plain, model):
        each.set_size(each.size_multiple, each.size_multiple)
    images = [m.sample_tensors(PROMPTS, [0, 1, 2], m.schedule(2), 3.0) for m in (plain, model)]
    assert (images[0] - images[1]).abs().max() < 1e-5
    assert (images[0][0] - images[0][1]).abs().max() > 1e-3


def test_embeddings_of_another_size_are_the_same(saved: dict[str, Path], prompt_cache: Path) -> None:
    for height in (None, 32):
        models = load_model(saved["sdxl"]), load_model(saved["sdxl"], text_encoders=False)
        for model in models:
            model.set_size(height, None)
        assert torch.equal(*(m.sample_tensors(["a cat"], [0], m.schedule(2), 3.0) for m in models))


def test_a_run_encodes_each_prompt_once(
    pipeline_folder: Path, tmp_path: Path, prompt_cache: Path, encoded: list[Any], loaded_encoders: list[Any]
) -> None:
    (tmp_path / "eval.txt").write_text("a fish\na cat\n")
    values = {**SMALL, "steps": 6, "eval_prompts": str(tmp_path / "eval.txt"), "num_validation_images": 1}
    values["reward_normalization_samples"] = 4
    trainer = Trainer(str(pipeline_folder), "brightness", PROMPTS, **values, output=str(tmp_path / "a"))
    # Three training prompts, one other evaluation prompt, the negative prompt; one call for each.
    assert len(encoded) == len({str(ids) for ids in encoded}) == 5
    assert all(len(ids) == 1 for ids in encoded)
    assert on_meta(trainer.model)
    first = trainer.train()
    assert len(encoded) == 5
    assert len(loaded_encoders) == 1
    assert loaded_encoders[0]() is None  # freed without a run of the garbage collector
    second = draftune.train(str(pipeline_folder), "brightness", PROMPTS, **values, output=str(tmp_path / "b"))
    assert (len(encoded), len(loaded_encoders)) == (5, 1)  # the text encoder was never loaded
    user = load_model(pipeline_folder)
    third = draftune.train(user, "brightness", PROMPTS, **values, output=str(tmp_path / "c"))
    assert len(encoded) == 10
    loras = [load_file(run.folder / "lora" / "pytorch_lora_weights.safetensors") for run in (first, second, third)]
    for other in loras[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in loras[0].items())


def test_a_short_run_of_many_prompts_encodes_those_that_it_samples(
    pipeline_folder: Path, tmp_path: Path, encoded: list[Any]
) -> None:
    prompts = [f"{i} cats" for i in range(100)]
    values = {**SMALL, "steps": 4, "log_images_steps": 0, "output": str(tmp_path / "run")}
    Trainer(str(pipeline_folder), "brightness", prompts, **values).train()
    assert len(encoded) <= 4 * 2 + 2 + 2 + 1  # the batches', the checks', the grid's and the negative prompt


def test_prompts_that_come_later(pipeline_folder: Path, tmp_path: Path, loaded_encoders: list[Any]) -> None:
    trainer = Trainer(str(pipeline_folder), "brightness", PROMPTS, **SMALL, steps=1, output=str(tmp_path / "run"))
    trainer.train()
    other = load_model(pipeline_folder)
    load_lora(other, tmp_path / "run")
    other.set_sampler_options(**trainer.model.sampler_options)
    del loaded_encoders[1:]
    for prompt in ("a fish", "a tree", "a stone"):
        images = [m.sample_tensors([prompt], [0], m.schedule(2), 3.0) for m in (other, trainer.model)]
        assert (images[0] - images[1]).abs().max() < 1e-5
        assert len(loaded_encoders) == 2  # read a second time, they stay in main memory
    assert loaded_encoders[1]() is text_encoders(trainer.model.pipeline)["text_encoder"]


def test_a_users_pipeline_gets_its_text_encoder_back(
    pipeline: StableDiffusionPipeline, tmp_path: Path, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    to = CLIPTextModel.to

    def moved(self: Any, *args: Any, **options: Any) -> Any:
        moves.extend(map(str, args or [options.get("device")]))
        return to(self, *args, **options)

    monkeypatch.setattr(CLIPTextModel, "to", moved)
    encoder = pipeline.text_encoder
    trainer = Trainer(pipeline, "brightness", PROMPTS, **SMALL, steps=2, output=str(tmp_path / "run"))
    assert moves[-2:] == ["cpu", "cpu"]  # to the device, and to main memory
    assert pipeline.text_encoder is encoder
    count = len(encoded)
    trainer.train()
    assert len(encoded) == count == 4
    assert trainer.model.embeddings is None
    assert moves[-1] == "cpu"  # back to the device
    pipeline("a fish", num_inference_steps=1, output_type="np")
    assert len(encoded) == count + 2  # with an empty negative prompt


def test_loading_text_encoders_for_the_pipeline(pipeline_folder: Path) -> None:
    model = load_model(pipeline_folder, text_encoders=False)
    with raises(DraftuneError, "load_text_encoders"):
        model.pipeline("a cat", num_inference_steps=1, output_type="np")
    model.load_text_encoders()
    plain = load_model(pipeline_folder)
    for name, tensor in plain.pipeline.text_encoder.state_dict().items():
        assert torch.equal(model.pipeline.text_encoder.state_dict()[name], tensor)
    assert model.embeddings is None
    assert torch.equal(*(m.sample_tensors(["a cat"], [0], m.schedule(2), 3.0) for m in (plain, model)))


def save_lora_of_both(folder: Path, to: Path) -> Path:
    """Write a random LoRA of a layer of the UNet and one of the text encoder."""
    torch.manual_seed(0)
    model, found = load_model(folder), {}
    for part, network, suffix in (
        ("unet", model.denoiser, "attn1.to_q"),
        ("text_encoder", model.pipeline.text_encoder, "q_proj"),
    ):
        layer, module = next((name, m) for name, m in network.named_modules() if name.endswith(suffix))
        prefix = f"{part}.{layer}" if part == "unet" or layer.startswith("text_model") else f"{part}.text_model.{layer}"
        found[f"{prefix}.lora_A.weight"] = torch.randn(2, module.in_features)
        found[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, 2)
    save_file(found, to / "text.safetensors")
    return to / "text.safetensors"


def test_a_lora_of_the_text_encoder(pipeline_folder: Path, tmp_path: Path, prompt_cache: Path) -> None:
    with_text = save_lora_of_both(pipeline_folder, tmp_path)
    plain, model = load_model(pipeline_folder), load_model(pipeline_folder, text_encoders=False)
    model.cache_prompts(PROMPTS, "", 3.0)
    for each in (plain, model):
        load_lora(each, with_text)
    images = [m.sample_tensors(PROMPTS, [0, 1, 2], m.schedule(2), 3.0) for m in (plain, model)]
    assert torch.equal(*images)
    without = load_model(pipeline_folder, text_encoders=False)
    load_lora(without, with_text, skip_text_encoder=True)
    assert without.embeddings is not None
    assert not torch.equal(without.sample_tensors(PROMPTS, [0, 1, 2], without.schedule(2), 3.0), images[0])
    # A run on top of it encodes with the LoRA, and stores no embeddings.
    before = files(prompt_cache)
    values = {**SMALL, "steps": 1, "init_lora": str(with_text), "learning_rate": 1e-12, "output": str(tmp_path / "run")}
    trainer = Trainer(str(pipeline_folder), "brightness", ["a fish"], **values)
    trainer.train()
    assert files(prompt_cache) == before
    assert (trainer.model.sample_tensors(PROMPTS, [0, 1, 2], plain.schedule(2), 3.0) - images[0]).abs().max() < 1e-5


def test_other_precisions_have_rows_of_their_own(pipeline_folder: Path) -> None:
    model = load_model(pipeline_folder, text_encoders=False)
    for precision in ("no", "bf16", "no"):
        model.to("cpu", precision)
        plain = load_model(pipeline_folder).to("cpu", precision)
        assert model.embeddings is not None
        # The weights of the denoiser were rounded, but those of the text encoder are read again.
        assert same(model.embeddings.condition(PROMPTS, "", True), direct(plain, PROMPTS, "", True))


class Masked(NamedTuple):
    text: Tensor
    mask: Tensor


class Bare(NamedTuple):
    text: Tensor


def test_rows_of_different_length() -> None:
    rows = [Masked(torch.ones(1, n, 2), torch.ones(1, n, dtype=torch.bool)) for n in (2, 3)]
    both = stack(rows)
    assert both.text.tolist() == [[[1, 1], [1, 1], [0, 0]], [[1, 1], [1, 1], [1, 1]]]
    assert both.mask.tolist() == [[True, True, False], [True, True, True]]
    assert same(stack(split(both)), both)
    with pytest.raises(ValueError, match="mask"):
        stack([Bare(row.text) for row in rows])


def test_a_device_without_room_for_the_text_encoder(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(pipeline_folder, text_encoders=False)
    devices: list[str] = []
    place = model.place

    def full(part: Any, device: Any) -> None:
        devices.append(str(device))
        if torch.device(device).type == "cuda":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        place(part, device)

    monkeypatch.setattr(model, "place", full)
    model.cache_prompts(PROMPTS, "", 1.0, "cuda:0")
    assert devices == ["cuda:0", "cpu"]
    assert mentions(caplog.messages[0], "cuda:0 CPU")
    assert model.device.type == "cpu"
    assert on_meta(model)
