"""Preflight: what it measures is what a run takes, and what it advises fits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftune.cli.main import main
from draftune.cli.preflight import report
from draftune.errors import DraftuneError
from draftune.models import load_model
from draftune.settings import Settings
from draftune.training import memory_check as module
from draftune.training.memory_check import ROOM, MemoryReport, MemoryTrial, free_memory, preflight, smaller_batches
from draftune.training.step import TrainStep
from draftune.training.trainer import Trainer
from draftune.utils.memory import peak_memory
from helpers.errors import mentions, raises

FLAGS: dict[str, Any] = {
    "reward": "jpeg_compressibility",
    "method": "draft_lv(n=1)",
    "steps": 10,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "batch_size": 4,
    "log_images_steps": 4,
    "num_log_prompts": 3,
    "validation_steps": 5,
    "num_validation_images": 2,
    "device": "cpu",
}


@pytest.fixture
def settings(pipeline_folder: Path, tmp_path: Path) -> Settings:
    (tmp_path / "prompts.txt").write_text("a fish\na tree\na stone\n")
    prompts = {"prompts": str(tmp_path / "prompts.txt"), "eval_prompts": str(tmp_path / "prompts.txt")}
    return Settings(model=str(pipeline_folder), output=str(tmp_path / "run"), **{**FLAGS, **prompts})


def test_what_it_measures(settings: Settings, tmp_path: Path, pipeline_folder: Path) -> None:
    found = preflight(settings)
    assert (len(found.trials), found.fits, found.changes) == (1, True, {})
    trial = found.best
    model = load_model(pipeline_folder)
    # The text encoder is freed after the prompts are encoded.
    parts = [part for part in model.modules if part is not model.pipeline.text_encoder]
    networks = sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))
    trainer = Trainer(settings=settings)
    lora = sum(parameter.nbytes for parameter in trainer.train_step.parameters.values())
    assert trial.held == pytest.approx(networks + lora, rel=0.02)
    trainer.checks.check_rewards(trainer.validation.shown)
    # AdamW's two averages are made in the first update and held from then on.
    assert trial.peak == pytest.approx(peak_memory(lambda: trainer.train_step.run(1)) + 2 * lora, rel=0.02)
    # Updates; grids of 3 at 0, 4, 8 and 10; evaluations of 6 pictures at 0, 5 and 10, and of the denoiser MSE of 2 x 4.
    assert {name: count for name, (count, _) in trial.run.items()} == {
        "updates": 10,
        "sample grids": 4,
        "evaluations": 3,
    }
    seconds = {name: taken for name, (_, taken) in trial.run.items()}
    assert seconds["updates"] == pytest.approx(10 * trial.update)
    assert seconds["sample grids"] == pytest.approx(12 * trial.picture)
    assert seconds["evaluations"] == pytest.approx(3 * (6 + 8) * trial.picture)
    assert trial.seconds == pytest.approx(sum(seconds.values()))
    assert min(trial.update, trial.picture) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_what_it_advises_fits(settings: Settings) -> None:
    settings = replace(settings, gradient_checkpointing="none")
    asked = preflight(settings).best.total
    found = preflight(settings, int(0.95 * asked / ROOM))
    assert found.fits
    assert found.changes == {"gradient_checkpointing": "blocks"}
    least = preflight(settings, 1)
    assert not least.fits
    # The batch is halved as long as that helps, with as many pictures in an update.
    assert (least.best.settings.batch_size, least.best.settings.gradient_accumulation_steps) == (1, 4)
    assert least.best.total == min(trial.total for trial in least.trials) < 0.6 * asked
    assert least.best.settings.mixed_precision == "bf16"
    assert mentions(report(least), "not fit 0 MiB")
    assert "--gradient-checkpointing blocks" in report(found)


def test_a_counted_run_finds_the_settings_that_a_measured_one_finds(
    settings: Settings, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(settings, gradient_checkpointing="none", steps=1, eval_prompts="")
    measured = preflight(settings)
    without = Path(shutil.copytree(pipeline_folder, tmp_path / "configs"))
    for path in without.rglob("*.safetensors"):
        path.unlink()
    settings = replace(settings, model=str(without))
    counted = preflight(settings, int(0.95 * measured.best.total / ROOM), count=True)
    assert counted.changes == {"gradient_checkpointing": "blocks"}
    # AdamW's moments exist after the first update; the measured peak is of two updates.
    assert counted.trials[0].total == pytest.approx(measured.best.total, rel=0.02)
    assert counted.best.run == {}
    flags = ["--model", str(without), "--prompts", settings.prompts, "--output", settings.output]
    flags += ["--reward", settings.reward, "--num-inference-steps", "2", "--device", "cpu"]
    answer = tmp_path / "answer.json"
    assert main(["preflight", "--count", "--memory", "1", "--json", str(answer), *flags]) == 0
    printed = capsys.readouterr().out
    assert mentions(printed, "counted from the configs")
    written = json.loads(answer.read_text())
    assert (written["fits"], written["memory"], written["seconds"]) == (True, 2**30, None)
    assert f"{written['trials'][0]['total'] / 2**20:.0f} MiB" in printed
    assert main(["preflight", "--json", "answer.txt", *flags]) == 2


def test_updates_that_share_a_path_are_timed_with_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(settings, method="draft_k(k=1)", prefix_reuse_steps=3, eval_prompts="")
    made: list[int] = []
    update = TrainStep.run
    monkeypatch.setattr(TrainStep, "run", lambda self, step: made.append(step) or update(self, step))
    monkeypatch.setattr(module, "seconds", lambda function, device: 3.0 * bool(function() or True))
    found = preflight(settings)
    assert made == [1, 2, 3, 4, 5]
    assert found.best.update == 1.0


def test_changes_that_keep_the_update() -> None:
    for size, number, half in ((8, 1, (4, 2)), (6, 2, (3, 4)), (3, 4, (1, 12)), (5, 1, (1, 5))):
        change = smaller_batches(Settings(batch_size=size, gradient_accumulation_steps=number))
        assert (change["batch_size"], change["gradient_accumulation_steps"]) == half
    assert smaller_batches(Settings(batch_size=1)) == {}


def test_out_of_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = module.filled

    def too_much(trial: MemoryTrial, trainer: Any) -> MemoryTrial:
        if trial.settings.batch_size > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        return filled(trial, trainer)

    monkeypatch.setattr(module, "filled", too_much)
    settings = replace(settings, reward_batch_size=4)
    found = preflight(settings)
    assert [trial.ran for trial in found.trials] == [False] * 3 + [True]
    assert found.fits
    assert (found.changes["batch_size"], found.changes["gradient_accumulation_steps"]) == (1, 4)
    assert report(found).count("out of memory") == 3

    def broken(trial: MemoryTrial, trainer: Any) -> MemoryTrial:
        raise RuntimeError("something else")

    monkeypatch.setattr(module, "filled", broken)
    with pytest.raises(RuntimeError, match="something else"):
        preflight(settings)


def test_the_command(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("what lies in the run's folder does not matter")
    (tmp_path / "settings.yaml").write_text(settings.to_yaml())
    command = ["preflight", "--config", str(tmp_path / "settings.yaml")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert mentions(text, "draft_lv(n=1)", 4, 1, "cpu")
    assert mentions(text, "10 updates")
    assert main([*command, "--memory", "0.0001"]) == 1
    assert mentions(capsys.readouterr().out, "not fit 0 MiB")
    for bad in ("0", "-1", "nan", "inf"):
        assert main([*command, f"--memory={bad}"]) == 2
        assert mentions(capsys.readouterr().err, "--memory 0")
    assert main([*command, "--method", "draft_k(k=9)"]) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["note.txt"]


def test_the_memory_of_the_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    free = free_memory(torch.device("cpu"))
    assert free > 2**20
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert free_memory(torch.device("cpu")) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 2**20


def test_pictures_are_decoded_one_at_a_time(pipeline_folder: Path) -> None:
    model = load_model(pipeline_folder)
    latents = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def together() -> torch.Tensor:
        return model._decode(latents)

    assert torch.allclose(model.decode(latents), together().clamp(0, 1), atol=1e-5)
    assert peak_memory(lambda: model.decode(latents)) < 0.35 * peak_memory(together)
    sizes: list[int] = []
    model.pipeline.vae.decoder.register_forward_pre_hook(lambda decoder, given: sizes.append(len(given[0])))
    model.decode(latents)
    model.decode(latents.requires_grad_())
    assert sizes == [1, 1, 1, 1, 4]


def test_nothing_fits(tmp_path: Path) -> None:
    failed = MemoryTrial(Settings(), {})
    found = MemoryReport(torch.device("cuda"), 2**30, [failed], failed)
    assert not found.fits
    assert mentions(report(found), "not fit 1024 MiB")
    with raises(DraftuneError, "no_such_reward"):
        preflight(Settings(reward="no_such_reward"))
