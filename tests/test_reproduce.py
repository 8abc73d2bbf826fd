"""The experiments: their arithmetic on curves made up for it, and a quick run of all of them."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import rows

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.prompts import load_prompts
from draftune.reproduce import EXPERIMENTS, reproduce, share
from draftune.reproduce.curves import efficiency, overoptimisation, reached
from draftune.reproduce.cuts import copies, depth, layout
from draftune.reproduce.lab import DIVERSITY, FULL, JUDGE, NAMED, QUICK, REWARD, Lab, Record, Work
from draftune.reproduce.loras import SCALES, at_reward, lora_scale, mixing
from draftune.reproduce.optimizers import OWN, RIVALS, optimizers, search
from draftune.reproduce.report import VERDICTS, Claim, Report, markdown
from draftune.utils.images import save_image, to_pil


def test_where_a_curve_gets_to_a_level() -> None:
    x, y = [0, 10, 20, 40], [1.0, 1.0, 3.0, 2.0]
    assert reached(x, y, 2.0) == 15
    assert reached(x, y, 0.5) == 0
    assert reached(x, y, 3.1) is None


def test_a_dial_at_a_reward() -> None:
    points = [{"reward": 1.0, "d": 0.8}, {"reward": 3.0, "d": 0.4}, {"reward": 2.0, "d": 0.7}]
    assert at_reward(points, 2.5, "d") == pytest.approx(0.55)  # 0.5 on the way up, 0.55 on the way back
    assert math.isnan(at_reward(points, 3.5, "d"))


Story = Callable[[Work, int], dict[str, float]]


class MadeUp(Lab):
    """Runs and measurements as a story tells them: for a run and an update what its evaluation says."""

    def __init__(self, folder: Path, story: Story, **measurements: Any) -> None:
        super().__init__(folder, FULL)
        self.story, self.measurements = story, measurements

    def run(self, work: Work) -> Record:
        queries = 32 if work.method.startswith("ddpo") else 12
        said = {JUDGE: 0.5, NAMED: 1.0, DIVERSITY: 0.4, "symmetry": 0.5}
        rows = [
            {"step": float(step), "reward_queries": float(step * queries), **said, **self.story(work, step)}
            for step in range(0, work.steps + 1, 10)
        ]
        told = self.story(work, 10)
        update = {"grad_norm": told.get("norm", 1.0), "reward": told.get("training", 4.0)}
        return Record([update | {"reward_queries": float(queries)}], rows, self.folder)

    def cost(self, method: str, batch_size: int = 4) -> dict[str, float]:
        seconds = {"draft_k(k=1)": 1.0, "draft_lv(n=2)": 1.1}.get(method, 3.0)
        return {"seconds": seconds, "megabytes": 1.0, "megabytes without": 2.0}

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        return self.measurements[name.replace("-", "_")]


def line(ours: float, theirs: float, spread: float = 0.01) -> Story:
    """Rewards that rise by `ours` an update, and DDPO's by `theirs`, a little more or less with every seed."""

    def story(work: Work, step: int) -> dict[str, float]:
        policy = work.method.startswith("ddpo")
        slope = theirs if policy else ours
        return {REWARD: 4.0 + slope * step + (spread * (work.seed - 1) if step else 0.0)}

    return story


def verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def test_the_ratio_of_reward_queries(tmp_path: Path) -> None:
    # DDPO: 4.8 after 40 updates, 1,280 queries, 480 s; DRaFT-LV is there after 16 updates, 192 queries, 17.6 s.
    report = efficiency(MadeUp(tmp_path, line(0.05, 0.02)))
    (claim,) = report.claims
    assert claim.measured == "7 times, at 40 % of DRaFT-LV's gain"
    assert claim.verdict == "weaker"
    assert "7 times the reward queries of DRaFT-LV and 27 times the seconds" in report.text
    # What DRaFT-LV has at its first evaluation, 120 queries, is only a bound: nothing was measured before.
    (claim,) = efficiency(MadeUp(tmp_path, line(0.05, 0.005))).claims
    assert claim.measured == "at least 11 times, at 10 % of DRaFT-LV's gain"
    # Seeds that differ by more than the gain say nothing.
    (claim,) = efficiency(MadeUp(tmp_path, line(0.05, 0.0004))).claims
    assert claim.verdict == "not seen"


def test_the_collapse_is_counted(tmp_path: Path) -> None:
    def story(left: float, kept: str = "refl") -> Story:
        def tell(work: Work, step: int) -> dict[str, float]:
            loss = 0.0 if work.method.startswith(("adjoint", kept)) else (0.4 - left) * step / FULL.long
            best = 0.9 if step == 40 else 0.5
            return {REWARD: 4.0 + 0.05 * step, DIVERSITY: 0.4 - loss, NAMED: 0.9 if step > 40 else 1.0, JUDGE: best}

        return tell

    report = overoptimisation(MadeUp(tmp_path, story(left=0.2)))
    assert verdicts(report) == ["weaker"]
    assert "7 keep less than 80 % and 0 less than 25 %" in report.claims[0].measured
    assert "In 8 of these 8 methods the reward rose on" in report.text
    assert verdicts(overoptimisation(MadeUp(tmp_path, story(left=0.09, kept="none")))) == ["confirmed"]
    assert verdicts(overoptimisation(MadeUp(tmp_path, story(left=0.35)))) == ["not seen"]


