"""The experiments: their arithmetic on curves made up for it, and a quick run of all of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from draftune.cli import main
from draftune.errors import DraftuneError
from draftune.reproduce import EXPERIMENTS, reproduce, share
from draftune.reproduce.curves import efficiency, overoptimisation, reached
from draftune.reproduce.lab import DIVERSITY, FULL, JUDGE, NAMED, QUICK, REWARD, Lab, Record, Work
from draftune.reproduce.loras import at_reward
from draftune.reproduce.report import VERDICTS, Claim, markdown


def test_where_a_curve_gets_to_a_level() -> None:
    x, y = [0, 10, 20, 40], [1.0, 1.0, 3.0, 2.0]
    assert reached(x, y, 2.0) == 15
    assert reached(x, y, 0.5) == 0
    assert reached(x, y, 3.1) is None


def test_a_dial_at_a_reward() -> None:
    points = [{"reward": 1.0, "d": 0.8}, {"reward": 3.0, "d": 0.4}, {"reward": 2.0, "d": 0.7}]
    assert at_reward(points, 2.5, "d") == pytest.approx(0.55)  # 0.5 on the way up, 0.55 on the way back
    assert at_reward(points, 3.5, "d") is None


class MadeUp(Lab):
    """Rewards that rise by a known amount with every update."""

    def __init__(self, folder: Path, slope: float, spread: float = 0.0) -> None:
        super().__init__(folder, FULL)
        self.slope, self.spread = slope, spread

    def run(self, work: Work) -> Record:
        policy = work.method.startswith("ddpo")
        queries = 32 if policy else 12
        rate = self.slope + self.spread * (work.seed - 1) if policy else 0.05
        rows = [
            {
                "step": float(step),
                "reward_queries": float(step * queries),
                REWARD: 4.0 + rate * step,
                JUDGE: 0.5,
                NAMED: 1.0,
                DIVERSITY: 0.4 - (0.0 if work.method.startswith(("adjoint", "refl")) else 0.002 * step),
            }
            for step in range(0, work.steps + 1, 10)
        ]
        return Record([], rows, self.folder)

    def cost(self, method: str, batch_size: int = 4) -> dict[str, float]:
        return {"seconds": 3.0 if method.startswith("ddpo") else 2.0, "megabytes": 1.0}


def test_the_ratio_of_reward_queries(tmp_path: Path) -> None:
    # DDPO: 4.2 after 40 updates, 1,280 queries, 480 s; DRaFT-LV is there after 4 updates, 48 queries, 8 s.
    report = efficiency(MadeUp(tmp_path, slope=0.005))
    (claim,) = report.claims
    assert claim.verdict == "weaker"
    assert claim.measured == "27 times at DDPO's best, 10 % of DRaFT-LV's gain"
    assert "27 times the reward queries of DRaFT-LV and 60 times the seconds" in report.text
    # Seeds that differ by more than the gain say nothing.
    (claim,) = efficiency(MadeUp(tmp_path, slope=0.001, spread=0.002)).claims
    assert claim.verdict == "not seen"
    (claim,) = efficiency(MadeUp(tmp_path, slope=0.0001)).claims
    assert claim.verdict == "confirmed"
    assert claim.measured.startswith("1333 times")


def test_the_collapse_is_counted(tmp_path: Path) -> None:
    report = overoptimisation(MadeUp(tmp_path, slope=0.001))
    (claim,) = report.claims
    assert claim.measured.startswith("7 of 8 methods below 80 %")  # ReFL keeps its diversity in this story
    assert claim.verdict == "weaker"


def test_the_parts_are_all_of_the_work_once() -> None:
    whole = share(EXPERIMENTS, FULL, 1, 1)
    parts = [share(EXPERIMENTS, FULL, i, 3) for i in (1, 2, 3)]
    assert sorted(work.name for part in parts for work in part) == sorted(work.name for work in whole)
    names = [work.name for work in whole]
    assert len(set(names)) == len(names)
    wanted = {work.name: work for e in EXPERIMENTS.values() for work in e.work(FULL)}
    assert set(wanted) == set(names)
    # A run that two experiments need is as long as the longer of them asks.
    assert {work.steps for work in whole if work.method == "draft" and work.seed == 0} == {FULL.long}


def test_verdicts_are_one_of_four_words() -> None:
    with pytest.raises(AssertionError):
        Claim("it is so", "it is", "perhaps")
    assert markdown([{"a": 1.23456, "b": None}, {"a": 123.4, "b": "x"}]).splitlines()[2:] == [
        "| 1.235 |  |",
        "| 123 | x |",
    ]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DraftuneError, match="did you mean 'efficiency'"):
        reproduce(["eficiency"], output=tmp_path)
    for part in ("3", "0/2", "3/2", "a/b"):
        assert main(["reproduce", "--part", part, "--output", str(tmp_path)]) == 2
        assert part in capsys.readouterr().err
    assert main(["reproduce", "--seeds", "0", "--output", str(tmp_path)]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_quick_run_of_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Two processes would share the runs; one of them was cut off.
    assert main(["reproduce", "--quick", "--part", "1/2", "--output", str(tmp_path)]) == 0
    results = tmp_path / "results"
    assert not (tmp_path / "RESULTS.md").exists()
    cut = results / "runs-quick" / share(EXPERIMENTS, QUICK, 1, 2)[0].name
    whole = (cut / "evaluations.jsonl").read_text()
    (cut / "evaluations.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert main(["reproduce", "--quick", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "measures nothing" in text
    for name, experiment in EXPERIMENTS.items():
        assert f"## {experiment.title}" in text
        assert f"(results/{name}.png)" in text
        assert (results / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (results / f"{name}.svg").read_text()
        page = (results / f"{name}.md").read_text(encoding="utf-8")
        assert any(f"**{verdict}**" in page for verdict in VERDICTS)
        assert f"`draftune reproduce {name} --quick`" in page
        with (results / f"{name}.csv").open() as file:
            assert list(csv.DictReader(file))
    with (results / "efficiency.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["method"] == "draft-lv(n=2)"]
    logged = [
        json.loads(line) for line in (results / "runs-quick" / "draft-lv-n-2-seed-0" / "evaluations.jsonl").open()
    ]
    assert [float(row["reward"]) for row in ours] == pytest.approx([row[REWARD] for row in logged[:3]], rel=1e-4)
    assert [int(row["reward_queries"]) for row in ours] == [0, 12, 24]
    # Everything is there: nothing is trained again.
    stamp = {path: path.stat().st_mtime_ns for path in (results / "runs-quick").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["reproduce", "depth", "--quick", "--output", str(tmp_path)]) == 0
    assert stamp == {path: path.stat().st_mtime_ns for path in (results / "runs-quick").rglob("*") if path.is_file()}
