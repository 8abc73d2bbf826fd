"""The page of `draftune ui` in odd circumstances: damaged runs, odd names, a full disk, a changed clock."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from PIL import Image
from starlette.testclient import TestClient
from test_report import lines, show, written_run

from draftune.errors import DraftuneError
from draftune.report import collect
from draftune.runs import logs
from draftune.ui import folder as folder_module
from draftune.ui import processes, thumbnails
from draftune.ui.processes import TRAIN, Job, Jobs
from draftune.ui.state import run_state, sweep_state
from helpers.ui import ADDRESS, Client, client, eventually, folder, stand_in, state

__all__ = ["client", "folder"]  # fixtures of another file

ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    float("inf"),
    10**30,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    "\ud800",
    "../..",
    "\0",
]


def mutated(value: Any, chance: float, choose: random.Random) -> Any:
    """Return a JSON value with some odd values in place of its own, and without some of its keys."""
    if choose.random() < chance:
        return choose.choice(ODD)
    if isinstance(value, dict):
        return {key: mutated(inner, chance, choose) for key, inner in value.items() if choose.random() > chance / 4}
    return [mutated(inner, chance, choose) for inner in value] if isinstance(value, list) else value


def test_damaged_files_are_one_error_or_left_out(client: Client, folder: Path) -> None:
    run, choose = written_run(folder / "old"), random.Random(0)
    texts = {path: path.read_text() for path in run.rglob("*.json*")}
    for _ in range(30):
        damaged, chance = choose.choice(list(texts)), choose.choice([0.01, 0.05, 0.2])
        rows = texts[damaged].splitlines() if damaged.suffix == ".jsonl" else [texts[damaged]]
        odd = [json.dumps(mutated(json.loads(row), chance, choose)) for row in rows]
        damaged.write_text("\n".join(odd)[: None if choose.random() > 0.2 else -5])
        with contextlib.suppress(DraftuneError):
            collect(run)
        assert run_state(client.state.folder, client.state.jobs, "old").key == "elsewhere"
        damaged.write_text(texts[damaged])
    sweep = json.loads((run / "sweep" / "sweep.json").read_text())
    (run / "sweep" / "sweep.json").write_text(json.dumps(sweep | {"recommended": "x"}))
    (run / "reward_check.json").write_text(json.dumps({"a": {"score": "x"}, "b": {"score": 1.0}}))
    data = collect(run)
    assert (data["sweep"]["recommended"], data["reward_check"]) == (None, [["b", {"score": 1}]])
    # A damaged log is said, and the run can still be stopped or taken.
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    (run / "config.yaml").write_text("steps: [")
    for page in ("", "status"):
        assert "cannot be shown" in client.get(f"/runs/old/{page}").text
    assert client.get("/").status_code == 200


def test_a_run_is_read_once_for_all_its_statuses(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, opened = written_run(folder / "old"), list[str]()
    (run / "best").mkdir()
    (run / "best" / "x.safetensors").write_bytes(b"")
    client.get("/runs/old/status")
    original = Path.open

    def open_(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(self.name)
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(folder_module, "read_rows", lambda path: opened.append(path.name) or logs.read_rows(path))
    for _ in range(3):
        client.get("/runs/old/status")
        client.get("/?live")
    assert [name for name in opened if name.endswith((".jsonl", ".yaml"))] == []
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 41, "reward_queries": 1, "train_seconds": 1.0}\n')
    opened.clear()
    for _ in range(2):
        assert "41 of 40 updates" in client.get("/?live").text
    assert [name for name in opened if name.endswith(".jsonl")] == ["metrics.jsonl"]


def test_odd_names_have_pages_links_and_downloads(
    client: Client, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["50% #1?&", "é 猫 \N{CAT FACE}", "'\"<b>", "x" * 255]
    for name in names:
        (written_run(folder / name) / "lora").mkdir()
        (folder / name / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (folder / "loop").symlink_to(folder / "loop")
    page = client.get("/")
    assert page.status_code == 200

    def export_lora(source: Path, target: Path, *options: Any) -> Path:
        target.write_bytes(b"weights")
        return target

    monkeypatch.setattr("draftune.ui.actions.export_lora", export_lora)
    stand_in(monkeypatch, seconds=0)
    for name in names:
        address = f"/runs/{quote(name, safe='')}/"
        assert client.get(address).status_code == 200, name
        assert client.get(f"{address}thumbnail").status_code == 200, name
        assert client.submit(f"{address}export", format="comfyui").content == b"weights"
        assert client.submit(f"{address}start").headers["Location"] == f"{address}#state"
        eventually(lambda name=name: state(client, quote(name, safe="")) == "finished")
    assert client.get("/runs/loop/").status_code == client.get("/runs/%ED%A0%80/").status_code == 404
    assert client.submit(f"/runs/{quote(names[0])}/sweep", scales="1", images="9" * 5000).status_code == 400


def test_thumbnails_are_small_and_of_this_run(client: Client, folder: Path, tmp_path: Path) -> None:
    run = written_run(folder / "old", size=600)
    assert '/runs/old/thumbnail?40" loading="lazy"' in client.get("/").text
    answer = client.get("/runs/old/thumbnail")
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.size, answer.headers["Content-Type"]) == ((3 * thumbnails.SIDE, thumbnails.SIDE), "image/webp")
        assert image.getpixel((10, 10))[0] == pytest.approx(40, abs=6)
    assert len(answer.content) < 5000
    show(run, [60], 600)
    with Image.open(io.BytesIO(client.get("/runs/old/thumbnail").content)) as image:
        assert image.getpixel((10, 10))[0] == pytest.approx(60, abs=6)
    # Nothing outside of the run, and nothing that is no image.
    outside = written_run(tmp_path / "secret")
    for row in ({"step": "../../../secret/samples/step-000040"}, {"step": 1e400}, {"step": -5}, {}):
        lines(run / "samples.jsonl", [row])
        assert "/thumbnail?" not in client.get("/").text
        assert client.get("/runs/old/thumbnail").status_code == 404
    (run / "samples" / "step-000070").symlink_to(outside / "samples" / "step-000040")
    lines(run / "samples.jsonl", [{"step": 70, "prompts": ["a"], "scores": [1]}])
    assert client.get("/runs/old/thumbnail").status_code == 404
    assert collect(run)["samples"]["frames"] == []
    (run / "samples" / "step-000080").mkdir()
    (run / "samples" / "step-000080" / "00.png").write_bytes(b"half an im")
    lines(run / "samples.jsonl", [{"step": 80}])
    assert client.get("/runs/old/thumbnail").status_code == 404


def test_a_full_disk_is_said_and_starts_nothing_twice(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.submit("/new", name="first", then="save")
    stand_in(monkeypatch, seconds=30)
    jobs, save, full = client.state.jobs, Jobs.save, [True]

    def saved(self: Jobs, job: Job) -> None:
        if full[0] and job.pid is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, job)

    monkeypatch.setattr(Jobs, "save", saved)
    with TestClient(client.app, base_url=ADDRESS, raise_server_exceptions=False) as browser:
        form = {"token": client.state.token}
        answer = browser.post("/runs/first/start", data=form, headers={"Origin": ADDRESS}, follow_redirects=False)
        assert (answer.status_code, "No space left on device" in answer.text) == (500, True)
        started = jobs.children[:]
        assert started
        for child in started:
            child.wait(10)  # a process without a record does not go on
        assert "Waiting" in browser.get("/runs/first/status").text
        full[0] = False
        # The queue goes on when there is room again.
        eventually(lambda: (job := jobs.get("first", TRAIN)) is not None and job.process is not None)
    # A process that has ended is known to have ended, although that cannot be written.
    jobs.get("first", TRAIN).process.kill()
    full[0] = True
    eventually(lambda: state(client, "first") == "failed")


def test_a_change_of_the_clock_loses_no_process(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client.submit("/new", name="first", steps="40", then="save")
    arguments, hour = ["train", "--output", "first"], 3600.0
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", *arguments]) as process:
        started, booted = psutil.Process(process.pid).create_time(), psutil.boot_time()
        # The clock was put forward by an hour since.
        job = Job("first", TRAIN, arguments, ".", 0.0, pid=process.pid, started=started - hour, booted=booted - hour)
        client.state.jobs.save(job)
        assert state(client, "first") == "starting"
        # After a restart of the system, a process of this number is not taken for it.
        for other in ({"booted": booted}, {"arguments": ["train", "--output", "second"]}):
            client.state.jobs.save(Job(**{**vars(job), **other}))
            assert state(client, "first") == "failed"
        # It has begun when its log changes, whatever the clock says.
        run = written_run(folder / "first")
        job = Job(**{**vars(job), "before": folder_module.stamp_of(run / "metrics.jsonl"), "since": started + hour})
        client.state.jobs.save(job)
        assert state(client, "first") == "starting"
        with (run / "metrics.jsonl").open("a") as log:
            log.write('{"step": 41, "reward_queries": 1, "train_seconds": 1.0}\n')
        assert state(client, "first") == "evaluating"
        assert processes.Jobs(client.state.folder).get("first", TRAIN) == client.state.jobs.get("first", TRAIN)
        process.kill()
    swept = Job("first", "sweep", [], ".", created=started + hour, pid=1, ended=True)
    client.state.jobs.save(swept)
    assert sweep_state(client.state.jobs, "first")["done"]
