"""LoRAs of a range of steps in files: merged, exported, distilled and trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora_steps import metadata, ranged
from test_second_reward import prepared

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.experimental.distill import Distiller
from draftune.lora import FILE_NAME, LoRADelta, LoRADeltas, load_lora, saved_steps
from draftune.models import load_model
from draftune.runs.load import load_for_sampling
from draftune.sampling.step_range import StepRange
from helpers.errors import mentions, raises

EARLY, LATE = "0.0-0.4", "0.4-1.0"


@pytest.mark.parametrize(("format", "name"), [("diffusers", "out"), ("kohya", "out.safetensors")])
def test_exports_keep_the_range_and_say_so(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, name: str
) -> None:
    folder, out = ranged(pipeline_folder, tmp_path / "lora", EARLY), tmp_path / name
    assert main(["export", str(folder), "--format", format, "--output", str(out)]) == 0
    assert mentions(capsys.readouterr().out, EARLY, "callback_on_step_end")
    assert metadata(out / FILE_NAME if out.is_dir() else out)["lora_steps"] == EARLY
    images = []
    for source in (folder, out):
        model, _ = load_for_sampling(str(source), str(pipeline_folder), device="cpu")
        images.append(model.sample_tensors(["cat"], [3], model.schedule(5), 2.0))
    assert (images[0] - images[1]).abs().max() < 1e-5


def test_an_export_of_all_steps_says_nothing_of_a_range(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ranged(pipeline_folder, tmp_path / "lora", "")
    assert main(["export", str(folder), "--format", "diffusers", "--output", str(tmp_path / "out")]) == 0
    assert "callback" not in capsys.readouterr().out


def test_merged_weights_are_refused(pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ranged(pipeline_folder, tmp_path / "lora", EARLY)
    assert main(["export", str(folder), "--format", "merged", "--output", str(tmp_path / "out")]) == 2
    assert mentions(capsys.readouterr().err, "lora_steps", EARLY, "--format diffusers")
    assert not (tmp_path / "out").exists()


def test_loras_of_one_range_are_merged(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (ranged(pipeline_folder, tmp_path / str(seed), EARLY, seed) for seed in (0, 1))
    other, out = ranged(pipeline_folder, tmp_path / "late", LATE), tmp_path / "out"
    assert main(["merge", str(first), f"{second}@0.5", "--output", str(out)]) == 0
    assert saved_steps(out) == StepRange(0.0, 0.4)
    for more in (other, ranged(pipeline_folder, tmp_path / "all", "")):
        assert main(["merge", str(first), str(more), "--output", str(tmp_path / "none")]) == 2
        assert mentions(capsys.readouterr().err, "lora_steps", EARLY, saved_steps(more), first, more)
        command = ["experimental", "tune-weights", str(first), str(more), "--reward", "brightness", "--device", "cpu"]
        assert main([*command, "--prompts", "animals", "--output", str(tmp_path / "none")]) == 2
        assert mentions(capsys.readouterr().err, "lora_steps", EARLY, saved_steps(more))


def test_damaged_metadata_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    path = ranged(pipeline_folder, tmp_path / "lora", EARLY) / FILE_NAME
    save_file(load_file(path), path, metadata(path) | {"lora_steps": "0.4"})
    with raises(DraftuneError, path, "damaged lora_steps '0.4'"):
        load_lora(load_model(pipeline_folder), path)


def test_a_range_excludes_text_encoders() -> None:
    """They run once, before all steps."""
    delta = LoRADelta(torch.ones(1, 2), torch.ones(2, 1))
    layers = {"unet.a.to_q": delta, "text_encoder.b.q_proj": delta}
    LoRADeltas(layers)
    with raises(DraftuneError, "lora_steps", EARLY, "--skip-text-encoder-lora"):
        LoRADeltas(layers, lora_steps=StepRange.parse(EARLY))


def test_a_first_lora_has_the_range_of_the_second(pipeline_folder: Path, tmp_path: Path) -> None:
    """Their sum is saved: outside of the range neither is active, in training as with the file."""
    first = str(ranged(pipeline_folder, tmp_path / "first", EARLY))
    options = {"method": "draft", "num_inference_steps": 5, "init_lora": first}
    for lora_steps in ("", LATE):
        with raises(DraftuneError, "lora_steps", EARLY, StepRange.parse(lora_steps), "--lora-steps"):
            prepared(pipeline_folder, tmp_path / "run", lora_steps=lora_steps, **options)
    whole = str(ranged(pipeline_folder, tmp_path / "whole", ""))
    with raises(DraftuneError, "lora_steps", EARLY, "--format merged"):
        prepared(pipeline_folder, tmp_path / "run", lora_steps=EARLY, **(options | {"init_lora": whole}))

    trainer = prepared(pipeline_folder, tmp_path / "run", lora_steps=EARLY, **options)
    trainer.train()
    c = trainer.context
    ours = c.model.sample_tensors(["cat"], [3], c.schedule, 2.0)
    model, _ = load_for_sampling(str(tmp_path / "run"), device="cpu")
    assert (ours - model.sample_tensors(["cat"], [3], model.schedule(5), 2.0)).abs().max() < 1e-5
    denoise, base = c.model.denoisers_for(["cat"], c.schedule, 2.0)
    bare = load_model(pipeline_folder)
    bare.set_sampler_options(**c.model.sampler_options)
    without = bare.denoiser_for(["cat"], bare.schedule(5), 2.0)
    x = c.model.noise(torch.Generator().manual_seed(0), 1)
    with torch.no_grad():
        for step in c.schedule.steps:
            tuned, frozen, nothing = (call(x, step).noise for call in (denoise, base, without))
            assert torch.equal(tuned, frozen) == (not step.tuned)
            assert torch.equal(frozen, nothing) == (not step.tuned)


def test_a_distilled_lora_has_the_range_of_its_source(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained at the steps of the range only: the others have no gradient."""
    folder = ranged(pipeline_folder, tmp_path / "lora", EARLY)
    trained, difference = set(), Distiller.difference

    def record(self: Distiller, trajectory: object, at: int) -> torch.Tensor:
        if torch.is_grad_enabled():
            trained.add(at)
        return difference(self, trajectory, at)  # type: ignore[arg-type]

    monkeypatch.setattr(Distiller, "difference", record)
    count = load_for_sampling(str(folder), device="cpu")[1].num_inference_steps
    made = draftune.distill_lora(
        str(folder), [["cat"]], tmp_path / "small", 1, num_trajectories=1, steps_per_trajectory=999, device="cpu"
    )
    assert trained == set(StepRange.parse(EARLY).indices(count))
    assert saved_steps(made.file) == StepRange.parse(EARLY)
