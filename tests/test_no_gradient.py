"""The experiment on rewards without a gradient: what it says of runs that were made up for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftune.reproduce.lab import DIVERSITY, FULL, JUDGE, NAMED, QUICK, Lab, Record, Work
from draftune.reproduce.no_gradient import (
    CLIMBED,
    DDPO,
    ESTIMATED,
    NO_GRADIENT,
    OVER,
    RATES,
    RULERS,
    SHARE,
    SIZE,
    WAYS,
    refused,
    run_of,
)

PICTURES_1, LATENTS_1, PICTURES, LATENTS = (way.name for way in ESTIMATED)
STAYS, FALLS, PLAIN = (way.name for way in OVER)
Ends = dict[str, tuple[float, float]]
"""For each way the value after its run, and how far the last seed is from the first."""


class MadeUp(Lab):
    """Runs from 1.5 kB and no picture above the level to where they end.

    DDPO makes files a little larger at its lowest learning rate, and smaller at its highest, where it loses names; half
    of its run gives half of its end.
    """

    def __init__(self, folder: Path, ends: Ends) -> None:
        super().__init__(folder, FULL)
        self.ends = ends

    def run(self, work: Work) -> Record:
        way = next((way.name for way in WAYS if run_of(way, work.seed, FULL) == work), DDPO)
        (end, apart), named = self.ends[way], 1.0
        if way == DDPO:
            rate = RATES.index(work.settings["learning_rate"])
            end, named = end + (0.1, 0.0, -0.2)[rate], (1.0, 0.95, 0.8)[rate]
        end += apart * work.seed / 2
        rows = []
        for step in (0, work.steps // 2, work.steps):
            done = step / (FULL.policy_updates if way == DDPO else work.steps)
            queries = step * (10.0 if way == DDPO else 30.0)
            rows.append({"step": float(step), "reward_queries": queries, JUDGE: 0.5, NAMED: named, DIVERSITY: 0.4})
            rows[-1] |= {SIZE: -1.5 + done * (1.5 - end), SHARE: done * end, CLIMBED: 4.0 + done}
        return Record([], rows, self.folder)

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        return "it is refused."


ENDS: Ends = {
    PICTURES: (1.3, 0.01),
    LATENTS: (1.45, 0.01),
    PICTURES_1: (1.32, 0.01),
    LATENTS_1: (1.41, 0.01),
    RULERS[0].name: (1.38, 0.0),
    RULERS[1].name: (1.35, 0.0),
    DDPO: (1.48, 0.01),
    STAYS: (0.3, 0.01),
    FALLS: (0.5, 0.01),
    PLAIN: (0.9, 0.0),
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ["confirmed", "confirmed", "confirmed", "weaker", "confirmed", "confirmed"]),
        (
            {PICTURES: (1.49, 0.2), LATENTS_1: (1.45, 0.01), FALLS: (0.2, 0.01)},
            ["confirmed", "weaker", "not seen", "weaker", "confirmed", "reversed"],
        ),
        (
            {LATENTS: (1.6, 0.01), PICTURES_1: (1.49, 0.1), STAYS: (0.5, 0.2)},
            ["not seen", "confirmed", "confirmed", "reversed", "confirmed", "not seen"],
        ),
    ],
)
def test_ways_are_held_against_each_other(tmp_path: Path, changed: Ends, words: list[str]) -> None:
    report = NO_GRADIENT.report(MadeUp(tmp_path, ENDS | changed))
    assert [claim.verdict for claim in report.claims] == words


def test_what_is_told(tmp_path: Path) -> None:
    report = NO_GRADIENT.report(MadeUp(tmp_path, ENDS))
    assert report.claims[2].measured == "-195 bytes; -150 by the differentiable JPEG"
    assert "the base model's pictures are 1500 bytes" in report.text
    assert "DDPO 1485 bytes with 400 scored pictures, 95% of the names read" in report.text
    found = "(1540 bytes and 100% at 0.001, 1490 bytes and 95% at 0.003, 1390 bytes and 80% at 0.01). "
    assert f"the best of those that leave the judge 90% of the names, by half a run of its first seed {found}" in (
        report.text
    )
    # 400 of 1,200 scored pictures: a third of the way from 1,500 to 1,325 and to 1,305.
    assert "At its 400 scored pictures, or at their ends before, the others are at" in report.text
    assert f"{PICTURES_1} 1442; {LATENTS_1} 1472; {PICTURES} 1435; " in report.text
    table = {row["way"]: row for row in report.table}
    assert table[PICTURES]["kB"] == pytest.approx(1.305)
    assert table[PICTURES]["reward_queries"] == 1200
    assert table[FALLS]["above"] == pytest.approx(0.505)
    assert table[DDPO]["kB"] == pytest.approx(1.485)
    assert table[DDPO]["std"] == pytest.approx(0.005)
    assert "above" not in table[DDPO]
    assert len(report.rows) == (9 + 1) * 3 * 3


def test_where_no_learning_rate_leaves_the_names_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftune.reproduce.no_gradient.READ", 1.01)
    report = NO_GRADIENT.report(MadeUp(tmp_path, ENDS))
    assert "DDPO's learning rate is one that loses names, by half a run" in report.text
    assert "DDPO 1285 bytes" in report.text


def test_the_search_is_part_of_the_work() -> None:
    rates = [work.settings["learning_rate"] for work in NO_GRADIENT.work(FULL) if work.method.startswith("ddpo")]
    assert rates == list(RATES)
    assert len(NO_GRADIENT.work(QUICK)) == len(WAYS) + 1


def test_the_threshold_as_it_is_is_refused(tmp_path: Path) -> None:
    said = refused(Lab(tmp_path, QUICK))
    assert said.startswith("as it is, without smoothing, it is refused before training (“the reward 'threshold(emoji_")
