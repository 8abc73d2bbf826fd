"""Experiment trackers: TensorBoard, Weights & Biases and Trackio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from draftune.errors import out_of_memory, require
from draftune.settings import Settings
from draftune.training.callbacks import Callback, Samples
from draftune.utils.logging import logger

if TYPE_CHECKING:
    from PIL.Image import Image

    from draftune.training.trainer import Trainer


class Tracker(Protocol):
    """A started run of a tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_samples(self, samples: Samples, step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Write scalars to an event file in the run's folder `tensorboard/`.

    A resumed run discards the events after its checkpoint.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def log_samples(self, samples: Samples, step: int) -> None:
        for i, (image, prompt, _) in enumerate(samples.rows()):
            self.writer.add_image(f"samples/{i:02d} {prompt}", np.asarray(image), step, dataformats="HWC")

    def finish(self) -> None:
        self.writer.close()


class Hosted:
    """Send numbers, images and tables to wandb or trackio, which have the same functions.

    A run of the project "draftune" is started, with the settings and the name of the run's folder.
    """

    def __init__(self, name: str, trainer: Trainer) -> None:
        self.module: Any = require(name, f"report_to={name}", name)
        self.run = self.module.init(project="draftune", name=trainer.folder.path.name, config=asdict(trainer.settings))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_samples(self, samples: Samples, step: int) -> None:
        def image(values: tuple[Image, str, float]) -> Any:
            return self.module.Image(values[0], caption=f"{values[1]} ({values[2]:.3g})")

        data = [[row[1], row[2], image(row)] for row in samples.rows()]
        table = self.module.Table(columns=["prompt", "reward", "image"], data=data)
        images = {f"samples/{i:02d}": image(row) for i, row in enumerate(samples.rows())}
        self.run.log({**images, "samples/table": table}, step=step)

    def finish(self) -> None:
        self.run.finish()


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
    """Send the numbers of metrics.jsonl, those of evaluations.jsonl under `eval/`, and sample images to trackers.

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
                self.trackers[name] = Hosted(name, trainer)

    def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
        self.each(lambda tracker: tracker.log(numbers(logs), step=step))

    def on_evaluate(self, step: int, row: Mapping[str, Any]) -> None:
        metrics = {f"eval/{name}": value for name, value in numbers(row).items()}
        self.each(lambda tracker: tracker.log(metrics, step=step))

    def on_sample(self, step: int, samples: Samples) -> None:
        self.each(lambda tracker: tracker.log_samples(samples, step=step))

    def on_train_end(self) -> None:
        self.each(lambda tracker: tracker.finish())

    def each(self, action: Callable[[Tracker], None]) -> None:
        """Call an action with every tracker, and stop those that fail: a run outlives its trackers."""
        for name, tracker in list(self.trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                if out_of_memory(error):
                    raise
                del self.trackers[name]
                logger.warning("the tracker %s is stopped: %s", name, getattr(error, "strerror", None) or error)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of a row that are numbers, without truth values, lists, tables and the step."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "step"}
