"""The runner of the benchmarks: what it reads of their output, and what it marks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench  # noqa: E402

OUTPUT = """torch 2.13.0, 1 threads

| method | mode | update, seconds | ratio | from | to | MiB |
|---|---|---|---|---|---|---|
| `draft_k(k=1)` | `blocks` | 1.340 | 1.01 | 0.99 | 1.04 | 18.7 |
| `draft` | `none` | 2,000 |  |  |  | 64 |

| | of plain |
|---|---|
| 4 | 1.5% |
{"what": "count", "model": "sd14", "networks": 6080000000, "exact": true}
"""


def test_figures_of_tables_and_json_lines() -> None:
    found = {figure[:3]: figure[3:] for figure in bench.figures("x", OUTPUT)}
    assert found == {
        ("x", "draft_k(k=1), blocks", "update, seconds"): (1.34, 1.34, 1.34),
        ("x", "draft_k(k=1), blocks", "ratio"): (1.01, 0.99, 1.04),
        ("x", "draft_k(k=1), blocks", "MiB"): (18.7, 18.7, 18.7),
        ("x", "draft, none", "update, seconds"): (2000, 2000, 2000),
        ("x", "draft, none", "MiB"): (64, 64, 64),
        ("x", "4", "of plain"): (1.5, 1.5, 1.5),
        ("x", "count, sd14", "networks"): (6080000000, 6080000000, 6080000000),
    }


@pytest.mark.parametrize(
    ("column", "now", "published", "marked"),
    [
        ("ratio", (1.02, 1.00, 1.05), (1.08, 1.04, 1.10), False),
        ("ratio", (1.02, 1.00, 1.03), (1.08, 1.04, 1.10), True),
        ("ratio", (1.02, 1.00, 1.03), (0.96, 0.96, 0.96), False),
        ("MiB", (104, 104, 104), (100, 100, 100), False),
        ("MiB", (112, 112, 112), (100, 100, 100), True),
        ("update, seconds", (9, 8, 10), (1, 1, 1), False),
    ],
)
def test_a_mark_is_more_than_noise(
    column: str, now: tuple[float, ...], published: tuple[float, ...], marked: bool
) -> None:
    assert bench.Figure("x", "row", column, *now).differs(bench.Figure("x", "row", column, *published)) is marked


def test_published_figures_are_kept_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "PUBLISHED", tmp_path / "published.csv")
    script = "print('| row | ratio |'); print('|---|---|'); print('| a | {} |'); import time; time.sleep({})"
    for name, value, pause in (("one", 1.0, 0), ("two", 2.0, 0), ("one", 1.5, 60)):
        (tmp_path / f"{name}.py").write_text(script.format(value, pause))
        monkeypatch.setattr(bench, "BENCHMARKS", {name: (str(tmp_path / f"{name}.py"), 3)})
        assert bench.main(["--only", name, "--publish", "2026-11-27"]) == 0
    assert "stopped after 3 seconds" in capsys.readouterr().out
    assert {key[0]: figure.value for key, figure in bench.read_published().items()} == {"one": 1.5, "two": 2.0}
    monkeypatch.setattr(bench, "BENCHMARKS", {"bad": (str(tmp_path / "missing.py"), 5)})
    assert bench.main(["--only", "bad"]) == 1


def test_all_benchmarks_end_within_ten_minutes_and_are_published() -> None:
    assert sum(limit for _, limit in bench.BENCHMARKS.values()) <= 600
    published = {key[0] for key in bench.read_published()}
    assert {"overhead", "families", "growth", "memory"} <= published <= bench.BENCHMARKS.keys()
    for command, _ in bench.BENCHMARKS.values():
        assert (ROOT / "benchmarks" / command.split()[0]).is_file()
