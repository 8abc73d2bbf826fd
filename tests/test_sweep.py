"""`draftune sweep`: the dial, the rule that recommends a scale, what it writes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_eval import make_run

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.evaluation.eval_spec import find_yardstick
from draftune.evaluation.lora_scale import Mark, Sweep, recommend, scale_name, sweep
from draftune.evaluation.metrics import Evaluation, denoiser_mse_from_base
from draftune.rewards import load_reward
from draftune.runs.load import find_tuned, open_source
from draftune.training.early_stopping import rule_of, weighed, weights_of
from draftune.utils.images import to_pil


@pytest.fixture(scope="module")
def run(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", pipeline_folder, 30.0)


def judged(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.double)


SCALES = [0.0, 0.5, 1.0, 1.5]
HARD = torch.tensor([0.0, 10.0, 20.0, 30.0], dtype=torch.double)
"""Some prompts are judged far higher than others, at every scale."""


@pytest.mark.parametrize(
    ("rows", "scale"),
    [
        # Every prompt likes 1 best, by a little that is sure: the spread over prompts, 13, is no reason to take less.
        ([HARD, HARD + 0.1, HARD + 0.3, HARD + 0.2], 1.0),
        # 1 is highest by 0.0375, and the error of that difference is 0.055.
        ([HARD, HARD + 1.0, HARD + 1.0 + judged([0.2, -0.05, 0.0, 0.0])[0], HARD], 0.5),
        # By 0.05 with an error of 0.029.
        ([HARD, HARD + 1.0, HARD + 1.0 + judged([0.1, 0.1, 0.0, 0.0])[0], HARD], 1.0),
        # Nothing gained.
        ([HARD, HARD, HARD, HARD - 1], 0.0),
        ([HARD, HARD + 0.1, HARD + math.nan, HARD - 1], 0.5),
        ([HARD, HARD + 0.1, HARD + math.inf, HARD - 1], 0.5),
        ([HARD + math.nan] * 4, None),
    ],
)
def test_the_smallest_of_what_is_as_good(rows: list[torch.Tensor], scale: float | None) -> None:
    assert recommend(SCALES, torch.stack(rows)) == scale


def test_one_prompt_recommends_nothing_and_signs_do_not_count() -> None:
    assert recommend(SCALES, judged([1], [2], [3], [2])) is None
    assert recommend([-1.0, -0.5, 0.0, 0.25], judged([2, 2], [2, 2], [0, 0], [2, 2])) == 0.25


def test_the_rule() -> None:
    held_out = load_reward("brightness - 0.5*saturation")
    columns = ["reward", "held-out/brightness", "held-out/saturation", "held-out/diversity", "distance"]
    assert rule_of("", held_out) == {"held-out/brightness": 1.0, "held-out/saturation": -0.5}
    assert rule_of("reward - 2*distance", held_out) == {"reward": 1.0, "distance": -2.0}
    assert rule_of("", None) == {}
    assert rule_of("", held_out + 2 * held_out) == {"held-out/brightness": 3.0, "held-out/saturation": -1.5}
    assert weights_of("a + 2*b - 3*a") == {"a": -2.0, "b": 2.0}
    assert weighed({"a": 1.0, "b": -0.5}, {"a": 3.0, "b": 4.0, "c": 9.0}) == 1.0
    with pytest.raises(DraftuneError, match="did you mean 'held-out/brightness'"):
        weighed({"held-out/brightnes": 1.0}, dict.fromkeys(columns, 0.0))


def dial(*columns: list[float], weights: dict[str, float] | None = None) -> Sweep:
    """Three scales of one score on two prompts, given as [scale, prompt]."""
    marks = [
        Mark(scale, Evaluation({"score": torch.tensor(row)[:, None]}, ["cat"], torch.zeros(1, 3, 4, 4)), ["1"])
        for scale, row in zip((0.0, 0.5, 1.0), columns, strict=True)
    ]
    return Sweep(marks, {"score": 1.0} if weights is None else weights)


def test_what_is_said() -> None:
    clear = dial([0.0, 0.0], [2.0, 2.25], [1.0, 1.0])
    assert clear.advice == "recommended: 0.5, by score: 2.1250"
    near = dial([0.0, 0.0], [2.0, 2.0], [1.5, 2.75])
    assert near.advice == "recommended: 0.5, by score: 2.0000; 2.1250 at 1 is not more by over a standard error"
    assert dial([0.0, 0.0], [1.0, 1.0], [2.0, 2.0]).advice.endswith("; try larger ones too (--scales)")
    assert dial([2.0, 2.0], [1.0, 1.0], [0.0, 0.0]).advice.endswith("; the LoRA is no gain by this rule")
    assert "wants finite scores of at least two prompts" in dial([0.0], [1.0], [2.0]).advice
    none = dial([0.0, 0.0], [1.0, 1.0], [2.0, 2.0], weights={})
    assert (none.recommended, none.rule) == (None, None)
    assert "the training reward alone always says more" in none.advice
    assert dial([0.0, 0.0], [1.0, 1.0], [2.0, 2.0], weights={"score": -0.5}).rule == "- 0.5*score"


def test_the_figure_shows_the_numbers() -> None:
    found = dial([0.0, 0.0], [1.0, 3.0], [1.0, 1.0])
    (axis,) = found.figure().axes
    curve, recommended = axis.lines
    assert curve.get_ydata().tolist() == [0, 2, 1]
    assert list(recommended.get_xdata()) == [found.recommended] * 2 == [0.5] * 2
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0, 4)  # the standard error is 1 there, and 0 elsewhere
    both = Sweep(found.marks, {"score": 2.0}).figure().axes[1]
    assert both.lines[0].get_ydata().tolist() == [0, 4, 2]


def test_the_dial_goes_from_the_base_through_the_run(run: Path) -> None:
    tuned = find_tuned(str(run))
    yardstick = find_yardstick([tuned], num_images=2)
    found = sweep(
        tuned, yardstick, [1.0, 2.0, 0.5], best_by="'held-out/saturation' - 0.1*denoiser_mse_from_base + distance"
    )
    assert found.scales == [0.0, 0.5, 1.0, 2.0]
    repeated = [prompt for prompt in yardstick.prompts for _ in range(2)]
    for mark in found.marks:
        model, settings = open_source(str(run), lora_scale=mark.scale, cpu=True)
        schedule = model.schedule(2)
        images = model.generate(repeated, [0, 1] * 3, schedule, 2.0)
        assert torch.equal(mark.evaluation.images, images[::2])
        scores = mark.evaluation.scores
        assert scores["brightness"] == pytest.approx(float(yardstick.reward(images, repeated).mean()))
        if mark.scale == 0:
            base = images
        assert scores["distance"] == pytest.approx(float((images - base).abs().mean()), abs=1e-7)
        mse = denoiser_mse_from_base(model, yardstick.prompts[: settings.batch_size], schedule, 2.0)
        assert scores["denoiser_mse_from_base"] == pytest.approx(mse, rel=1e-5, abs=1e-12)
        values = found.judged[found.scales.index(mark.scale)].mean()
        assert float(values) == pytest.approx(
            scores["held-out/saturation"] - 0.1 * scores["denoiser_mse_from_base"] + scores["distance"], abs=1e-6
        )
    distances = found.columns["distance"]
    assert distances[0] == 0
    assert min(distances[1:]) > 0.01
    assert list(found.columns) == ["brightness", "held-out/saturation", "distance", "denoiser_mse_from_base"]
    assert found.recommended == recommend(found.scales, found.judged)


def test_what_is_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(run), "--scales", "1,0.333", "--num-images", "1"]) == 0
    printed = capsys.readouterr().out
    said: dict[str, Any] = json.loads((run / "sweep" / "sweep.json").read_text())
    assert list(said) == ["scales", "columns", "errors", "rule", "recommended", "prompts", "pictures"]
    assert said["scales"] == [0.0, 0.333, 1.0]
    assert said["prompts"] == ["a cat", "a dog", "fish"]
    assert said["pictures"] == [[f"{scale}/0{i}.png" for i in range(3)] for scale in ("0.00", "0.333", "1.00")]
    assert said["rule"] == '"held-out/saturation"'
    assert said["recommended"] in said["scales"]
    assert f'recommended: {said["recommended"]:g}, by "held-out/saturation"' in printed
    assert ("draftune export" in printed) == bool(said["recommended"])
    assert list(said["columns"]) == list(said["errors"]) == ["brightness", "held-out/saturation", "distance"]
    rows = list(csv.DictReader((run / "sweep" / "sweep.csv").open()))
    for row in rows:
        i = said["scales"].index(float(row["scale"]))
        assert float(row["value"]) == said["columns"][row["score"]][i]
        assert float(row["error"]) == said["errors"][row["score"]][i]
    assert len(rows) == 9
    assert max(map(len, printed.splitlines()[:8])) <= 100
    # The picture shown at scale 1 is what sample draws.
    model, _ = open_source(str(run), cpu=True)
    drawn = to_pil(model.generate(["a cat", "a dog", "fish"], [0] * 3, model.schedule(2), 2.0))
    for path, picture in zip(said["pictures"][2], drawn, strict=True):
        with Image.open(run / "sweep" / path) as kept:
            assert kept.tobytes() == picture.tobytes()
    for name in ("sweep.png", "curve.png"):
        with Image.open(run / "sweep" / name) as picture:
            assert min(picture.size) > 200


def test_without_anything_held_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(run / "best"), "--scales", "1", "--num-images", "1", "--held-out", ""]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    said = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (said["rule"], said["recommended"]) == (None, None)
    printed = capsys.readouterr().out
    assert "no scale is recommended" in printed
    assert "--lora-scale" not in printed
    # Unless a rule is given.
    assert main([*command, "--best-by", "brightness", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rule"] == "brightness"


def test_names_of_scales() -> None:
    assert [scale_name(scale) for scale in (0.0, 0.75, 1.0, 0.125, 1 / 3, -0.5)] == [
        "0.00", "0.75", "1.00", "0.125", "0.3333333333333333", "-0.50"
    ]  # fmt: skip


def test_mistakes_get_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        "--scales takes numbers such as 0,0.5,1, not '0,half'": ["sweep", str(run), "--scales", "0,half"],
        "not '0,inf'": ["sweep", str(run), "--scales", "0,inf"],
        "not ''": ["sweep", str(run), "--scales", ""],
        "no LoRA at": ["sweep", str(tmp_path / "missing")],
        "takes a folder": ["sweep", str(run), "--output", str(tmp_path / "file")],
        "no prompt file": ["sweep", str(run), "--prompts", str(tmp_path / "missing.txt")],
        "did you mean 'held-out/saturation'": ["sweep", str(run), "--best-by", "held-out/saturatio"],
        "sum of quoted columns": ["sweep", str(run), "--best-by", "saturation(k=2)"],
        "unknown flag '--lora-scale'": ["sweep", str(run), "--lora-scale", "1"],
    }
    for message, argv in cases.items():
        code = main(argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draftune: ")]
        assert (code, len(lines)) == (2, 1), (argv, lines)
        assert message in lines[0], (message, lines[0])
