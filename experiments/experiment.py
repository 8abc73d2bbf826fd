"""What an experiment is: jobs that processes share, claims with intervals, sentences, and a figure."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from experiments.budget import Budget
from experiments.runner import BusyError, ExperimentRunner, Row, RunSpec
from experiments.statistics import Effect, verdict


@dataclass(frozen=True)
class Job:
    """A part of an experiment that one process measures at a time; its rows are stored.

    Attributes:
        name: The name of the stored rows, different from those of all other jobs.
        measure: Trains and measures, and returns rows of the csv file. It may need the rows of other jobs.
        specs: Runs that it trains and evaluates, for the estimate of its time.
        images: Number of further images that it samples, for the estimate.
        seconds: Returns the seconds of other work, for the estimate.
    """

    name: str
    measure: Callable[[ExperimentRunner], list[Row]]
    specs: Sequence[RunSpec] = ()
    images: int = 0
    seconds: Callable[[ExperimentRunner], float] | None = None

    def rows(self, runner: ExperimentRunner, wait: bool = True) -> list[Row]:
        return list(runner.cached(f"job {self.name}", partial(self.measure, runner), wait))

    def is_done(self, runner: ExperimentRunner) -> bool:
        return runner.is_measured(f"job {self.name}")


def curve_job(experiment: str, spec: RunSpec, **columns: Any) -> Job:
    """Return the job whose rows are a run's evaluations, with further columns."""
    words = [experiment, *map(str, columns.values()), f"seed={spec.seed}"]
    return Job(" ".join(words), lambda runner: [columns | row for row in runner.curve(spec)], [spec])


@dataclass(frozen=True)
class Claim:
    """A row of the summary table."""

    text: str
    effect: Effect
    verdict: str
    form: str = "{:+.3g}"


def claim(text: str, effect: Effect, margin: float, direction: int = 1, form: str = "{:+.3g}") -> Claim:
    """Return a claim with the verdict of its interval; `experiments.statistics.verdict` has the arguments."""
    return Claim(text, effect, verdict(effect, margin, direction, form), form)


@dataclass(frozen=True)
class Panel:
    """One plot of a figure: the median over seeds, with its distribution-free interval as a band or bar.

    Attributes:
        x, y: Columns of the axes.
        by: Column whose values become separate lines; "" for one line.
        key: Column of the points of a line, each with one row of every seed; default: `x`.
        kind: "line", "points", or "names" where x is a text.
        where: Values that a row must have to be shown, or tuples of them.
    """

    x: str
    y: str
    by: str = "method"
    key: str = ""
    kind: str = "line"
    log: bool = False
    xlabel: str = ""
    ylabel: str = ""
    where: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Experiment:
    """A question, the jobs that answer it, and how the answer is written.

    Attributes:
        setting: Sentences of the setting.
        jobs: Returns the jobs; their rows are those of `NAME.csv`, from which all else is made.
        claims: Returns rows of the summary table.
        answer: Returns sentences of the answer and its limits, each an item of a list.
        panels: Plots of `NAME.png`.
        columns: Columns of panels in the figure.
        image: Returns sample images for `NAME_images.png`, if the experiment shows any.
        needs_examples: Whether the experiment needs real images (`--examples`).
    """

    title: str
    question: str
    setting: str
    jobs: Callable[[Budget], list[Job]]
    claims: Callable[[list[Row]], list[Claim]]
    answer: Callable[[list[Row]], list[str]]
    panels: Sequence[Panel]
    columns: int = 2
    image: Callable[[ExperimentRunner], Image.Image] | None = None
    needs_examples: bool = False


def work(jobs: Iterable[Job], runner: ExperimentRunner, pause: float = 5.0) -> None:
    """Do all jobs that no other process does, then wait for those of other processes."""
    pending = list(jobs)
    while pending:
        busy = []
        for number, job in enumerate(pending, 1):
            if not job.is_done(runner):
                print(f"job {number} of {len(pending)}: {job.name}", file=sys.stderr)
            try:
                job.rows(runner, wait=False)
            except BusyError:
                busy.append(job)
        if len(busy) == len(pending):
            time.sleep(pause)
        pending = busy


def estimate(jobs: Iterable[Job], runner: ExperimentRunner, known: set[str]) -> float:
    """Return the seconds of the jobs that are not done, by timings of this machine.

    Args:
        jobs: The jobs.
        runner: The runner.
        known: Runs and evaluations that were counted before; it is extended.
    """
    total, per_image = 0.0, runner.seconds_per_image()
    evaluated = per_image * runner.budget.images_per_prompt * len(runner.eval_prompts)
    for job in (job for job in jobs if not job.is_done(runner)):
        total += job.images * per_image + (job.seconds(runner) if job.seconds else 0.0)
        for spec in job.specs:
            batches = spec.settings.get("gradient_accumulation_steps", 1)
            cost = runner.cost(spec.method, spec.settings.get("batch_size", 4))["seconds"] * batches
            new = [update for update in spec.updates if f"{spec.name} {update}" not in known]
            done = max((u for u in spec.updates if u not in new), default=0)
            total += max(0, spec.steps - done) * cost + len(new) * evaluated
            known |= {f"{spec.name} {update}" for update in new}
    return total


def by_seed(rows: Sequence[Row], column: str, **where: Any) -> list[float]:
    """Return a column's values of the rows with the given values, in the order of their seeds."""
    own = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
    return [float(row[column]) for row in sorted(own, key=lambda row: row["seed"])]


def curves_by_seed(rows: Sequence[Row], **where: Any) -> list[list[Row]]:
    """Return the rows with the given values, of each seed in the order of updates."""
    own = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
    seeds = sorted({row["seed"] for row in own})
    return [sorted((r for r in own if r["seed"] == seed), key=lambda r: r["update"]) for seed in seeds]
