"""Training: the loop, its checks, its folder."""

from draftune.training.train import train
from draftune.training.trainer import Run, Trainer

__all__ = ["Run", "Trainer", "train"]
