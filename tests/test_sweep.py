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
from draftune.evaluation.criterion import default_criterion, parse_criterion, weighted_sum
from draftune.evaluation.eval_spec import resolve_eval_spec
from draftune.evaluation.lora_scale import ScalePoint, ScaleSweep, recommend, scale_name, sweep
from draftune.evaluation.metrics import Evaluation, denoiser_mse_from_base
from draftune.rewards import load_reward
from draftune.runs.load import load_for_sampling, resolve_lora
from draftune.utils.images import to_pil
from helpers.errors import mentions, raises


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
    eval_rewards = load_reward("brightness - 0.5*saturation")
    columns = ["reward", "eval/brightness", "eval/saturation", "eval/diversity", "pixel_l1_from_base"]
    assert default_criterion("", eval_rewards) == {"eval/brightness": 1.0, "eval/saturation": -0.5}
    assert default_criterion("reward - 2*pixel_l1_from_base", eval_rewards) == {
        "reward": 1.0,
        "pixel_l1_from_base": -2.0,
    }
    assert default_criterion("", None) == {}
    assert default_criterion("", eval_rewards + 2 * eval_rewards) == {"eval/brightness": 3.0, "eval/saturation": -1.5}
    assert parse_criterion("a + 2*b - 3*a") == {"a": -2.0, "b": 2.0}
    assert weighted_sum({"a": 1.0, "b": -0.5}, {"a": 3.0, "b": 4.0, "c": 9.0}) == 1.0
    with raises(DraftuneError, "'eval/brightnes' 'eval/brightness'"):
        weighted_sum({"eval/brightnes": 1.0}, dict.fromkeys(columns, 0.0))


def dial(*columns: list[float], weights: dict[str, float] | None = None) -> ScaleSweep:
    """Three scales of one score on two prompts, given as [scale, prompt]."""
    marks = [
        ScalePoint(scale, Evaluation({"score": torch.tensor(row)[:, None]}, ["cat"], torch.zeros(1, 3, 4, 4)), ["1"])
        for scale, row in zip((0.0, 0.5, 1.0), columns, strict=True)
    ]
    return ScaleSweep(marks, {"score": 1.0} if weights is None else weights)


def test_what_is_said() -> None:
    clear = dial([0.0, 0.0], [2.0, 2.25], [1.0, 1.0])
    assert mentions(clear.advice, "0.5 score 2.1250")
    near = dial([0.0, 0.0], [2.0, 2.0], [1.5, 2.75])
    assert mentions(near.advice, "0.5 score 2.0000 2.1250 1 standard error")
    assert dial([0.0, 0.0], [1.0, 1.0], [2.0, 2.0]).advice.count("--scales")
    assert dial([2.0, 2.0], [1.0, 1.0], [0.0, 0.0]).advice.count("LoRA")
    assert mentions(dial([0.0], [1.0], [2.0]).advice, "finite prompts")
    none = dial([0.0, 0.0], [1.0, 1.0], [2.0, 2.0], weights={})
    assert (none.recommended, none.rule) == (None, None)
    assert mentions(none.advice, "training reward")
    assert dial([0.0, 0.0], [1.0, 1.0], [2.0, 2.0], weights={"score": -0.5}).rule == "- 0.5*score"


def test_the_figure_shows_the_numbers() -> None:
    found = dial([0.0, 0.0], [1.0, 3.0], [1.0, 1.0])
    (axis,) = found.figure().axes
    curve, recommended = axis.lines
    assert curve.get_ydata().tolist() == [0, 2, 1]
    assert list(recommended.get_xdata()) == [found.recommended] * 2 == [0.5] * 2
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0, 4)  # the standard error is 1 there, and 0 elsewhere
    both = ScaleSweep(found.marks, {"score": 2.0}).figure().axes[1]
    assert both.lines[0].get_ydata().tolist() == [0, 4, 2]


