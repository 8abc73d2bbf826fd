"""Processes of the page: one for each run, check or comparison of scales. They outlive the page and its server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import RLock
from typing import IO

import psutil

from draftune.errors import DraftuneError
from draftune.report.collect import SWEEP as SWEPT
from draftune.runs.logs import METRICS
from draftune.ui.folder import RECORDS, RunsFolder, stamp_of
from draftune.utils.paths import atomic_write

TRAIN, CHECK, SWEEP = KINDS = ("train", "check", "sweep")
RESULT = "check-result.json"
RESULTS: dict[str, str | Path] = {TRAIN: METRICS, SWEEP: SWEPT}
"""Files of a run by the kind of job that writes them."""
SAME_START = 2.0
"""Seconds by which two readings of one process's start may differ."""
SHOWN = 40
"""Lines of a log that the page shows."""
AGAIN = b"Started again.\n"
READ = 65536
"""Bytes that are read from the end of a log."""
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Control sequences of terminals, such as colors, and control characters but tabs and ends of lines."""


@dataclass(frozen=True)
class Job:
    """The record of a process.

    Attributes:
        name: The run's name.
        kind: One of KINDS.
        arguments: Those of the command line `draftune`.
        cwd: The folder that relative paths start from.
        created: When it was asked for, in seconds since 1970.
        waits: Whether it waits for the device; counting memory does not.
        pid: The process, None while the job waits.
        since: When the page started it, in seconds since 1970.
        started: The process's own start time, as the system reports it. A process of the same number that started at
            another time is a foreign one.
        booted: When the system started, by the clock at that time. The difference of the two starts does not change
            with the clock.
        before: The stamp of the job's result when it was started: a job that has begun, or has ended well, changes it.
        stopped: Whether it was asked to stop.
        ended: Whether it has ended.
    """

    name: str
    kind: str
    arguments: list[str]
    cwd: str
    created: float
    waits: bool = True
    pid: int | None = None
    since: float = 0.0
    started: float = 0.0
    booted: float = 0.0
    before: tuple[int, ...] | None = None
    stopped: bool = False
    ended: bool = False

    @property
    def process(self) -> psutil.Process | None:
        """Return the running process, None if it has ended or was never started."""
        if self.pid is None or self.ended:
            return None
        try:
            booted = psutil.boot_time()  # before the process's start, which old versions of psutil compute from it
            process = psutil.Process(self.pid)
            alive = process.status() != psutil.STATUS_ZOMBIE
            return process if alive and self.is_it(process, booted) else None
        except psutil.Error:
            return None

    def is_it(self, process: psutil.Process, booted: float) -> bool:
        """Return whether a process of this job's number is the job's: it started at the same time.

        After a change of the clock that is the time since the system's start. Another process may have that after a
        restart, so its arguments are compared too.
        """
        started = process.create_time()
        if abs(started - self.started) < SAME_START:
            return True
        same = abs((started - booted) - (self.started - self.booted)) < SAME_START
        return same and process.cmdline()[-len(self.arguments) :] == self.arguments


class Jobs:
    """The jobs of a folder of runs. Their records are files, so that another server finds them.

    One job uses the device at a time; the others wait in the order in which they were asked for.
    """

    def __init__(self, folder: RunsFolder) -> None:
        self.folder, self.lock, self.children = folder, RLock(), list[subprocess.Popen[bytes]]()

    def submit(self, name: str, kind: str, arguments: list[str], waits: bool = True) -> None:
        """Start a job, or let it wait for its turn.

        Raises:
            DraftuneError: one of this run and kind waits or is running.
        """
        self.add(Job(name, kind, arguments, str(Path.cwd()), time.time(), waits))

    def resume(self, name: str) -> None:
        """Start the command of a run again. Raises DraftuneError if it never ran, waits or is running."""
        job = self.get(name, TRAIN)
        if job is None:
            raise DraftuneError(f"the run {name!r} was not started here")
        self.add(replace(job, created=time.time(), pid=None, started=0.0, stopped=False, ended=False))

    def add(self, job: Job) -> None:
        """Add a job, and start it if nothing is before it."""
        with self.lock:
            earlier = self.get(job.name, job.kind)
            if earlier is not None and not earlier.ended:
                raise DraftuneError(f"{job.kind} of {job.name!r} waits or is running already")
            self.save(job)
            if job.waits:
                self.tick()
            else:
                self.start(job)

    def tick(self) -> None:
        """Record the jobs that have ended, and start the next one."""
        with self.lock:
            self.children = [child for child in self.children if child.poll() is None]
            jobs = [job for job in self.open() if job.waits]
            waiting = [job for job in jobs if job.pid is None]
            if waiting and len(waiting) == len(jobs):
                self.start(min(waiting, key=lambda job: job.created))

    def open(self) -> list[Job]:
        """Return the jobs that wait or are running."""
        with self.lock:
            found = [self.get(path.parent.name, path.stem) for path in self.folder.path.glob(f"{RECORDS}/*/*.json")]
            return [job for job in found if job is not None and not job.ended]

    def get(self, name: str, kind: str) -> Job | None:
        """Return the newest job of a run and kind, with its present state; None if there was none."""
        if kind not in KINDS:
            return None
        with self.lock:
            try:
                job = Job(**json.loads(self.path(name, kind).read_text(encoding="utf-8")))
                job = replace(job, before=job.before and tuple(job.before))
            except (OSError, ValueError, TypeError):
                return None
            if not job.ended and job.pid is not None and job.process is None:
                job = replace(job, ended=True)
                with suppress(OSError):  # as on a full disk: the next look finds out again
                    self.save(job)
            return job

    def stop(self, name: str, kind: str) -> None:
        """Ask a job to end. A run ends after its present update and saves everything; a second request is ignored."""
        with self.lock:
            job = self.get(name, kind)
            if job is None or job.ended or job.stopped:
                return
            if (process := job.process) is not None:
                with suppress(psutil.Error):  # it has just ended
                    process.terminate()
            self.save(replace(job, stopped=True, ended=job.pid is None))

    def start(self, job: Job) -> None:
        """Start the process of a job in a session of its own."""
        since, before = time.time(), stamp_of(self.result(job.name, job.kind))
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        with self.log(job.name, job.kind).open("ab" if job.kind == TRAIN else "wb") as log:
            if log.tell():
                log.write(AGAIN)  # the error of an earlier start is not that of this one
                log.flush()
            child = self.run(job, log, environment)
        self.children.append(child)
        booted = psutil.boot_time()
        started = psutil.Process(child.pid).create_time()
        try:
            self.save(replace(job, pid=child.pid, since=since, started=started, booted=booted, before=before))
        except OSError:
            child.terminate()  # without a record it would be started again and again
            raise

    def run(self, job: Job, log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Run the command line with its output in a log."""
        return subprocess.Popen(
            [sys.executable, "-m", "draftune", *job.arguments],
            cwd=job.cwd if Path(job.cwd).is_dir() else None,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def path(self, name: str, kind: str) -> Path:
        """Return the path of a record."""
        return self.folder.record(name) / f"{kind}.json"

    def result(self, name: str, kind: str) -> Path:
        """Return the path of the file that a job's first result changes."""
        return self.folder.record(name) / RESULT if kind == CHECK else self.folder.run(name) / RESULTS[kind]

    def log(self, name: str, kind: str) -> Path:
        """Return the path of a job's output."""
        return self.folder.record(name) / f"{kind}.log"

    def save(self, job: Job) -> None:
        """Write a record."""
        with atomic_write(self.path(job.name, job.kind)) as temporary:
            temporary.write_text(json.dumps(asdict(job)), encoding="utf-8")

    def lines(self, name: str, kind: str) -> list[str]:
        """Return the last lines of a job's output, of a progress bar its last state."""
        try:
            with self.log(name, kind).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - READ))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        text = CONTROL.sub("", text)
        lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        return [line for line in lines if line][-SHOWN:]

    def error(self, name: str, kind: str) -> str:
        """Return the error of a job that has ended without its result."""
        lines = self.lines(name, kind)
        last = lines[-1] if lines else ""
        if last.startswith("draftune: "):
            return last.removeprefix("draftune: ")
        if last.partition(":")[0].endswith(("Error", "Exception")):
            return last
        return "the process ended without an error message: it was killed, or the machine ran out of memory"
