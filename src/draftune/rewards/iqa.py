"""Image quality metrics of the package pyiqa, where the user has installed it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError, first_line, out_of_memory, unknown
from draftune.rewards.base import Reward, register
from draftune.utils.logging import logger
from draftune.utils.weightless import fake_mode

LICENSE = "pyiqa's license is PolyForm Noncommercial 1.0.0, and parts of it are S-Lab's: no commercial use"
NO_BACKWARD = (
    *("brisque", "brisque_matlab", "entropy", "ilniqe", "niqe", "niqe_matlab", "nrqm", "pi", "piqe"),
    *("compare2score", "qalign", "qalign_4bit", "qalign_8bit"),
    *("qrealign", "qrealign-lite", "qrealign-mini", "qrealign-pro"),
    *("topiq_nr-face", "topiq_nr-face-v1", "topiq_nr_swin-face"),
)
"""Metrics that pyiqa 0.1.16 computes without a gradient: it rounds, sorts, or converts the image to NumPy or PIL."""
NOT_OF_ONE_IMAGE = ("clipscore", "fid", "fid_dinov2", "inception_score", "sfid")
"""Metrics that pyiqa counts as needing no reference, but that need captions or sets of images."""


@register("iqa")
class ImageQuality(Reward):
    """Any no-reference metric of image quality in the package pyiqa: `iqa(metric=musiq)`; higher is always better.

    `metric`: a name that pyiqa knows, such as musiq, topiq_nr, clipiqa, liqe or maniqa; its range is the metric's, and
    the sign is turned where lower is better. `gradient=False` is for evaluation and for `zeroth_order`, and allows
    metrics without a backward pass such as niqe and brisque. It ignores the prompts. Input: any size.
    draftune does not install pyiqa, whose license is PolyForm Noncommercial 1.0.0: `pip install pyiqa`. pyiqa downloads
    a metric's weights to its own cache. Source: github.com/chaofengc/IQA-PyTorch; each metric has its own paper.
    Over-optimized: never run on published weights, so not known. Better suited as evaluation rewards.
    """

    def __init__(self, metric: str, gradient: bool = True) -> None:
        super().__init__()
        self.metric_name, self.gradient = metric, gradient
        pyiqa = import_pyiqa()
        check_metric(pyiqa, metric, gradient)
        if fake_mode() is None:
            # pyiqa downloads and reads weights at once, so the constructor does both. It refuses missing ones so.
            self.metric = create_metric(pyiqa, metric, gradient)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if fake_mode() is not None:
            raise DraftuneError("the memory of a metric of pyiqa can't be counted: leave out --count")
        sign = -1 if self.metric.lower_better else 1
        return torch.stack([sign * self.value(image[None]) for image in images])

    def value(self, image: Tensor) -> Tensor:
        """Return the metric of an image [1, 3, H, W] as a number."""
        value = self.metric(image)
        value = value[0] if isinstance(value, tuple) else value
        return torch.as_tensor(value, device=image.device).reshape(())


def import_pyiqa() -> Any:
    """Return the module pyiqa. Raises DraftuneError if it can't be imported."""
    try:
        return importlib.import_module("pyiqa")
    except Exception as error:  # its own imports fail in many ways
        raise DraftuneError(
            f"the reward iqa needs the package pyiqa: pip install pyiqa ({first_line(error)})"
        ) from error


def check_metric(pyiqa: Any, metric: str, gradient: bool) -> None:
    """Raise DraftuneError for a metric that pyiqa does not have, or that can't be this reward."""
    if metric not in pyiqa.list_models():
        raise unknown("metric of pyiqa", metric, pyiqa.list_models())
    if metric not in pyiqa.list_models("NR") or metric in NOT_OF_ONE_IMAGE:
        raise DraftuneError(f"the metric {metric!r} compares an image with others or a caption; iqa scores one image")
    if gradient and metric in NO_BACKWARD:
        raise DraftuneError(
            f"the metric {metric!r} has no backward pass: train with zeroth_order(iqa(metric={metric!r}, "
            "gradient=False)), or take another metric such as musiq"
        )


def create_metric(pyiqa: Any, metric: str, gradient: bool) -> Any:
    """Load a metric. Raises DraftuneError if pyiqa can't, mostly because it can't download the weights."""
    tell_license()
    try:
        options = {"loss_reduction": "none", "check_input_range": False, "device": torch.device("cpu")}
        return pyiqa.create_metric(metric, as_loss=gradient, **options)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(
            f"pyiqa can't load the metric {metric!r}, whose weights it downloads to its cache: {first_line(error)}"
        ) from error


@functools.cache
def tell_license() -> None:
    """Log pyiqa's license, once in a process."""
    logger.warning("%s", LICENSE)
