"""What the page of `draftune ui` knows of its processes: after a restart, a failure, a kill, and in the queue."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from draftune.ui.processes import TRAIN, Job, Jobs
from helpers.ui import Client, client, eventually, folder, stand_in, state

__all__ = ["client", "folder"]  # fixtures of another file


def test_a_run_starts_stops_resumes_and_finishes(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, seconds=30)
    for name in ("first", "second"):
        client.submit("/new", name=name, steps="40", then="start")
    assert [state(client, name) for name in ("first", "second")] == ["starting", "waiting"]
    assert client.submit("/new", name="second", then="start").status_code == 422
    assert client.submit("/runs/first/start").status_code == 400
    assert client.submit("/runs/first/delete").status_code == 400
    eventually(lambda: client.state.jobs.lines("first", TRAIN))
    (folder / "first" / "metrics.jsonl").write_text('{"step": 1, "train_seconds": 2.0}\n{"step": 2, "tr')
    assert state(client, "first") == "training"
    page = client.get("/runs/first/status").text
    assert "1 of 40 updates" in page
    assert "primary" not in page
    # Another server, as after a restart, knows the same.
    again = Client(folder)
    assert [state(again, name) for name in ("first", "second")] == ["training", "waiting"]
    client.submit("/runs/second/stop")
    assert state(client, "second") == "stopped"
    process = client.state.jobs.get("first", TRAIN).process
    again.submit("/runs/first/stop")
    client.state.jobs.children[0].wait(10)
    assert not process.is_running()
    assert state(again, "first") == state(client, "first") == "stopped"
    stand_in(monkeypatch)
    client.submit("/runs/first/start")
    assert client.state.jobs.get("first", TRAIN).arguments[0] == "train"
    eventually(lambda: state(client, "first") == "finished")
    assert client.submit("/runs/first/start").status_code == 400
    assert client.submit("/runs/first/export", format="diffusers").status_code == 400


def test_the_queue_goes_on_by_itself(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, seconds=0.2)
    with client:
        for name in ("first", "second"):
            client.submit("/new", name=name, then="start")
        eventually(lambda: client.state.folder.finished("second"))
    assert [state(client, name) for name in ("first", "second")] == ["finished", "finished"]


def test_a_failed_and_a_killed_run_say_so(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, fail="the disk <is> full")
    client.submit("/new", name="first", then="start")
    eventually(lambda: state(client, "first") == "failed")
    page = client.get("/runs/first/status").text
    assert "the disk &lt;is&gt; full" in page
    assert "training: 10%" not in page
    stand_in(monkeypatch, seconds=30)
    client.submit("/runs/first/start")
    assert state(client, "first") == "starting"
    eventually(lambda: "ready" in client.state.jobs.lines("first", TRAIN)[-1:])
    client.state.jobs.get("first", TRAIN).process.send_signal(signal.SIGKILL)
    eventually(lambda: state(client, "first") == "failed")
    assert "killed" in client.get("/runs/first/status").text


def test_no_foreign_process_is_signalled(client: Client, folder: Path) -> None:
    client.submit("/new", name="first", then="save")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as foreign:
        started = psutil.Process(foreign.pid).create_time()
        job = Job("first", TRAIN, [], str(folder), created=0, pid=foreign.pid, started=started - 60)
        client.state.jobs.save(job)
        assert state(client, "first") == "failed"
        client.state.jobs.save(job)
        client.submit("/runs/first/stop")
        assert foreign.poll() is None
        assert psutil.Process(foreign.pid).status() != psutil.STATUS_ZOMBIE
        foreign.kill()
    (folder / ".ui" / "first" / "train.json").write_text('{"pid": ')
    assert state(client, "first") == "draft"


def test_a_check_is_a_table_and_counting_waits_for_nothing(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, seconds=30)
    client.submit("/new", name="long", then="start")
    client.submit("/new", name="first", then="check")
    job = client.state.jobs.get("first", "check")
    assert job.pid is None
    assert job.arguments[:2] == ["preflight", "--json"]
    client.submit("/runs/first/stop", kind="check")
    client.submit("/runs/first/check", count="yes")
    job = client.state.jobs.get("first", "check")
    assert job.process is not None
    assert job.arguments[1] == "--count"
    job.process.kill()
    trial = {"change": {}, "ran": True, "networks": 2**30, "update": 2**29, "total": 3 * 2**29}
    trials = [trial | {"seconds_per_update": 1.5}, {"change": {"batch_size": 2}, "ran": False, "update": 0}]
    answer = {"fits": False, "device": "cpu", "memory": 2**30, "changes": {}, "seconds": 90.0, "trials": trials}
    answer["parts"] = [{"name": "evaluations", "count": 3, "seconds": 30.0}]
    eventually(lambda: client.state.jobs.get("first", "check").ended)
    (folder / ".ui" / "first" / "check-result.json").write_text(json.dumps(answer))
    page = client.get("/runs/first/status").text
    expected = ("It does not fit into 1,024 MiB", "1,536", "1.50", "out of memory", "1 min 30 s: 3 evaluations 30 s")
    assert [text for text in expected if text not in page] == []
    client.state.jobs.get("long", TRAIN).process.kill()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_a_job_has_no_stranger_on_its_path(folder: Path, tmp_path: Path) -> None:
    """A file draftune.py in the folder where the page was started is not imported."""
    (tmp_path / "draftune.py").write_text("print('stranger')")
    jobs = Jobs(Client(folder).state.folder)
    jobs.folder.record("first").mkdir()
    jobs.submit("first", TRAIN, ["--version"])
    jobs.children[0].wait(20)
    assert not any("stranger" in line for line in jobs.lines("first", TRAIN))
    assert jobs.lines("first", TRAIN)


def test_the_states_say_what_is_being_done(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, seconds=30)
    client.submit("/new", name="first", then="start", steps="40", validation_steps="2")
    run = folder / "first"
    eventually(lambda: client.state.jobs.lines("first", TRAIN))

    def page() -> str:
        return str(client.get("/runs/first/status").text)

    assert "Loading the model and the rewards" in page()
    logs = {name: run / f"{name}.jsonl" for name in ("metrics", "samples", "evaluations")}
    logs["metrics"].write_text('{"step": 1, "train_seconds": 2.0}\n')
    assert "Sampling images of the base model" in page()
    logs["samples"].write_text('{"step": 0}\n')
    assert "1 min 18 s of updates left" in page()
    logs["metrics"].write_text('{"step": 2, "train_seconds": 4.0}\n')
    assert state(client, "first") == "evaluating"
    logs["evaluations"].write_text('{"step": 2}\n')
    assert state(client, "first") == "training"
    logs["metrics"].write_text('{"step": 40, "train_seconds": 80.0}\n')
    assert state(client, "first") == "evaluating"
    assert "left" not in page()
    client.submit("/runs/first/stop")
    client.state.jobs.children[0].wait(10)
    eventually(lambda: state(client, "first") == "stopped")
    client.submit("/runs/first/start")
    assert "Starting again" in page()
    client.state.jobs.get("first", TRAIN).process.kill()


def test_a_start_waits_for_its_own_check_which_can_be_canceled(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, seconds=30)
    client.submit("/new", name="first", then="check")
    client.submit("/runs/first/start")
    page = client.get("/runs/first/status").text
    assert "It starts when its check has ended" in page
    assert "Cancel</button>" in page
    assert "0 s so far" in page or "1 s so far" in page
    client.submit("/runs/first/stop", kind="check")
    eventually(lambda: client.state.jobs.get("first", "check").ended)
    client.state.jobs.tick()
    assert state(client, "first") == "starting"
    client.state.jobs.get("first", TRAIN).process.kill()


def test_drafts_are_deleted_after_a_question_and_runs_have_dates(client: Client, folder: Path) -> None:
    client.submit("/new", name="first", then="save")
    assert re.search(r'action="/runs/first/delete" data-confirm="[^"]*first', client.get("/runs/first/").text)
    os.utime(folder / ".ui" / "first" / "settings.yaml", (0, time.mktime((2024, 5, 6, 7, 8, 0, 0, 0, -1))))
    assert re.search(r"0?6 May 2024, 07:08", client.get("/").text)


def test_output_has_no_control_codes(client: Client) -> None:
    client.submit("/new", name="first", then="save")
    raw = b"\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07\x08\x07 10%\r20%\r\n\ttab\n"
    client.state.jobs.log("first", TRAIN).write_bytes(raw + b"\x1b[1mred\x1b[0m \x1b]0;title\x1b\\end\n")
    assert client.state.jobs.lines("first", TRAIN) == ["20%", "\ttab", "red end"]
