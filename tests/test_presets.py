"""Presets: they are read, they fit what their names say, and memory that is counted is memory that is taken."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftune.cli.main import build_parser, main
from draftune.cli.train import train_settings
from draftune.errors import DraftuneError
from draftune.presets import PRESETS, config_path, read_yaml
from draftune.settings import Settings
from draftune.training.memory_count import count_run, network_bytes
from draftune.training.trainer import Trainer
from draftune.utils.memory import peak_memory
from helpers.errors import mentions, raises

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from full_size import preset_count
from published_configs import SHORT

CHEAPEST = "sana-8gb"
"""The preset that is counted in every run of the tests."""


def said(name: str) -> tuple[float, float, float]:
    """The numbers in a preset's comment: networks and update in GB, and their share of the device in percent."""
    comment = PRESETS[name].read_text().partition("\nmodel:")[0]
    networks, update, share = re.findall(r"(?:networks|update|together) ([\d.]+)", comment)
    return float(networks), float(update), float(share)


def asked(*argv: str) -> Settings:
    return train_settings(build_parser().parse_args(["train", *argv]))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_a_published_model_and_says_that_it_fits(name: str) -> None:
    settings = asked("--config", name)
    family, size = re.fullmatch(r"(\w+)-(\d+)gb", name).groups()  # type: ignore[union-attr]
    assert SHORT[family] == settings.model
    assert settings.batch_size * settings.gradient_accumulation_steps == 4
    networks, update, share = said(name)
    total = (networks + update) * 1e9 / (int(size) * 2**30)
    assert share == pytest.approx(100 * total, abs=0.6)
    assert total < 0.9


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == CHEAPEST else pytest.mark.full_size) for name in PRESETS]
)
def test_a_preset_takes_what_it_says(name: str) -> None:
    """From the published configs, each checked by its number of parameters."""
    counted, share = preset_count(name)
    networks, update, percent = said(name)
    assert counted.networks / 1e9 == pytest.approx(networks, abs=0.006)
    assert counted.peak / 1e9 == pytest.approx(update, abs=0.006)
    assert 100 * share == pytest.approx(percent, abs=0.6)


def test_flags_win_over_a_preset_and_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = asked("--config", "sdxl-16gb", "--batch-size", "2", "--seed", "3")
    assert (settings.batch_size, settings.seed, settings.gradient_accumulation_steps) == (2, 3, 4)
    assert (settings.guidance_scale, settings.mixed_precision) == (5.0, "bf16")
    assert asked("--config", "sd14-24gb").gradient_checkpointing == "none"
    monkeypatch.chdir(tmp_path)
    Path("sdxl-16gb").write_text("seed: 7\n")
    assert asked("--config", "sdxl-16gb") == Settings(seed=7)


def test_what_is_no_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with raises(DraftuneError, "'sd14-16g' 'sd14-16gb'"):
        config_path("sd14-16g")
    for path in ("sd14-16gb.yaml", str(tmp_path / "sd14-16gb")):
        assert main(["train", "--config", path]) == 2
        assert mentions(capsys.readouterr().err, path)


def test_the_list_of_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "presets"
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert main(["list", "sdxl-24gb"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == read_yaml(PRESETS["sdxl-24gb"])


def test_presets_are_found_without_torch() -> None:
    code = "import sys, draftune.presets as p; assert len(p.PRESETS) > 3; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "draft_k(k=2)", "gradient_checkpointing": "denoiser", "mixed_precision": "bf16"},
        {"method": "draft_lv(n=1)", "gradient_checkpointing": "none", "reward_batch_size": 2},
    ],
    ids=lambda settings: settings["method"],
)
def test_the_memory_of_a_run_is_counted_from_configs_alone(
    pipeline_folder: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    values: dict[str, Any] = {
        "prompts": str(prompts),
        "reward": "emoji_aesthetic",
        "batch_size": 2,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "device": "cpu",
        "output": str(tmp_path / "run"),
        **settings,
    }
    made = Trainer(str(pipeline_folder), **values)
    without = Path(shutil.copytree(pipeline_folder, tmp_path / "configs"))
    for path in without.rglob("*.safetensors"):
        path.unlink()
    count = count_run(Settings(model=str(without), **values))
    assert count.networks == network_bytes(made)
    assert count.update == pytest.approx(peak_memory(lambda: made.train_step.run(1)), rel=0.01)
