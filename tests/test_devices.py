"""Two processes make the run that one makes, with the networks whole in each or shared out by FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.runs.checkpoint import checkpoints, read_state
from draftune.runs.logs import read_rows
from draftune.utils.processes import Processes
from helpers import two_processes
from helpers.errors import mentions, raises

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2"]
PATHS = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


def launched(*command: str, launcher: list[str] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def together(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes made in one launch."""
    folder = tmp_path_factory.mktemp("raise_on_all_ranks")
    made = launched(str(HERE / "helpers" / "two_processes.py"), str(pipeline_folder), str(folder))
    assert made.returncode == 0, made.stderr[-5000:]
    return folder


def facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts-{i}.json").read_text()) for i in range(2)]


CASES = {f"parallel {name}": values for name, values in two_processes.PARALLEL.items()}
CASES |= {f"sharded {name}": values for name, values in two_processes.SHARDED.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "values"), CASES.items(), ids=CASES)
def test_updates_equal_those_of_one_process(
    together: Path, pipeline_folder: Path, tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    trainer, rows = two_processes.updated(str(pipeline_folder), tmp_path / "run", **values)
    alone = two_processes.learned(trainer)
    first, second = (load_file(together / f"{name}-{i}.safetensors") for i in range(2))
    assert first.keys() == second.keys() == alone.keys()
    # The same to the last bit in both, or they would part ways.
    assert all(torch.equal(first[key], second[key]) for key in first)
    gradients = {key: alone[key] for key in first if key.startswith("gradient/")}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    close = 1e-6 if "float32" in name else 1e-9
    assert largest > 1e-6
    assert max(float((first[key] - gradient).abs().max()) for key, gradient in gradients.items()) < close * largest
    assert max(float((first[key] - alone[key]).abs().max()) for key in first) < close
    for i in range(2):
        written = json.loads((together / f"{name}-{i}.json").read_text())
        for row, other in zip(rows, written["rows"], strict=True):
            assert row["reward_queries"] == other["reward_queries"]
            assert {**other, "train_seconds": 0} == pytest.approx({**row, "train_seconds": 0}, abs=1e-6)
        assert written["method"].get("rewards", {}).keys() == trainer.method.state_dict().get("rewards", {}).keys()


@pytest.mark.slow
def test_each_process_holds_its_part_of_the_frozen_networks(together: Path) -> None:
    for found in facts(together):
        assert found["count"] == 2
        assert all(size["held"] == size["all"] > 0 for size in found["whole"].values())
        unet, encoder, decoder = found["sharded"].values()
        assert unet["held"] <= 0.51 * unet["all"]
        # The text encoder, of a user's pipeline, is in main memory after the prompts are encoded.
        assert encoder["held"] == encoder["all"]
        assert decoder["held"] == decoder["all"]
    whole, (first, second) = facts(together)[0]["whole"], (found["sharded"] for found in facts(together))
    for a, b, size in list(zip(first.values(), second.values(), whole.values(), strict=True))[:1]:
        assert a["held"] + b["held"] == size["all"]


@pytest.mark.slow
def test_the_bytes_of_an_update_are_those_of_the_formula(together: Path) -> None:
    """The formulas of docs/explanation/growth.md; the networks and the LoRA are in float64."""
    for found in facts(together):
        for name, values in two_processes.TRAFFIC.items():
            plain, sharded = found["traffic"][name], found["sharded traffic"][name]
            for seen in (plain, sharded):
                assert seen["all_reduce"] == 8 * (seen["numbers"] + seen["tensors"]) > 0
                # Scores of 2 of 4 images, by the reward and its two terms, and two checks for errors of 9 bytes each.
                assert seen["all_gather"] == 4 * 2 * 3 + 8 + 2 * 9
            assert plain["all_gather_single"] == 0
            k, most = int(values["method"][-2]), sharded["weights"]
            gathered = sharded["all_gather_single"] / most
            if values["gradient_checkpointing"] in ("denoiser", "both"):
                assert gathered == two_processes.SETTINGS["num_inference_steps"] + k
            else:  # the backward pass ends before the layers that come before the first LoRA
                assert gathered == pytest.approx(two_processes.SETTINGS["num_inference_steps"] + k, rel=0.02)


@pytest.mark.slow
def test_a_mistake_ends_all_processes_and_is_said_once(together: Path) -> None:
    first, second = facts(together)
    for name, words in (
        ("alone", "picky ValueError: no such picture"),
        ("undefined", "reward nan"),
        ("uneven", "batch_size 3 2"),
        ("fsdp1", "FSDP 1"),
    ):
        error, printed = first[name]
        assert mentions(error, words)
        assert printed == error
        assert second[name] == [error, None]
    assert first["undefined"][0].count("nan") == 2  # of four pictures, as the other process scored them
    kept = load_file(together / "undefined" / "nonfinite" / "step-000001" / "0.safetensors")
    assert {name: len(tensor) for name, tensor in kept.items()} == {"noise": 4, "images": 4, "reward": 4}


RUN: dict[str, Any] = {
    "reward": "brightness",
    "eval_rewards": "saturation",
    "method": "draft_lv(n=1)",
    "batch_size": 2,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "learning_rate": 0.01,
    "checkpointing_steps": 1,
    "log_images_steps": 2,
    "num_log_prompts": 3,
    "validation_steps": 3,
    "num_validation_images": 1,
    "device": "cpu",
}


def flags(values: dict[str, Any]) -> list[str]:
    named = [(f"--{name.replace('_', '-')}", value) for name, value in values.items()]
    return [word for name, value in named for word in ([name] if value is True else [name, str(value)])]


def killed(process: subprocess.Popen[bytes], output: Path) -> float:
    """Kills the second of the launched processes after two updates; the seconds until the launcher has ended."""
    while process.poll() is None and len(read_rows(output / "metrics.jsonl")) < 2:
        time.sleep(0.01)
    (worker,) = (p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
    worker.kill()
    start = time.monotonic()
    process.wait(120)
    return time.monotonic() - start


@pytest.mark.slow
def test_a_killed_run_goes_on_by_one_process_and_then_by_two(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fish\na tree\na cat\n")
    prompts = str(tmp_path / "prompts.txt")
    values = {"model": str(pipeline_folder), "prompts": prompts, "eval_prompts": prompts, **RUN}
    output = tmp_path / "run"
    train = ["-m", "draftune", "train", *flags(values | {"output": output})]

    with (tmp_path / "error.txt").open("wb") as error:
        command = [*TORCHRUN, *train, "--steps", "100000"]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=error, stderr=error)
        seconds = killed(process, output)
    assert process.returncode != 0
    assert seconds < 60
    text = (tmp_path / "error.txt").read_text(errors="replace")
    assert sum(line.startswith("draftune: ") and "step-" in line for line in text.splitlines()) == 1
    state = read_state(checkpoints(output / "checkpoints")[-1])
    assert state["step"] >= 1

    last = state["step"] + 4
    half = draftune.train(**values, output=str(output), steps=last - 2)
    assert [row["step"] for row in half.metrics] == list(range(1, last - 1))
    assert half.evaluations[-1]["step"] == last - 2
    made = launched(*train[1:], "--steps", str(last), launcher=[*ACCELERATE, *FSDP2, "-m"])
    assert made.returncode == 0, made.stderr[-5000:]
    assert made.stdout.count("LoRA      ") == 1

    whole = draftune.train(**values, output=str(tmp_path / "whole"), steps=last)
    first, second = (
        load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in (output, whole.folder)
    )
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    assert max(float(tensor.abs().max()) for tensor in first.values()) > 0.01
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        rows, others = (read_rows(folder / name) for folder in (output, whole.folder))
        seen = {row["step"]: row for row in rows}
        assert len(seen) == len(rows)
        assert {row["step"] for row in others} <= seen.keys()
        for row, other in ((seen[other["step"]], other) for other in others):
            for key in (
                "reward",
                "brightness",
                "eval/saturation",
                "pixel_l1_from_base",
                "denoiser_mse_from_base",
                "scores",
            ):
                if key in row:
                    assert row[key] == pytest.approx(other[key], abs=1e-5)


def test_a_mistake_under_a_launcher_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "--steps", "0"]) == 2
        assert main(["eval", "runs/a"]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2 * lines
        assert all(mentions(line, "steps 0") or mentions(line, "launcher") for line in said)


def test_shares_are_equal_parts_in_order() -> None:
    shares = [Processes(i, 3).shard(list(range(6))) for i in range(3)]
    assert shares == [[0, 1], [2, 3], [4, 5]]
    padded = [Processes(i, 3).shard_padded([1, 2, 3, 4]) for i in range(3)]
    assert padded == [[1, 2], [3, 4], [4, 4]]
    assert Processes(1, 2).shard(torch.arange(4)).tolist() == [2, 3]
    with raises(DraftuneError, "alone"), Processes().raise_on_all_ranks():
        raise DraftuneError("alone")


def test_a_collective_inside_a_block_fails_with_one_process_too() -> None:
    processes = Processes()
    for collective in (
        lambda: processes.gather(torch.ones(1)),
        lambda: processes.mean_([]),
        lambda: processes.any(True),
        lambda: processes.broadcast(1),
        lambda: processes.gather_strings("a"),
        lambda: processes.raise_on_all_ranks().__enter__(),
    ):
        with pytest.raises(RuntimeError, match="raise_on_all_ranks"), processes.raise_on_all_ranks():
            collective()
    assert processes.any(True)
    assert not processes.any(False)
    assert processes.broadcast([1, None]) == [1, None]
    assert processes.gather_strings("é") == ["é"]
