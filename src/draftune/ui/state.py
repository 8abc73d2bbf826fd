"""What the page says of a run: its state, its progress, and what can be done with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.report.collect import read_json
from draftune.runs.logs import EVALUATIONS
from draftune.runs.run_dir import CONFIG, read_settings
from draftune.settings import Settings
from draftune.ui.folder import RunsFolder, read_once, stamp_of
from draftune.ui.processes import CHECK, RESULT, SWEEP, TRAIN, Job, Jobs
from draftune.ui.thumbnails import last_images
from draftune.utils.tables import duration

LABELS = {
    "draft": "Not started",
    "waiting": "Waiting",
    "starting": "Starting",
    "training": "Training",
    "evaluating": "Evaluating",
    "stopping": "Stopping",
    "stopped": "Stopped",
    "finished": "Finished",
    "failed": "Failed",
    "elsewhere": "Not finished",
}
"""The name of each state. Runs of the command line that are not finished are "elsewhere"."""
LOADING = "Loading the model and the rewards."
OWN = {CHECK: "its check", SWEEP: "its comparison of scales"}
"""What a run waits for, if that is a job of its own."""


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        name: The run's name.
        key: A key of LABELS.
        step: The updates so far.
        steps: The updates that were asked for; 0 if the settings cannot be read.
        detail: A sentence on the state.
        facts: Model, reward and method, for the list.
        has_data: Whether the page has curves and images to show.
        has_lora: Whether there is a LoRA to take.
        best: The update of the LoRA of the best evaluation; 0 if there is none, or if the base model is the best.
        changed: When it was last changed, in seconds since 1970.
        sampled: The update of its last sample images; -1 if there are none.
    """

    name: str
    key: str
    step: int
    steps: int
    detail: str
    facts: str
    has_data: bool
    has_lora: bool
    best: int
    changed: float
    sampled: int

    @property
    def label(self) -> str:
        """Return the name of the state."""
        return "Starting again" if self.key == "starting" and self.step else LABELS[self.key]

    @property
    def busy(self) -> bool:
        """Return whether a process of the run waits or is running."""
        return self.key in ("waiting", "starting", "training", "evaluating", "stopping")

    @property
    def can_start(self) -> str:
        """Return the text of the button that starts the run; empty if it cannot be started."""
        return {"draft": "Start", "stopped": "Resume", "failed": "Try again", "elsewhere": "Resume"}.get(self.key, "")


def run_state(folder: RunsFolder, jobs: Jobs, name: str) -> RunState:
    """Return the state of a run or draft."""
    settings, last = settings_of(folder, name), folder.last_row(name)
    step, steps = int(last.get("step", 0)), settings.steps if settings else 0
    key = state_key(folder, jobs, name, step)
    if key == "training" and settings and (step >= settings.steps or evaluation_is_due(folder, name, settings, step)):
        key = "evaluating"
    facts = f"{settings.model}, {settings.reward}, {settings.method}" if settings else "its settings cannot be read"
    return RunState(
        name,
        key,
        step,
        steps,
        detail(folder, jobs, name, key, last, steps),
        facts,
        folder.has_run(name),
        folder.lora(name),
        folder.best(name),
        folder.changed(name),
        folder.sampled(name) if last_images(folder.run(name), folder.sampled(name)) else -1,
    )


def state_key(folder: RunsFolder, jobs: Jobs, name: str, step: int) -> str:
    """Return the key of a run's state in LABELS."""
    job = jobs.get(name, TRAIN)
    if job is not None and not job.ended:
        if job.pid is None:
            return "waiting"
        begun = step and stamp_of(jobs.result(name, TRAIN)) != job.before
        return "stopping" if job.stopped else "training" if begun else "starting"
    if folder.finished(name):
        return "finished"
    if job is None:
        return "elsewhere" if folder.has_run(name) else "draft"
    return "stopped" if job.stopped else "failed"


def evaluation_is_due(folder: RunsFolder, name: str, settings: Settings, step: int) -> bool:
    """Return whether a run evaluates after its last update: its log of evaluations ends before it."""
    due = settings.eval_prompts and settings.validation_steps and step and step % settings.validation_steps == 0
    return bool(due) and int(folder.last_row(name, EVALUATIONS).get("step", -1)) < step


def detail(folder: RunsFolder, jobs: Jobs, name: str, key: str, last: dict[str, Any], steps: int) -> str:
    """Return a sentence on the state of a run."""
    step = int(last.get("step", 0))
    if key == "waiting":
        before = next((job for job in jobs.open() if job.waits and job.pid is not None), None)
        if before is None:
            return ""
        what = OWN.get(before.kind, "it") if before.name == name else before.name
        return f"It starts when {what} has ended, if this page is being served then."
    if key == "starting" and step:
        return "Loading the model, the rewards and the last checkpoint."
    if key == "starting":
        begun = folder.has_run(name)
        return "Making the first update. Some runs evaluate the base model before it." if begun else LOADING
    if key == "training" and folder.sampled(name) < 0:
        return "Sampling images of the base model."
    if key == "training" and (seconds := float(last.get("train_seconds", 0.0))):
        return f"About {duration(seconds / step * (steps - step))} of updates left; images and evaluations add to it."
    if key == "evaluating":
        return "Sampling the last images and evaluating them." if step >= steps else "Sampling and scoring images."
    if key == "stopping":
        return "The present update is finished, then everything is saved."
    if key == "stopped":
        return "The LoRA of its last update is saved. It resumes exactly where it stopped." if step else ""
    if key == "failed":
        return jobs.error(name, TRAIN)
    return "It was started on the command line." if key == "elsewhere" else ""


def settings_of(folder: RunsFolder, name: str) -> Settings | None:
    """Return the settings of a run as they were asked for; None if there are none that can be read."""
    for path in (folder.settings(name), folder.run(name) / CONFIG):
        if path.is_file():
            return read_once(path, settings_in)
    return None


def settings_in(path: Path) -> Settings | None:
    """Return the settings in a file; None if they cannot be read."""
    try:
        return read_settings(path)
    except DraftuneError:
        return None


def check_state(folder: RunsFolder, jobs: Jobs, name: str) -> dict[str, Any] | None:
    """Return the state of a draft's check: whether it is running, its error, or its result; None if there was none."""
    if (job := jobs.get(name, CHECK)) is None:
        return None
    if not job.ended:
        return {"busy": True, "waiting": job.pid is None, "elapsed": elapsed(job)}
    if result := read_json(folder.record(name) / RESULT):
        first, best = result["trials"][0], result["trials"][-1]
        return {"busy": False, "result": result, "fits_as_asked": result["fits"] and not result["changes"]} | {
            "first": first,
            "best": best,
        }
    return {"busy": False, "error": "" if job.stopped else jobs.error(name, CHECK)}


def elapsed(job: Job) -> str:
    """Return how long a job has been running; nothing if the clock was set back since."""
    return duration(max(0.0, time.time() - job.since))


def sweep_state(jobs: Jobs, name: str) -> dict[str, Any]:
    """Return whether the scales of a run's LoRA are being compared, and whether the last comparison ended well."""
    job = jobs.get(name, SWEEP)
    if job is None or not job.ended:
        return {"busy": False} if job is None else {"busy": True, "waiting": job.pid is None, "elapsed": elapsed(job)}
    written = stamp_of(jobs.result(name, SWEEP)) not in (None, job.before)
    return {"busy": False, "done": written, "error": "" if written or job.stopped else jobs.error(name, SWEEP)}
