"""Training: the loop, its checks, its folder."""

from draftune.training.loop import Run, Trainer
from draftune.training.start import train

__all__ = ["Run", "Trainer", "train"]
