"""The LoRA's scale as a dial: the same prompts and seeds at each of its marks, and which of them to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.evaluation.criterion import DENOISER_MSE, PIXEL_L1, rule_of, weighed, weights_of
from draftune.evaluation.eval_spec import Yardstick
from draftune.evaluation.metrics import Evaluation, denoiser_mse_from_base
from draftune.evaluation.reward_check import tell_truncated
from draftune.figures import figure, save
from draftune.lora import ADAPTER, set_lora_scale
from draftune.models.base import default_device
from draftune.registry.expression import Call, Sum
from draftune.runs.load import Tuned, open_loras
from draftune.utils.images import grid, save_image, to_pil
from draftune.utils.paths import written_whole
from draftune.utils.tables import NAME, shortened, write_csv, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass
class Mark:
    """One scale of the dial: the scores, the pictures of the prompts that are shown, and their captions."""

    scale: float
    evaluation: Evaluation
    captions: list[str]


@dataclass
class Sweep:
    """A LoRA at several scales, the least first. `weights` is the rule of the best, by column; empty for none."""

    marks: list[Mark]
    weights: dict[str, float]

    @property
    def scales(self) -> list[float]:
        return [mark.scale for mark in self.marks]

    @property
    def columns(self) -> dict[str, list[float]]:
        """For each score its mean at every scale."""
        return by_name([mark.evaluation.scores for mark in self.marks])

    @property
    def errors(self) -> dict[str, list[float]]:
        """For each score the standard error of its mean at every scale."""
        return by_name([mark.evaluation.errors for mark in self.marks])

    @property
    def judged(self) -> Tensor:
        """What the rule says [scales, prompts]. Raises DraftuneError for a column that is not there."""
        rows = [{name: v.double().mean(1) for name, v in mark.evaluation.values.items()} for mark in self.marks]
        return torch.stack([weighed(self.weights, row) for row in rows])

    @property
    def recommended(self) -> float | None:
        return recommend(self.scales, self.judged) if self.weights else None

    @property
    def prompts(self) -> list[str]:
        """Those that are shown."""
        return list(map(str, self.marks[0].evaluation.prompts))

    @property
    def rule(self) -> str | None:
        """As it would be written for --best-by."""
        terms = tuple((weight, Call(column)) for column, weight in self.weights.items())
        return str(Sum(terms)) or None

    @property
    def advice(self) -> str:
        """What is recommended and why, or why nothing is."""
        if not self.weights:
            return (
                "no scale is recommended: nothing held out was measured (--held-out), and the training reward alone "
                "always says more"
            )
        if self.recommended is None:
            return "no scale is recommended: the rule wants finite scores of at least two prompts"
        values = self.judged.mean(1).tolist()
        here, top = values[self.scales.index(self.recommended)], max(filter(math.isfinite, values))
        text = f"recommended: {self.recommended:g}, by {self.rule}: {here:.4f}"
        if here < top:
            text += f"; {top:.4f} at {self.scales[values.index(top)]:g} is not more by over a standard error"
        if self.recommended == 0:
            text += "; the LoRA is no gain by this rule"
        elif self.recommended == self.scales[-1]:
            text += "; try larger ones too (--scales)"
        return text

    def table(self) -> str:
        """A column for each scale; below each score its standard error."""
        width = min(NAME, max(len("LoRA scale"), *map(len, self.columns)))
        lines = [f"{'LoRA scale':{width}}" + "".join(f" {scale:>8g}" for scale in self.scales)]
        for label, values in self.columns.items():
            lines.append(f"{shortened(label, width):{width}}" + "".join(f" {value:8.4f}" for value in values))
            lines.append(f"{'±':>{width}}" + "".join(f" {error:8.4f}" for error in self.errors[label]))
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """sweep.png, curve.png, sweep.csv, sweep.json and, in a folder for each scale, the pictures shown."""
        names = [scale_name(scale) for scale in self.scales]
        rows = [mark.evaluation.images for mark in self.marks]
        files = [[f"{name}/{i:02d}.png" for i in range(len(self.prompts))] for name in names]
        for paths, pictures in zip(files, rows, strict=True):
            for path, picture in zip(paths, to_pil(pictures), strict=True):
                save_image(picture, folder / path)
        captions = [mark.captions for mark in self.marks]
        save_image(grid(rows, names, self.prompts, captions), folder / "sweep.png")
        with written_whole(folder / "curve.png") as temporary:
            save(self.figure(), str(temporary), "png")
        columns, errors = self.columns, self.errors
        table = [
            {"scale": scale, "score": label, "value": columns[label][i], "error": errors[label][i]}
            for i, scale in enumerate(self.scales)
            for label in columns
        ]
        write_csv(folder / "sweep.csv", table)
        said: dict[str, Any] = {"scales": self.scales, "columns": columns, "stderr": errors}
        said |= {"rule": self.rule, "recommended": self.recommended, "prompts": self.prompts}
        write_json(folder / "sweep.json", said | {"pictures": files})

    def figure(self) -> Figure:
        """Each score by the scale, with twice its standard error on both sides; the recommended scale is a line."""
        panels = {label: (values, self.errors[label]) for label, values in self.columns.items()}
        if self.rule and self.rule not in panels:
            judged = self.judged
            panels["the rule of the best"] = judged.mean(1).tolist(), standard_error(judged).tolist()
        across = min(3, len(panels))
        drawn, axes = figure(math.ceil(len(panels) / across), across, width=3.4, height=2.6)
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
        return drawn


def scale_name(scale: float) -> str:
    """ "0.75", "1.00", "0.333": two digits where they say it all."""
    short = f"{scale:.2f}"
    return short if float(short) == scale else str(scale)


def sweep(
    tuned: Tuned,
    yardstick: Yardstick,
    scales: Sequence[float] = SCALES,
    best_by: str | None = None,
    cpu: bool = False,
    precision: str = "no",
) -> Sweep:
    """Draws the same prompts and seeds at every scale, and at 0, which is the base model.

    `best_by` is the rule of the best, as in the settings of a run and as its run's unless set. Raises DraftuneError
    for a LoRA that does not fit its model, and for a column of the rule that is not there.
    """
    settings = tuned.settings
    best_by = settings.best_by if best_by is None else best_by
    asked = weights_of(best_by) if best_by else {}
    yardstick.ready(default_device(cpu))
    model = open_loras({ADAPTER: tuned}, cpu, precision)
    tell_truncated(yardstick.prompts, model, yardstick.rewards, settings.negative_prompt)
    shown = [yardstick.prompts[i] for i in yardstick.shown]
    marks: list[Mark] = []
    weights: dict[str, float] = {}
    # The base model comes first: the distance is from its pictures.
    order = [0.0, *sorted({*scales} - {0.0})]
    for scale in tqdm(order, desc="scales", leave=False, disable=None):
        set_lora_scale(model, scale)
        now = yardstick.measure(model, settings)
        if not marks:
            base = now.images
        distance = (now.images - base).abs().mean((1, 2, 3))
        now.values[PIXEL_L1] = distance.reshape(len(yardstick.prompts), yardstick.num_images)
        if DENOISER_MSE in asked:
            few = yardstick.prompts[: settings.batch_size]
            schedule = model.schedule(settings.num_inference_steps)
            mse = denoiser_mse_from_base(model, few, schedule, settings.guidance_scale, settings.negative_prompt)
            now.values[DENOISER_MSE] = torch.full((len(yardstick.prompts), 1), mse)
        if not marks:
            weights = rule_of(best_by, yardstick.held_out)
            weighed(weights, now.scores)  # a column that is not there is said now, not at the end
        pictures, captions = yardstick.show(now)
        # The other pictures would take memory.
        marks.append(Mark(scale, Evaluation(now.values, shown, pictures), captions))
    return Sweep(sorted(marks, key=lambda mark: mark.scale), weights)


def standard_error(values: Tensor) -> Tensor:
    """Of the means of the rows of [scales, prompts]; one prompt has none."""
    return values.std(1) / values.shape[1] ** 0.5


def by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def recommend(scales: Sequence[float], values: Tensor) -> float | None:
    """The scale nearest to 0 that the rule, [scales, prompts], puts no more than a standard error below its highest.

    The error is that of the difference from prompt to prompt: that some prompts are judged higher than others at every
    scale says nothing of the scales. None with one prompt, which has no error, and where nothing is finite.
    """
    means = values.mean(1)
    if values.shape[1] < 2 or not means.isfinite().any():
        return None
    best = int(means.nan_to_num(-math.inf, -math.inf, -math.inf).argmax())
    lost = values[best] - values
    close = lost.mean(1) <= standard_error(lost)
    return min((scale for scale, near in zip(scales, close.tolist(), strict=True) if near), key=abs)