@pytest.mark.parametrize(
    ("small", "full", "norm", "words"),
    [
        (0.05, 0.04, 5.0, ["confirmed", "confirmed"]),
        (0.04, 0.05, 0.5, ["reversed", "reversed"]),
        (0.0401, 0.04, 1.5, ["not seen", "weaker"]),
    ],
)
def test_small_k_against_full(tmp_path: Path, small: float, full: float, norm: float, words: list[str]) -> None:
    def story(work: Work, step: int) -> dict[str, float]:
        whole = work.method == "draft"
        return {REWARD: 4 + (full if whole else small) * step + 0.02 * work.seed, "norm": norm if whole else 1.0}

    assert verdicts(depth(MadeUp(tmp_path, story))) == words


@pytest.mark.parametrize(
    ("gain", "variance", "words"),
    [
        (2.0, [4.0, 6.0, 9.0, 20.0, 60.0], ["confirmed", "confirmed", "confirmed"]),
        (1.2, [4.0, 6.0, 33.0, 20.0, 60.0], ["weaker", "confirmed", "weaker"]),
        (1.001, [4.0, 6.0, 36.0, 20.0, 60.0], ["not seen", "confirmed", "not seen"]),
        (0.8, [4.0, 6.0, 60.0, 20.0, 60.0], ["reversed", "confirmed", "reversed"]),
        (0.8, [4.0, 6.0, 6000.0, 20.0, 60.0], ["reversed", "confirmed", "not seen"]),
    ],
)
def test_what_copies_bring(tmp_path: Path, gain: float, variance: list[float], words: list[str]) -> None:
    """The mean gradient is as long as there are terms; a variance that drowns it leaves nothing to compare."""

    def story(work: Work, step: int) -> dict[str, float]:
        slope = 0.05 * (gain if work.method == "draft_lv(n=2)" else 1.0)
        return {REWARD: 4 + slope * step + 0.02 * work.seed * (step > 0)}

    gradients = {"variance": variance, "signal": [float((n + 1) ** 2) for n in FULL.copies]}
    report = copies(MadeUp(tmp_path, story, lv_gradients=gradients))
    assert verdicts(report) == words
    assert "10 % longer" in report.text


def test_dials_are_compared_at_equal_reward(tmp_path: Path) -> None:
    def tuned(reward: float, diversity: float) -> dict[str, float]:
        return {"reward": reward, "judge_3d": 0.5, "judge_name": 1.0, "diversity": diversity}

    # The scale goes from 4 to 8 and from 0.4 to 0.2 on a line; stopping early keeps less, the KL term more.
    swept = [{"scale": scale, **tuned(4 + 4 * scale, 0.4 - 0.2 * scale)} for scale in SCALES]

    def story(work: Work, step: int) -> dict[str, float]:
        held = work.method.startswith("kl")
        reward = 6.0 if held else 4 + 4 * step / FULL.long
        return {REWARD: reward, DIVERSITY: 0.35 if held else 0.4 - 0.05 * (reward - 4) - 0.02 * (4 < reward < 8)}

    report = lora_scale(MadeUp(tmp_path, story, lora_scale=swept))
    assert verdicts(report) == ["confirmed", "confirmed", "reversed"]
    assert report.claims[1].measured == "+0.020 in diversity at equal reward, more by over 0.005 at 7 of 7 points"
    assert report.claims[2].measured == "-0.050 in diversity at equal reward, more by over 0.005 at 0 of 2 points"


@pytest.mark.parametrize(
    ("one", "deep", "word"), [((0.55, 1.0), (0.9, 0.9), "confirmed"), ((0.9, 0.6), (0.9, 0.9), "weaker")]
)
def test_what_the_last_step_can_do_for_symmetry(
    tmp_path: Path, one: tuple[float, float], deep: tuple[float, float], word: str
) -> None:
    def story(work: Work, step: int) -> dict[str, float]:
        symmetry, named = one if work.method == "draft_k(k=1)" else deep
        return {"symmetry": symmetry, NAMED: named} if step else {}

    assert verdicts(layout(MadeUp(tmp_path, story))) == [word]


def test_a_mixture_keeps_its_share_of_both(tmp_path: Path) -> None:
    def corner(a: float, b: float) -> dict[str, float]:
        return {"style": a, "orange": b, REWARD: 4 + 3 * a - b, "color": 0.1 + 0.4 * b - 0.1 * a, "right name": 1.0}

    weights = [i / (FULL.grid - 1) for i in range(FULL.grid)]
    report = mixing(MadeUp(tmp_path, line(0.0, 0.0), mixing=[corner(a, b) for a in weights for b in weights]))
    assert report.claims[0].measured == "the sum keeps 67 % and 75 % of each one's gain"
    assert verdicts(report) == ["confirmed"]


