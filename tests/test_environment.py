"""What `draftune env` prints and a run writes of its software and machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import draftune
from draftune.cli.main import main
from draftune.runs.environment import environment
from draftune.utils.devices import default_device

CPU = torch.device("cpu")


def test_env_prints_each_property_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed == environment(default_device())
    assert (printed["draftune"], printed["python"]) == (draftune.__version__, platform.python_version())
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"):
        assert printed[package] == version(package)
    assert printed["cpus"] == str(os.cpu_count())
    assert printed["memory"] == f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    assert {"gpus", "cuda", "mps"} <= printed.keys()


def test_env_has_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--output", "x"]) == 2
    assert "--output" in capsys.readouterr().err


def test_it_says_which_gpus_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [SimpleNamespace(name="Small", total_memory=8 * 2**30), SimpleNamespace(name="Large", total_memory=2**36)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found[device.index].name)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    known = environment(torch.device("cuda", 1))
    assert (known["gpus"], known["device"]) == ("Small (8.0 GiB), Large (64.0 GiB)", "cuda (Large)")
    assert known["cuda"] == "12.8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment(CPU)["gpus"] == "none"


def test_it_says_what_is_set_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    known = environment(CPU)
    assert [known[n] for n in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")] == ["0", "3", "not set"]


def test_it_holds_no_name_of_the_user_or_the_host_and_no_path(tmp_path: Path) -> None:
    """Run in a process of its own, whose user, home, folder and host all have one name that nothing else has."""
    secret = "zq7secret"
    folder = tmp_path / secret
    folder.mkdir()
    code = f"""
import json, os, platform, socket
host = ("Linux", "{secret}", "6.1.0", "#1 SMP", "x86_64")
os.uname = lambda: os.uname_result(host)
socket.gethostname = lambda: "{secret}"
import torch
from draftune.runs.environment import environment
assert platform.node() == "{secret}"
print(json.dumps(environment(torch.device("cpu"))))
"""
    own = dict.fromkeys(("USER", "LOGNAME", "USERNAME", "HOSTNAME"), secret)
    own |= {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | own, cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    assert secret not in printed
    assert "Linux-6.1.0-x86_64" in json.loads(printed)["platform"]
    assert not any(os.sep in value for value in json.loads(printed).values())
