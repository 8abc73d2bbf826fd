"""Training: `Trainer`, its callbacks, and what it is made of."""

from draftune.training.callbacks import Callback
from draftune.training.result import Run
from draftune.training.train import train
from draftune.training.trainer import Trainer

__all__ = ["Callback", "Run", "Trainer", "train"]
