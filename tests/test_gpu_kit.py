"""benchmarks/gpu.py: its tables, its limits, its rows, and a rehearsal of all parts on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from draftune.methods import load_method
from draftune.settings import Settings
from helpers.errors import mentions

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import architectures
import gpu
import gpu_rows
import small_configs
from published_configs import PARTS, SHORT

KIT = Path(gpu.__file__)
SLEEP = "import time; time.sleep(60)"


def process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_tables(tmp_path: Path) -> None:
    """Lines of one row are merged, bytes are shown in GB, and lists and mappings are left out."""
    gpu.add(tmp_path, gpu.FIRST, "machine", device="cuda (Card)")
    gpu.add(tmp_path, "sd14", "K = 1", failed="RuntimeError: a | b")
    gpu.add(tmp_path, "sd14", "K = 1", seconds=0.12345678, peak_bytes=2_000_000_000, settings={"method": "draft"})
    gpu.add(tmp_path, "sd14", "K = 5", seconds=1.5, updates=[1.5], settings={}, peak_bytes=10**9)
    gpu.add(tmp_path, "sd14", "K = 5", failed="RuntimeError: a | b")
    gpu.add(tmp_path, "sd14", "K = 1", counted_peak_bytes=1_600_000_000)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"part": "sd14", "row": "K = 1", "seco\n')
    gpu.write(tmp_path)
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert "- device: cuda (Card)" in lines
    start = lines.index("| row | seconds | peak GB | counted peak GB | peak by counted | failed |")
    assert lines[start + 1] == "|---|---|---|---|---|---|"
    assert lines[start + 2] == "| K = 1 | 0.1235 | 2.000 | 1.600 | 1.25 |  |"
    assert lines[start + 3] == r"| K = 5 | 1.5 | 1.000 |  |  | RuntimeError: a \| b |"
    assert lines.count("Not reached.") == len(gpu.PARTS)
    assert mentions(lines[-1], "1 rows", "--only counts")
    read = json.loads((tmp_path / "gpu.json").read_text())
    assert read["sd14"]["K = 1"]["peak_by_counted"] == 1.25


def test_a_part_is_stopped_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    part = process(f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEP}']); {SLEEP}")
    gpu.add(tmp_path, "sd14", "first", seconds=1.0)
    assert mentions(gpu.follow(part, 1.5, tmp_path), "limit")
    assert time.monotonic() - began < 15
    assert part.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "gpu.json").read_text())["sd14"]["first"]["seconds"] == 1.0
    for _ in range(50):  # until init has collected the other process
        try:
            os.killpg(part.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process that the part started is left")


def test_how_the_parts_of_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash ends its part only, the counts are stopped at the end, and a part that was not reached says so."""
    codes = {"good": "", "bad": "raise SystemExit(3)", "slow": SLEEP, "late": SLEEP, gpu.COUNTS: SLEEP}
    monkeypatch.setattr(gpu, "PARTS", {name: (name, 60) for name in ("good", "bad", "slow", "late")})
    made = {}

    def start(part: str, args: argparse.Namespace, **environment: str) -> subprocess.Popen[bytes]:
        made[part] = process(codes[part])
        return made[part]

    monkeypatch.setattr(gpu, "start", start)
    gpu.run(argparse.Namespace(output=tmp_path, minutes=3 / 60, only=[*codes], tiny=False))
    status = {name: row["text"] for name, row in json.loads((tmp_path / "gpu.json").read_text())["status"].items()}
    assert mentions(status["good"], "Complete")
    assert mentions(status["bad"], "exit code 3")
    assert mentions(status["slow"], "limit")
    assert mentions(status["late"], "Not reached")
    assert "late" not in made
    assert made[gpu.COUNTS].returncode == -signal.SIGKILL


def test_what_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.missing() == []
    found = {"peft": "0.9.1", "torch": "2.13.0+cu130"}
    monkeypatch.setattr(gpu, "version", lambda name: found.get(name, "9999"))
    assert gpu.missing() == ["peft>=0.17"]
    assert gpu.main(["--output", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert mentions(error, "peft>=0.17", "wheels")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_results_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.add(tmp_path, "sd14", "K = 1", seconds=1.0)
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert mentions(capsys.readouterr().err, "--output", "--only")


@pytest.mark.parametrize("tiny", [False, True])
def test_the_settings_of_the_rows(tiny: bool) -> None:
    """Each is known, its method exists and fits the number of steps, and names are distinct."""
    rows = gpu_rows.Rows(tiny)
    for part in (*gpu_rows.SIZES, "transformers", "levers"):
        listed = rows.rows(part)
        assert len({row.name for row in listed}) == len(listed) > 3
        for row in listed:
            for changed in ({}, row.counted or {}):
                settings = Settings(**{"model": "emoji", **row.settings, **changed})
                assert getattr(load_method(settings.method), "k", 1) <= settings.num_inference_steps
            assert row.model in SHORT


def test_changed_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes apply to the networks of the rows alone, and their buffers have values."""
    assert {*small_configs.TINY, *small_configs.SHALLOW} <= PARTS.keys()
    monkeypatch.setattr(architectures, "CHANGES", small_configs.TINY)
    for name in small_configs.TINY:
        network = architectures.architecture(name, architectures.torch.float32)
        assert sum(parameter.numel() for parameter in network.parameters()) < 0.1 * PARTS[name].parameters
        for tensor in (*network.parameters(), *network.buffers()):
            assert not tensor.is_meta
            assert tensor.float().isfinite().all()


@pytest.mark.parametrize("name", ["T5-XXL encoder", "Qwen3-4B"])
def test_tied_weights_are_one_tensor(name: str) -> None:
    """The published number of parameters, of which those with two names count once."""
    network = architectures.empty(name)
    names = dict(network.named_parameters(remove_duplicate=False))
    assert len({*names.values()}) == len(names) - 1
    assert sum(parameter.numel() for parameter in {*names.values()}) == PARTS[name].parameters


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every row of every part on the CPU, at tiny sizes."""
    command = [sys.executable, str(KIT), "--device", "cpu", "--tiny", "--minutes", "15"]
    made = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert mentions(made.stdout, tmp_path / "gpu.md")
    results = json.loads((tmp_path / "gpu.json").read_text())
    for part in gpu.PARTS:
        assert mentions(results[gpu.STATUS][part]["text"], "Complete"), (part, (tmp_path / "gpu.log").read_text())
        rows = results[part]
        if part == "graphs":  # which a CPU does not have
            assert all("CUDA" in row["failed"] for row in rows.values())
        elif part != "alignprop" or "TRL" not in rows:  # TRL's row says that it is not installed
            assert all(row["seconds"] >= 0 and "failed" not in row for row in rows.values()), rows
    rows = gpu_rows.Rows(tiny=True)
    for part in (*gpu_rows.SIZES, "transformers", "levers"):
        expected = rows.rows(part)
        assert {row.name for row in expected} <= results[part].keys()
        assert all(results[part][row.name]["peak_bytes"] > 0 for row in expected)
        if part != "levers":
            assert results[part][expected[0].name]["peak_by_counted"] > 0.2
    assert results["tests"]
    assert "a call, compiled" in results["levers"]


@pytest.mark.slow
def test_a_machine_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(KIT), "--output", str(tmp_path)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert mentions(made.stderr, "device=cuda", 0)
    assert len(made.stderr.splitlines()) == 1