def test_the_dial_goes_from_the_base_through_the_run(run: Path) -> None:
    tuned = resolve_lora(str(run))
    yardstick = resolve_eval_spec([tuned], num_images=2)
    found = sweep(
        tuned,
        yardstick,
        [1.0, 2.0, 0.5],
        metric_for_best_model="eval/saturation - 0.1*denoiser_mse_from_base + pixel_l1_from_base",
    )
    assert found.scales == [0.0, 0.5, 1.0, 2.0]
    repeated = [prompt for prompt in yardstick.prompts for _ in range(2)]
    for mark in found.marks:
        model, settings = load_for_sampling(str(run), lora_scale=mark.scale, device="cpu")
        schedule = model.schedule(2)
        images = model.sample_tensors(repeated, [0, 1] * 3, schedule, 2.0)
        assert torch.equal(mark.evaluation.images, images[::2])
        scores = mark.evaluation.scores
        assert scores["brightness"] == pytest.approx(float(yardstick.reward(images, repeated).mean()))
        if mark.scale == 0:
            base = images
        assert scores["pixel_l1_from_base"] == pytest.approx(float((images - base).abs().mean()), abs=1e-7)
        mse = denoiser_mse_from_base(model, yardstick.prompts[: settings.batch_size], schedule, 2.0)
        assert scores["denoiser_mse_from_base"] == pytest.approx(mse, rel=1e-5, abs=1e-12)
        values = found.criterion[found.scales.index(mark.scale)].mean()
        assert float(values) == pytest.approx(
            scores["eval/saturation"] - 0.1 * scores["denoiser_mse_from_base"] + scores["pixel_l1_from_base"], abs=1e-6
        )
    distances = found.columns["pixel_l1_from_base"]
    assert distances[0] == 0
    assert min(distances[1:]) > 0.01
    assert list(found.columns) == ["brightness", "eval/saturation", "pixel_l1_from_base", "denoiser_mse_from_base"]
    assert found.recommended == recommend(found.scales, found.criterion)


def test_what_is_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(run), "--scales", "1,0.333", "--num-images", "1"]) == 0
    printed = capsys.readouterr().out
    said: dict[str, Any] = json.loads((run / "sweep" / "sweep.json").read_text())
    assert list(said) == [
        *("scales", "columns", "stderr", "criterion", "recommended", "improvement", "prompts", "images")
    ]
    assert said["scales"] == [0.0, 0.333, 1.0]
    assert said["prompts"] == ["a cat", "a dog", "fish"]
    assert said["images"] == [[f"{scale}/0{i}.png" for i in range(3)] for scale in ("0.00", "0.333", "1.00")]
    assert said["criterion"] == "eval/saturation"
    assert said["recommended"] in said["scales"]
    assert mentions(printed, f"{said['recommended']:g} eval/saturation")
    assert ("draftune export" in printed) == bool(said["recommended"])
    assert list(said["columns"]) == list(said["stderr"]) == ["brightness", "eval/saturation", "pixel_l1_from_base"]
    rows = list(csv.DictReader((run / "sweep" / "sweep.csv").open()))
    for row in rows:
        i = said["scales"].index(float(row["scale"]))
        assert float(row["value"]) == said["columns"][row["score"]][i]
        assert float(row["stderr"]) == said["stderr"][row["score"]][i]
    assert len(rows) == 9
    assert max(map(len, printed.splitlines()[:8])) <= 100
    # The picture shown at scale 1 is what sample draws.
    model, _ = load_for_sampling(str(run), device="cpu")
    drawn = to_pil(model.sample_tensors(["a cat", "a dog", "fish"], [0] * 3, model.schedule(2), 2.0))
    for path, picture in zip(said["images"][2], drawn, strict=True):
        with Image.open(run / "sweep" / path) as kept:
            assert kept.tobytes() == picture.tobytes()
    for name in ("sweep.png", "curve.png"):
        with Image.open(run / "sweep" / name) as picture:
            assert min(picture.size) > 200


def test_without_anything_held_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(run / "best"), "--scales", "1", "--num-images", "1", "--eval-rewards", ""]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    said = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (said["criterion"], said["recommended"]) == (None, None)
    printed = capsys.readouterr().out
    assert mentions(printed, "no scale")
    assert "--lora-scale" not in printed
    # Unless a rule is given.
    assert main([*command, "--metric-for-best-model", "brightness", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["criterion"] == "brightness"


def test_names_of_scales() -> None:
    assert [scale_name(scale) for scale in (0.0, 0.75, 1.0, 0.125, 1 / 3, -0.5)] == [
        "0.00", "0.75", "1.00", "0.125", "0.3333333333333333", "-0.50"
    ]  # fmt: skip


def test_mistakes_get_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        "--scales 0,half": ["sweep", str(run), "--scales", "0,half"],
        "--scales 0,inf": ["sweep", str(run), "--scales", "0,inf"],
        "--scales ''": ["sweep", str(run), "--scales", ""],
        "LoRA missing": ["sweep", str(tmp_path / "missing")],
        "--output folder": ["sweep", str(run), "--output", str(tmp_path / "file")],
        "missing.txt": ["sweep", str(run), "--prompts", str(tmp_path / "missing.txt")],
        "'eval/saturatio' 'eval/saturation'": ["sweep", str(run), "--metric-for-best-model", "eval/saturatio"],
        "saturation(k=2)": ["sweep", str(run), "--metric-for-best-model", "saturation(k=2)"],
        "--lora-scale": ["sweep", str(run), "--lora-scale", "1"],
    }
    for message, argv in cases.items():
        code = main(argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draftune: ")]
        assert (code, len(lines)) == (2, 1), (argv, lines)
        assert mentions(lines[0], message), (message, lines[0])
