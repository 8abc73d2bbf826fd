"""Training: the loop, its checks, its folder."""

from draftune.training.loop import Run, Trainer, train

__all__ = ["Run", "Trainer", "train"]
