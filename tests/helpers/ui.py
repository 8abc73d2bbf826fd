"""The page of `draftune ui` in tests: a client that sends what a browser sends, and processes that stand for runs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import IO, Any

import pytest
from starlette.testclient import TestClient

from draftune.ui.app import make_app
from draftune.ui.processes import Job, Jobs

ADDRESS = "http://127.0.0.1:8644"
STAND_IN = """
import json, os, pathlib, signal, sys, time
kind, run, seconds, fail = sys.argv[1], pathlib.Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
run.mkdir(parents=True, exist_ok=True)
print("ready", flush=True)
end = time.monotonic() + seconds
while time.monotonic() < end and not stopped:
    time.sleep(0.01)
if stopped:
    print("draftune: interrupted after update 1; the same command resumes from there")
    sys.exit(130)
if fail:
    print("training: 10%\\rtraining: 20%\\ndraftune: " + fail)
    sys.exit(2)
checkpoint = run / "checkpoints" / "step-000002"
checkpoint.mkdir(parents=True, exist_ok=True)
(checkpoint / "state.json").write_text(json.dumps({"finished": True}))
"""


class Client(TestClient):
    """A browser on the page: it names its host and its origin, and sends the token of the page that it read."""

    def __init__(self, folder: Path) -> None:
        app = make_app(folder)
        super().__init__(app, base_url=ADDRESS, follow_redirects=False)
        self.state = app.state.context

    def submit(self, path: str, origin: str = ADDRESS, token: str | None = None, **values: Any) -> Any:
        """Send a form; `file=(name, content)` uploads one."""
        upload = {"file": values.pop("file")} if "file" in values else None
        form = {"token": self.state.token if token is None else token, **values}
        return self.post(path, data=form, files=upload, headers={"Origin": origin})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def client(folder: Path) -> Client:
    return Client(folder)


def stand_in(monkeypatch: Any, seconds: float = 0.0, fail: str = "") -> None:
    """Let jobs run a program that behaves like a run: it stops on SIGTERM, fails, or finishes after some seconds."""

    def run(self: Jobs, job: Job, log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        words = [job.kind, str(self.folder.run(job.name)), str(seconds), fail]
        command = [sys.executable, "-c", STAND_IN, *words]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    monkeypatch.setattr(Jobs, "run", run)


def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return value


def state(client: Client, name: str) -> str:
    """Return the state that a run's page shows."""
    found = re.search(r'class="state (\w+)"', client.get(f"/runs/{name}/status").text)
    assert found
    return found[1]


def problems(html: str) -> dict[str, str]:
    """Return the errors beside the fields of a form, by the fields' names."""
    return {name: unescape(text) for name, text in re.findall(r'id="(\w+)-error">(.*?)</p>', html)}


def inputs(html: str) -> dict[str, str]:
    """Return the values of a form's controls by their names, as a browser would send them."""
    tags = [dict(re.findall(r'([\w-]+)="(.*?)"', tag)) for tag in re.findall(r"<input\b[^>]*>", html, re.DOTALL)]
    values = {
        tag["name"]: tag.get("value", "") for tag in tags if "name" in tag and tag.get("type") in (None, "hidden")
    }
    for name, content in re.findall(r'<select[^>]* name="(\w+)"[^>]*>(.*?)</select>', html, re.DOTALL):
        chosen = re.search(r'value="([^"]*)" selected', content)
        values[name] = chosen[1] if chosen else ""
    return {name: unescape(value) for name, value in values.items()}