def test_a_search_goes_on_at_its_ends() -> None:
    def near(wanted: float, ruin: float = math.inf) -> Callable[[float], dict[str, Any]]:
        return lambda rate: {
            "reward": rate if ruin < math.inf else -abs(math.log(rate / wanted)) if rate else -9.0,
            "judge_name": 0.0 if rate > ruin else 1.0,
        }

    assert list(search([1.0, 3.0, 9.0], near(27))) == [1, 3, 9, 27, 81, 47]
    assert list(search([9.0, 27.0, 81.0], near(27))) == [9, 27, 81, 47]
    assert list(search([OWN, 81.0, 243.0], near(27))) == [OWN, 81, 243, 27, 9, 47]
    assert list(search([1.0], near(27))) == [1]
    # Nor from AdaMEKA's own steps, nor where a higher reward is a ruin.
    assert list(search([OWN, 3.0], lambda rate: {"reward": -rate, "judge_name": 1.0})) == [OWN, 3]
    assert list(search([1.0, 3.0, 9.0], near(0, ruin=4))) == [1, 3, 9, 5.2]


@pytest.mark.parametrize(("tuned", "words"), [(6.0, ["not seen"] * 2), (6.5, ["confirmed"] * 2), (5, ["reversed"] * 2)])
def test_optimizers_are_compared_at_their_best(tmp_path: Path, tuned: float, words: list[str]) -> None:
    """At any other learning rate than the middle one all are worse."""
    middle = {rival.optimizer: rival.rates[1] for rival in RIVALS}

    def story(work: Work, step: int) -> dict[str, float]:
        name, rate = work.settings["optimizer"], work.settings["learning_rate"]
        best = tuned if name.startswith(("step_tuned", "extrapolate")) else 6.0
        # Halfway counts, where AdaMEKA is compared in the end.
        return {REWARD: 6.0 - (rate != middle[name]) + 0.01 * work.seed, "training": best + 0.01 * work.seed}

    class WithAdaMEKA(MadeUp):
        def measured(self, name: str, measure: Callable[[], Any]) -> Any:
            scores = {"reward": 5.0 if "0.0-" in name else 2.0, "judge_3d": 0.5, "judge_name": 1.0, "diversity": 0.4}
            return {"training": [4.0], "queries": [4], **scores}

    report = optimizers(WithAdaMEKA(tmp_path, story))
    assert verdicts(report) == [*words, "weaker"]
    assert [row["learning rate"] for row in report.table] == ["0.001", "0.1", "1", "0.001", "its own"]
    tried = {row["learning rate"] for row in report.rows if row["optimizer"] == "AdaMEKA"}
    assert tried == {"its own", "0.001", "0.003"}


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
    real = tmp_path / "real"
    for name in [*load_prompts("emoji")[:3], *load_prompts("emoji-common")[:2]]:
        for style in ("a", "b"):
            save_image(to_pil(torch.rand(1, 3, 64, 64))[0], real / style / f"{name}.png")
    given = ["--quick", "--output", str(tmp_path), "--examples", str(real)]
    # Two processes would share the runs; one of them was cut off.
    assert main(["reproduce", "--part", "1/2", *given]) == 0
    results = tmp_path / "results-quick"
    assert not (tmp_path / "RESULTS-quick.md").exists()
    first = share(EXPERIMENTS, QUICK, 1, 2)[0]
    cut = results / "runs" / first.name
    shutil.rmtree(cut / "checkpoints" / f"step-{first.steps:06d}")
    whole = rows(cut, "evaluations.jsonl")
    lines = (cut / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (cut / "evaluations.jsonl").write_text("".join(lines[:-1]))
    assert main(["reproduce", *given]) == 0
    assert rows(cut, "evaluations.jsonl") == whole
    text = (tmp_path / "RESULTS-quick.md").read_text(encoding="utf-8")
    assert "measures nothing" in text
    for name, experiment in EXPERIMENTS.items():
        assert f"## {experiment.title}" in text
        assert f"(results-quick/{name}.png)" in text
        assert (results / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (results / f"{name}.svg").read_text()
        page = (results / f"{name}.md").read_text(encoding="utf-8")
        assert any(f"**{verdict}**" in page for verdict in VERDICTS) or name == "grid"
        assert f"`draftune reproduce {name} --quick" in page
        with (results / f"{name}.csv").open() as file:
            assert list(csv.DictReader(file))
    with (results / "efficiency.csv").open() as file:
        written = list(csv.DictReader(file))
    ours = [row for row in written if row["method"] == "draft_lv(n=2)"]
    logged = [json.loads(line) for line in (results / "runs" / "draft-lv-n-2-seed-0" / "evaluations.jsonl").open()]
    assert [float(row["reward"]) for row in ours] == pytest.approx([row[REWARD] for row in logged[:2]], rel=1e-4)
    assert [int(row["reward_queries"]) for row in ours] == [0, 24]
    # Everything is there: nothing is trained again.
    stamp = {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["reproduce", "depth", "--quick", "--output", str(tmp_path)]) == 0
    assert stamp == {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*") if path.is_file()}
