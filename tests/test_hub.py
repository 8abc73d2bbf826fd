"""Downloads when the hub can't be reached: no hang, the cached copy if there is one, and an error otherwise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from draftune.utils.hub import cached_folder, is_hub_id

CODE = """
import sys, time
from huggingface_hub import hf_hub_download, snapshot_download
from draftune.errors import DraftuneError
from draftune.models import load_model
from draftune.models.layout import load_layout
from draftune.utils.hub import fetch
load_model("emoji")  # imports what the measured calls would import
start = time.monotonic()
print(fetch(hf_hub_download, "some/one", "config.json").name, fetch(snapshot_download, "some/one").name)
for load in (load_model, load_layout):
    try:
        load("some/other")
    except DraftuneError as error:
        print(error)
print(time.monotonic() - start)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache with one file of one repository."""
    repository = tmp_path / "models--some--one"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("endpoint", ["refuses", "never answers", "offline"])
def test_no_hang_without_a_network(cache: Path, endpoint: str) -> None:
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        if endpoint != "refuses":
            server.listen(16)
        environment = {
            **os.environ,
            "HF_HUB_CACHE": str(cache),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_OFFLINE": str(int(endpoint == "offline")),
        }
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300
        )
        assert time.monotonic() - start < 240
        if endpoint == "offline":
            server.settimeout(0)
            with pytest.raises(BlockingIOError):
                server.accept()  # no request was made
    names, *errors, seconds = done.stdout.strip().splitlines()
    assert names == "config.json abc"
    assert len(errors) == 2
    for error in errors:
        assert "some/other" in error
        assert "--model" in error
    # huggingface_hub alone retries a missing file for 23 seconds, or five times 60 if the server does not answer.
    assert float(seconds) < 20


def test_cached_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert cached_folder("some/one", "model_index.json", "config.json") == cache / "models--some--one/snapshots/abc"
    assert cached_folder("some/one", "model_index.json") is None
    assert cached_folder("some/other", "config.json") is None
    for name in ("emoji", "./a/b", "a/b/c", "some/on e"):
        assert cached_folder(name, "config.json") is None
    assert [is_hub_id(name) for name in ("a/b", "a", "./b", "/b", "~/b", "a/")] == [True, *[False] * 5]
