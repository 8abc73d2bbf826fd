"""Compare LoRAs with their base model and with each other, by the same prompts, seeds and rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from draftune.errors import unknown
from draftune.evaluation.eval_spec import EvalSpec
from draftune.evaluation.metrics import Comparison, Paired
from draftune.evaluation.reward_check import tell_truncated
from draftune.lora import set_lora_scales
from draftune.runs.load import LoRASource, load_base_with_loras
from draftune.utils.devices import default_device
from draftune.utils.images import grid, save_image, save_images
from draftune.utils.tables import NAME, shortened, write_csv, write_json


@dataclass
class LeaderboardRow:
    """A LoRA and its scores.

    Attributes:
        tuned: The LoRA.
        scores: Its scores and the base model's, by column.
        base: Number of the set of base images, from 0: LoRAs of one set have the same base images.
    """

    tuned: LoRASource
    scores: dict[str, Paired]
    base: int


@dataclass
class Leaderboard:
    """LoRAs sorted by the column `sort`, the highest first."""

    entries: list[LeaderboardRow]
    yardstick: EvalSpec
    lora_scale: float
    sort: str

    def table(self) -> str:
        """Format a row for each score of one LoRA, or a table for each score of several; the sorting score first."""
        prompts, each = len(self.yardstick.prompts), self.yardstick.num_images
        lines = [f"base → tuned, {prompts * each} images of {prompts} prompts, the same seeds"]
        names = list(self.entries[0].scores)
        if len(self.entries) == 1:
            return "\n".join([*lines, *block("score", self.entries[0].scores.items())])
        sets = [[e.tuned.source for e in self.entries if e.base == i] for i in sorted({e.base for e in self.entries})]
        if len(sets) > 1:
            lines.append("Base models or sampling settings differ. LoRAs in one line have the same base images:")
            lines += [f"  {', '.join(sources)}" for sources in sets]
        for name in sorted(names, key=lambda name: name != self.sort):
            lines += ["", *block(name, ((e.tuned.source, e.scores[name]) for e in self.entries))]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each LoRA and score."""
        prompts, each = len(self.yardstick.prompts), self.yardstick.num_images
        return [
            {"source": e.tuned.source, "score": name, **asdict(score), "images": prompts * each, "prompts": prompts}
            for e in self.entries
            for name, score in e.scores.items()
        ]

    def write(self, path: Path) -> None:
        """Write the rows as .csv, or as .json with the specification of the evaluation."""
        if path.suffix.lower() == ".csv":
            write_csv(path, self.rows())
            return
        y = self.yardstick
        settings = {
            "reward": y.reward.expression or y.reward.label,
            "eval_rewards": y.eval_rewards and (y.eval_rewards.expression or y.eval_rewards.label),
            "prompts": list(map(str, y.prompts)),
            "num_images": y.num_images,
            "lora_scale": self.lora_scale,
            "sources": {e.tuned.source: {**e.tuned.drawing, "base_images": e.base} for e in self.entries},
        }
        write_json(path, {"settings": settings, "scores": self.rows()})


def block(title: str, rows: Iterable[tuple[str, Paired]]) -> list[str]:
    """Format a table of scores: means, difference with its 95 % confidence interval, win rate."""
    rows = list(rows)
    width = min(NAME, max(len(title), *(len(name) for name, _ in rows)))
    lines = [
        f"{shortened(title, width):{width}}  {'base':>9}  {'tuned':>9}  {'change':>10}  {'95 % interval':>22}   wins"
    ]
    for name, s in rows:
        known = math.isfinite(s.low)
        between = f"{s.low:+.4f} to {s.high:+.4f}" if known else "unknown"
        line = f"{shortened(name, width):{width}}  {s.base:9.4f}  {s.tuned:9.4f}  {s.difference:+10.4f}  {between:>22}"
        lines.append(f"{line}  {s.win_rate:5.0%}")
    return lines


def compare(
    loras: Sequence[LoRASource],
    yardstick: EvalSpec,
    sort: str | None = None,
    lora_scale: float = 1.0,
    device: str = "auto",
    on_comparison: Callable[[LoRASource, Comparison], None] | None = None,
) -> Leaderboard:
    """Evaluate LoRAs and their base models. LoRAs with the same sampling settings share the base images.

    Args:
        loras: The LoRAs. Their settings say in which precision and quantization the base models are loaded.
        yardstick: The specification of the evaluation.
        sort: Column to sort by; the reward's by default.
        lora_scale: Scale of the LoRAs.
        device: "auto", "cpu", "mps", "cuda" or "cuda:N".
        on_comparison: Called with each LoRA and its comparison, whose images are released afterwards.

    Raises:
        DraftuneError: a LoRA does not fit its model, or there is no column `sort`.
    """
    groups: dict[str, list[int]] = {}
    for i, tuned in enumerate(loras):
        groups.setdefault(str(tuned.drawing), []).append(i)
    sort = sort or yardstick.reward.label
    entries = {}
    yardstick.ready(default_device(device))
    with tqdm(total=len(loras) + len(groups), desc="evaluating", leave=False, disable=None) as progress:
        for number, group in enumerate(groups.values()):
            settings = loras[group[0]].settings
            model = load_base_with_loras({f"lora{i}": loras[i] for i in group}, device)
            tell_truncated(yardstick.prompts, model, yardstick.rewards if number == 0 else (), settings.negative_prompt)
            set_lora_scales(model, {f"lora{group[0]}": 0.0})
            base = yardstick.measure(model, settings)
            progress.update()
            if sort not in base.values:
                raise unknown("score", sort, base.values)
            for i in group:
                set_lora_scales(model, {f"lora{i}": lora_scale})
                model.lora_steps = loras[i].lora_steps
                comparison = Comparison(base, yardstick.measure(model, settings))
                entries[i] = LeaderboardRow(loras[i], comparison.paired(), number)
                if on_comparison:
                    on_comparison(loras[i], comparison)
                progress.update()
            del model  # or two models would be in memory while the next one is loaded
    ranked = sorted(entries.items(), key=lambda item: (-rank(item[1].scores[sort].tuned), item[0]))
    return Leaderboard([entry for _, entry in ranked], yardstick, lora_scale, sort)


def rank(score: float) -> float:
    """Return the score, or -inf for NaN, which is sorted last."""
    return -math.inf if math.isnan(score) else score


def save_comparison(comparison: Comparison, yardstick: EvalSpec, folder: Path) -> None:
    """Write all images as base/NN.png and tuned/NN.png, and a grid of some prompts as before_after.png."""
    both = {"base": comparison.base, "tuned": comparison.tuned}
    for name, evaluation in both.items():
        save_images(evaluation.images, folder / name)
    rows, captions = zip(*map(yardstick.show, both.values()), strict=True)
    save_image(
        grid(rows, list(both), [yardstick.prompts[i] for i in yardstick.shown], captions), folder / "before_after.png"
    )
