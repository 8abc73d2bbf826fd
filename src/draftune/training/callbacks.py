"""Callbacks: your code at fixed points of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

    from draftune.training.trainer import Trainer


class Samples(NamedTuple):
    """Sample images of one update.

    Attributes:
        images: One image of each prompt.
        prompts: The prompts.
        scores: The reward of each image.
    """

    images: Sequence[Image]
    prompts: Sequence[str]
    scores: Sequence[float]

    def rows(self) -> Iterator[tuple[Image, str, float]]:
        """Yield each image with its prompt and its score."""
        return zip(self.images, self.prompts, self.scores, strict=True)


class Callback:
    """Base class of callbacks. Override the methods of the events that you need.

    With several processes, each process calls its own callbacks. An exception in a callback ends the run with an error
    that names the callback. To end a run early without an error, set `trainer.should_stop = True`.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Handle the start of training, before the first evaluation."""

    def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
        """Handle the end of an update.

        Args:
            step: Number of the update, from 1.
            logs: Its row of metrics.jsonl.
        """

    def on_evaluate(self, step: int, row: Mapping[str, Any]) -> None:
        """Handle an evaluation.

        The base model is evaluated right before the first evaluation of the fine-tuned model.

        Args:
            step: Number of updates before it; 0 is the base model.
            row: Its row of evaluations.jsonl.
        """

    def on_sample(self, step: int, samples: Samples) -> None:
        """Handle a grid of sample images.

        That of the base model comes after the first update.

        Args:
            step: Number of updates before it; 0 is the base model.
            samples: The images with their prompts and scores.
        """

    def on_save(self, step: int) -> None:
        """Handle a checkpoint, saved after update `step`."""

    def on_train_end(self) -> None:
        """Handle the end of training, also if an error or an interruption ended it."""
