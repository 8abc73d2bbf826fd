"""Evaluate a LoRA at several scales with the same prompts and seeds, and recommend a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.evaluation.criterion import DENOISER_MSE, PIXEL_L1, default_criterion, parse_criterion, weighted_sum
from draftune.evaluation.eval_spec import EvalSpec
from draftune.evaluation.metrics import Evaluation, denoiser_mse_from_base, interval
from draftune.evaluation.reward_check import tell_truncated
from draftune.evaluation.verdict import UNDECIDED, direction
from draftune.lora import ADAPTER, set_lora_scale
from draftune.registry.expression import written_sum
from draftune.runs.load import LoRASource, load_base_with_loras
from draftune.utils.devices import default_device
from draftune.utils.images import grid, save_image, save_images
from draftune.utils.paths import atomic_write
from draftune.utils.plotting import figure, save
from draftune.utils.tables import NAME, shortened, write_csv, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass
class ScalePoint:
    """The evaluation at one scale.

    Attributes:
        scale: The LoRA scale.
        evaluation: Scores of all images; prompts and images only of those in the grids.
        captions: Captions of these images.
    """

    scale: float
    evaluation: Evaluation
    captions: list[str]


@dataclass
class ScaleSweep:
    """Evaluations of a LoRA at several scales.

    Attributes:
        marks: The evaluations, by increasing scale.
        weights: The criterion of the best scale, a weight for each column; empty for none.
    """

    marks: list[ScalePoint]
    weights: dict[str, float]

    @property
    def scales(self) -> list[float]:
        """Return the scales, in increasing order."""
        return [mark.scale for mark in self.marks]

    @property
    def columns(self) -> dict[str, list[float]]:
        """Return the mean at every scale, by column."""
        return by_name([mark.evaluation.scores for mark in self.marks])

    @property
    def stderr(self) -> dict[str, list[float]]:
        """Return the standard error of the mean at every scale, by column."""
        return by_name([mark.evaluation.stderr for mark in self.marks])

    @property
    def criterion(self) -> Tensor:
        """Return the criterion's values [scales, prompts]. Raises DraftuneError for an unknown column."""
        rows = [{name: v.double().mean(1) for name, v in mark.evaluation.values.items()} for mark in self.marks]
        return torch.stack([weighted_sum(self.weights, row) for row in rows])

    @property
    def recommended(self) -> float | None:
        """Return the recommended scale, None without a criterion (see `recommend`)."""
        return recommend(self.scales, self.criterion) if self.weights else None

    @property
    def improvement(self) -> tuple[float, float, float] | None:
        """Return by how much the recommended scale's criterion is above the base model's, and its 95 % interval."""
        if not self.recommended or 0.0 not in self.scales:
            return None
        recommended, base = (self.criterion[self.scales.index(scale)] for scale in (self.recommended, 0.0))
        return float((recommended - base).mean()), *interval(recommended - base)

    @property
    def prompts(self) -> list[str]:
        """Return the prompts in the image grids."""
        return list(map(str, self.marks[0].evaluation.prompts))

    @property
    def rule(self) -> str | None:
        """Return the criterion as an expression, None without one."""
        return written_sum([(weight, column) for column, weight in self.weights.items()]) or None

    @property
    def advice(self) -> str:
        """Explain the recommendation in one sentence, or why there is none."""
        if not self.weights:
            return (
                "no scale is recommended: there are no evaluation rewards (--eval-rewards), and the training reward "
                "usually rises with the scale"
            )
        if self.recommended is None:
            return "no scale is recommended: this needs finite scores of at least two prompts"
        values = self.criterion.mean(1).tolist()
        here, top = values[self.scales.index(self.recommended)], max(filter(math.isfinite, values))
        text = f"recommended: {self.recommended:g}, by {self.rule}: {here:.4f}"
        if here < top:
            text += f"; {top:.4f} at {self.scales[values.index(top)]:g} is higher by at most one standard error"
        if self.recommended == 0:
            text += "; the LoRA is not measurably better than the base model by this criterion"
        elif self.improvement and direction(*self.improvement[1:]) <= 0:
            change, low, high = self.improvement
            text += f"; {UNDECIDED} to the base model yet: {change:+.4f} ({low:+.4f} to {high:+.4f})"
        elif self.recommended == self.scales[-1]:
            text += "; try larger scales too (--scales)"
        return text

    def table(self) -> str:
        """Format a table: a column for each scale, a line for each score and one for its standard error."""
        width = min(NAME, max(len("LoRA scale"), *map(len, self.columns)))
        lines = [f"{'LoRA scale':{width}}" + "".join(f" {scale:>8g}" for scale in self.scales)]
        for label, values in self.columns.items():
            lines.append(f"{shortened(label, width):{width}}" + "".join(f" {value:8.4f}" for value in values))
            lines.append(f"{'±':>{width}}" + "".join(f" {error:8.4f}" for error in self.stderr[label]))
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write sweep.png, sweep.csv, sweep.json and a folder of images for each scale."""
        names = [scale_name(scale) for scale in self.scales]
        rows = [mark.evaluation.images for mark in self.marks]
        files = [save_images(images, folder / name) for name, images in zip(names, rows, strict=True)]
        captions = [mark.captions for mark in self.marks]
        save_image(grid(rows, names, self.prompts, captions), folder / "sweep.png")
        columns, stderr = self.columns, self.stderr
        table = [
            {"scale": scale, "score": label, "value": columns[label][i], "stderr": stderr[label][i]}
            for i, scale in enumerate(self.scales)
            for label in columns
        ]
        write_csv(folder / "sweep.csv", table)
        data: dict[str, Any] = {"scales": self.scales, "columns": columns, "stderr": stderr}
        data |= {"criterion": self.rule, "recommended": self.recommended, "improvement": self.improvement}
        data |= {"prompts": self.prompts}
        images = [[f"{name}/{path.name}" for path in paths] for name, paths in zip(names, files, strict=True)]
        write_json(folder / "sweep.json", data | {"images": images})

    def write_curves(self, folder: Path) -> None:
        """Write curve.png. Raises DraftuneError if matplotlib is not installed."""
        figure = self.figure()
        with atomic_write(folder / "curve.png") as temporary:
            save(figure, str(temporary))

    def figure(self) -> Figure:
        """Plot each score against the scale, ± 2 standard errors, with a vertical line at the recommended scale."""
        panels = {label: (values, self.stderr[label]) for label, values in self.columns.items()}
        if self.rule and self.rule not in panels:
            panels["criterion"] = self.criterion.mean(1).tolist(), standard_error(self.criterion).tolist()
        across = min(3, len(panels))
        plot, axes = figure(math.ceil(len(panels) / across), across, width=3.4, height=2.6)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (label, (values, errors)) in zip(axes.flat, panels.items(), strict=False):
            (line,) = axis.plot(self.scales, values, marker=".")
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-2, 2))
            axis.fill_between(self.scales, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
            if self.recommended is not None:
                axis.axvline(self.recommended, color="#666666", linewidth=0.8, linestyle="--")
            axis.set_title(shortened(label), fontsize=9)
            axis.set_xlabel("LoRA scale")
        return plot


def scale_name(scale: float) -> str:
    """Format a scale as a folder name, with two decimals where these are exact: "0.75", "1.00", "0.333"."""
    short = f"{scale:.2f}"
    return short if float(short) == scale else str(scale)


def sweep(
    tuned: LoRASource,
    yardstick: EvalSpec,
    scales: Sequence[float] = SCALES,
    metric_for_best_model: str | None = None,
    device: str = "auto",
) -> ScaleSweep:
    """Evaluate a LoRA at several scales and at 0, the base model.

    Args:
        tuned: The LoRA. Its settings say in which precision and quantization the base model is loaded.
        yardstick: The specification of the evaluation.
        scales: The scales.
        metric_for_best_model: The criterion, a weighted sum of columns as in `Settings.metric_for_best_model`. Default:
            that of the LoRA's run.
        device: "auto", "cpu", "mps", "cuda" or "cuda:N".

    Raises:
        DraftuneError: the LoRA does not fit its model, or the criterion has an unknown column.
    """
    settings = tuned.settings
    metric_for_best_model = settings.metric_for_best_model if metric_for_best_model is None else metric_for_best_model
    columns = parse_criterion(metric_for_best_model) if metric_for_best_model else {}
    yardstick.ready(default_device(device))
    model = load_base_with_loras({ADAPTER: tuned}, device)
    tell_truncated(yardstick.prompts, model, yardstick.rewards, settings.negative_prompt)
    shown = [yardstick.prompts[i] for i in yardstick.shown]
    marks: list[ScalePoint] = []
    weights: dict[str, float] = {}
    # The base model is first: the other images are compared with its images.
    order = [0.0, *sorted({*scales} - {0.0})]
    for scale in tqdm(order, desc="scales", leave=False, disable=None):
        set_lora_scale(model, scale)
        now = yardstick.measure(model, settings)
        if not marks:
            base = now.images
        distance = (now.images - base).abs().mean((1, 2, 3))
        now.values[PIXEL_L1] = distance.reshape(len(yardstick.prompts), yardstick.num_images)
        if DENOISER_MSE in columns:
            few = yardstick.prompts[: settings.batch_size]
            schedule = model.schedule(settings.num_inference_steps)
            mse = denoiser_mse_from_base(model, few, schedule, settings.guidance_scale, settings.negative_prompt)
            now.values[DENOISER_MSE] = torch.full((len(yardstick.prompts), 1), mse)
        if not marks:
            weights = default_criterion(metric_for_best_model, yardstick.eval_rewards)
            weighted_sum(weights, now.scores)  # an unknown column fails now, not after all scales
        images, captions = yardstick.show(now)
        # All images of all scales would take too much memory.
        marks.append(ScalePoint(scale, Evaluation(now.values, shown, images), captions))
    return ScaleSweep(sorted(marks, key=lambda mark: mark.scale), weights)


def standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean of each row of [scales, prompts]; NaN with one prompt."""
    return values.std(1) / values.shape[1] ** 0.5


def by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Turn rows into columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def recommend(scales: Sequence[float], values: Tensor) -> float | None:
    """Choose the scale nearest to 0 whose criterion is at most one standard error below the highest.

    The standard error is that of the difference to the best scale, paired by prompt: the spread between prompts does
    not count. This is the one-standard-error rule (Breiman et al., 1984, Classification and Regression Trees).

    Args:
        scales: The scales.
        values: The criterion [scales, prompts].

    Returns:
        The scale, or None with one prompt or without finite values.
    """
    means = values.mean(1)
    if values.shape[1] < 2 or not means.isfinite().any():
        return None
    best = int(means.nan_to_num(-math.inf, -math.inf, -math.inf).argmax())
    loss = values[best] - values
    close = loss.mean(1) <= standard_error(loss)
    return min((scale for scale, near in zip(scales, close.tolist(), strict=True) if near), key=abs)
