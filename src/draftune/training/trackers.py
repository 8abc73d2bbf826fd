"""Experiment trackers: TensorBoard, Weights & Biases and Trackio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from draftune.errors import require
from draftune.settings import Settings
from draftune.training.callbacks import Callback
from draftune.utils.logging import logger

if TYPE_CHECKING:
    from draftune.training.trainer import Trainer


class Tracker(Protocol):
    """A started run of a tracker. `wandb.init` and `trackio.init` return such an object."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Write scalars to an event file in the run's folder `tensorboard/`.

    A resumed run discards the events after its checkpoint.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def start_hosted(name: str, trainer: Trainer) -> Tracker:
    """Start a run of wandb or trackio in the project "draftune", with the settings and the name of the run's folder."""
    module: Any = require(name, f"report_to={name}", name)
    tracker: Tracker = module.init(project="draftune", name=trainer.folder.path.name, config=asdict(trainer.settings))
    return tracker


def installed_trackers(settings: Settings) -> list[str]:
    """Return the trackers of `report_to`; unset, TensorBoard if it is installed, as diffusers' scripts use.

    Raises:
        DraftuneError: a tracker is not installed.
    """
    if settings.report_to is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    for name in settings.trackers:
        require(name, f"report_to={name}", name)
    return settings.trackers


class Trackers(Callback):
    """Send the numbers of metrics.jsonl, and those of evaluations.jsonl under `eval/`, to trackers.

    Only the main process sends them. A tracker that fails with an OSError, such as a full disk, is stopped; the run
    continues without it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.trackers: dict[str, Tracker] = {}

    def on_train_begin(self, trainer: Trainer) -> None:
        for name in self.names if trainer.processes.main else ():
            if name == "tensorboard":
                self.trackers[name] = TensorBoard(trainer.folder.path, trainer.folder.done)
            else:
                self.trackers[name] = start_hosted(name, trainer)

    def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
        self.each(lambda tracker: tracker.log(numbers(logs), step=step))

    def on_evaluate(self, step: int, row: Mapping[str, Any]) -> None:
        metrics = {f"eval/{name}": value for name, value in numbers(row).items()}
        self.each(lambda tracker: tracker.log(metrics, step=step))

    def on_train_end(self) -> None:
        self.each(lambda tracker: tracker.finish())

    def each(self, action: Callable[[Tracker], None]) -> None:
        """Call an action with every tracker, and stop those that fail with an OSError."""
        for name, tracker in list(self.trackers.items()):
            try:
                action(tracker)
            except OSError as error:
                del self.trackers[name]
                logger.warning("the tracker %s is stopped: %s", name, error.strerror or error)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of a row that are numbers, without truth values, lists, tables and the step."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "step"}
