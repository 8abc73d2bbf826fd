"""The experiment on rewards without a gradient: what it says of runs that were made up for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftune.reproduce.lab import DIVERSITY, FULL, JUDGE, NAMED, QUICK, Lab, Record, Work
from draftune.reproduce.no_gradient import ABOVE, CLIMBED, NO_GRADIENT, OVER, RATES, SHARE, SIZE, SMALLER, refused

PICTURES, LATENTS, EXACT = (way.name for way in SMALLER)
STAYS, FALLS, PLAIN = (way.name for way in OVER)
Ends = dict[str, tuple[float, float]]
"""For each way the value after its run, and how far the second seed is from the first."""


class MadeUp(Lab):
    """Runs from 1.5 kB and no picture above the level to where they end; DDPO is best at its middle learning rate."""

    def __init__(self, folder: Path, ends: Ends) -> None:
        super().__init__(folder, FULL)
        self.ends = ends

    def run(self, work: Work) -> Record:
        way = next((way.name for way in (*SMALLER, *OVER) if way.reward == work.settings["reward"]), "DDPO")
        if work.settings["reward"] == ABOVE:
            way = STAYS if work.settings.get("smoothing_power") == 0 else FALLS
        end, apart = self.ends[way]
        if way == "DDPO":
            end += abs(RATES.index(work.settings["learning_rate"]) - 1) / 10
        end += apart * work.seed
        rows = []
        for step in (0, work.steps // 2, work.steps):
            done = step / work.steps
            rows.append({"step": float(step), "reward_queries": 10.0 * step, JUDGE: 0.5, NAMED: 1.0, DIVERSITY: 0.4})
            rows[-1] |= {SIZE: -1.5 + done * (1.5 - end), SHARE: done * end, CLIMBED: 4.0 + done}
        return Record([], rows, self.folder)

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        return "it is refused."


ENDS: Ends = {
    PICTURES: (1.3, 0.01),
    LATENTS: (1.45, 0.01),
    EXACT: (1.35, 0.0),
    "DDPO": (1.49, 0.0),
    STAYS: (0.3, 0.01),
    FALLS: (0.5, 0.01),
    PLAIN: (0.9, 0.0),
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ["confirmed", "weaker", "confirmed", "confirmed"]),
        ({PICTURES: (1.49, 0.2), FALLS: (0.2, 0.01)}, ["not seen", "weaker", "confirmed", "reversed"]),
        ({LATENTS: (1.6, 0.01), STAYS: (0.5, 0.2)}, ["confirmed", "reversed", "confirmed", "not seen"]),
    ],
)
def test_ways_are_held_against_each_other(tmp_path: Path, changed: Ends, words: list[str]) -> None:
    report = NO_GRADIENT.report(MadeUp(tmp_path, ENDS | changed))
    assert [claim.verdict for claim in report.claims] == words


def test_what_is_told(tmp_path: Path) -> None:
    report = NO_GRADIENT.report(MadeUp(tmp_path, ENDS))
    assert report.claims[0].measured == "-195 bytes; -150 by the differentiable JPEG"
    assert "the base model's pictures are 1500 bytes" in report.text
    assert "DDPO 1490 bytes with 200 scored pictures" in report.text
    assert "after 200 scored pictures the estimate by pictures is at 1402 bytes" in report.text
    assert "(1590 bytes at 0.0003, 1490 bytes at 0.001, 1590 bytes at 0.003);" in report.text
    table = {row["way"]: row for row in report.table}
    assert table[PICTURES]["kB"] == pytest.approx(1.305)
    assert table[FALLS]["above"] == pytest.approx(0.505)
    assert "above" not in table["DDPO"]
    assert len(report.rows) == 6 * 2 * 3 + 3


def test_the_search_is_part_of_the_work() -> None:
    rates = [work.settings["learning_rate"] for work in NO_GRADIENT.work(FULL) if work.method.startswith("ddpo")]
    assert rates == list(RATES)
    assert len(NO_GRADIENT.work(QUICK)) == len(SMALLER) + len(OVER) + 1


def test_the_threshold_as_it_is_is_refused(tmp_path: Path) -> None:
    said = refused(Lab(tmp_path, QUICK))
    assert said.startswith("as it is, without smoothing, it is refused before training (“the reward 'above(emoji-")
