"""The results of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftune.evaluation.metrics import Comparison


@dataclass
class Run:
    """The results of a training run.

    Attributes:
        folder: The run's folder.
        metrics: The rows of metrics.jsonl, one for each update.
        evaluations: The rows of evaluations.jsonl.
        comparison: The base model against the fine-tuned one; None without evaluation prompts.
    """

    folder: Path
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    comparison: Comparison | None
