"""LoRAs beside their base model and beside each other: the same prompts, seeds and rewards for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from draftune.errors import unknown
from draftune.evaluation.eval_spec import Yardstick
from draftune.evaluation.metrics import Comparison, Paired
from draftune.evaluation.reward_check import tell_truncated
from draftune.lora import set_lora_scales
from draftune.models.base import default_device
from draftune.runs.load import Tuned, open_loras
from draftune.utils.images import grid, save_image, to_pil
from draftune.utils.tables import NAME, shortened, write_csv, write_json


@dataclass
class Entry:
    """A LoRA, its scores beside those of its base model's pictures, and which set of these it was, from 0."""

    tuned: Tuned
    scores: dict[str, Paired]
    base: int


@dataclass
class Leaderboard:
    """LoRAs, the one with the highest score by the name `sort` first."""

    entries: list[Entry]
    yardstick: Yardstick
    lora_scale: float
    sort: str

    def table(self) -> str:
        """One LoRA: a row for each score. Several: for each score a row for each LoRA, the deciding score first."""
        prompts, each = len(self.yardstick.prompts), self.yardstick.num_images
        lines = [f"base → tuned, {prompts * each} pictures of {prompts} prompts, the same seeds"]
        names = list(self.entries[0].scores)
        if len(self.entries) == 1:
            return "\n".join([*lines, *block("score", self.entries[0].scores.items())])
        sets = [[e.tuned.source for e in self.entries if e.base == i] for i in sorted({e.base for e in self.entries})]
        if len(sets) > 1:
            lines.append("Models or ways of drawing differ; those with the same base pictures are in one line:")
            lines += [f"  {', '.join(sources)}" for sources in sets]
        for name in sorted(names, key=lambda name: name != self.sort):
            lines += ["", *block(name, ((e.tuned.source, e.scores[name]) for e in self.entries))]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One for each LoRA and score."""
        prompts, each = len(self.yardstick.prompts), self.yardstick.num_images
        return [
            {"source": e.tuned.source, "score": name, **asdict(score), "pictures": prompts * each, "prompts": prompts}
            for e in self.entries
            for name, score in e.scores.items()
        ]

    def write(self, path: Path) -> None:
        """Writes the rows as .csv, or as .json with what they were measured by."""
        if path.suffix.lower() == ".csv":
            write_csv(path, self.rows())
            return
        y = self.yardstick
        settings = {
            "reward": y.reward.expression or y.reward.label,
            "held_out": y.held_out and (y.held_out.expression or y.held_out.label),
            "prompts": list(map(str, y.prompts)),
            "num_images": y.num_images,
            "lora_scale": self.lora_scale,
            "sources": {e.tuned.source: {**e.tuned.drawing, "base_pictures": e.base} for e in self.entries},
        }
        write_json(path, {"settings": settings, "scores": self.rows()})


def block(title: str, rows: Iterable[tuple[str, Paired]]) -> list[str]:
    """A printed table of scores."""
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
    loras: Sequence[Tuned],
    yardstick: Yardstick,
    sort: str | None = None,
    lora_scale: float = 1.0,
    cpu: bool = False,
    precision: str = "no",
    keep: Callable[[Tuned, Comparison], None] | None = None,
) -> Leaderboard:
    """Measures LoRAs against their base models, whose pictures are drawn once where they would be the same.

    `sort` is the name of the score that decides, the reward's unless set. `keep` is shown each comparison with its
    pictures, which are then let go. Raises DraftuneError for a LoRA that does not fit its model.
    """
    groups: dict[str, list[int]] = {}
    for i, tuned in enumerate(loras):
        groups.setdefault(str(tuned.drawing), []).append(i)
    sort = sort or yardstick.reward.label
    entries = {}
    yardstick.ready(default_device(cpu))
    with tqdm(total=len(loras) + len(groups), desc="measuring", leave=False, disable=None) as progress:
        for number, group in enumerate(groups.values()):
            settings = loras[group[0]].settings
            model = open_loras({f"lora{i}": loras[i] for i in group}, cpu, precision)
            tell_truncated(yardstick.prompts, model, yardstick.rewards if number == 0 else (), settings.negative_prompt)
            set_lora_scales(model, {f"lora{group[0]}": 0.0})
            base = yardstick.measure(model, settings)
            progress.update()
            if sort not in base.values:
                raise unknown("score", sort, base.values)
            for i in group:
                set_lora_scales(model, {f"lora{i}": lora_scale})
                comparison = Comparison(base, yardstick.measure(model, settings))
                entries[i] = Entry(loras[i], comparison.paired(), number)
                if keep:
                    keep(loras[i], comparison)
                progress.update()
            del model  # before the next group's is loaded beside it
    ranked = sorted(entries.items(), key=lambda item: (-rank(item[1].scores[sort].tuned), item[0]))
    return Leaderboard([entry for _, entry in ranked], yardstick, lora_scale, sort)


def rank(score: float) -> float:
    """What is not a number comes last."""
    return -math.inf if math.isnan(score) else score


def save_pictures(comparison: Comparison, yardstick: Yardstick, folder: Path) -> None:
    """base/NN.png and tuned/NN.png, the pictures of one prompt beside each other, and before_after.png of a few."""
    both = {"base": comparison.base, "tuned": comparison.tuned}
    digits = max(2, len(str(len(comparison.prompts) - 1)))
    for name, evaluation in both.items():
        for i, picture in enumerate(to_pil(evaluation.images)):
            save_image(picture, folder / name / f"{i:0{digits}d}.png")
    rows, captions = zip(*map(yardstick.show, both.values()), strict=True)
    save_image(
        grid(rows, list(both), [yardstick.prompts[i] for i in yardstick.shown], captions), folder / "before_after.png"
    )
