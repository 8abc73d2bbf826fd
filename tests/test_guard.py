"""The guard: the best evaluation, the end of patience, the warning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import rows, train
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.evaluation.criterion import parse_criterion
from draftune.evaluation.metrics import denoiser_mse_from_base
from draftune.models import load_model
from draftune.training.early_stopping import EarlyStopping
from helpers.errors import mentions, raises
from helpers.pipelines import add_random_lora


def told(rewards: Sequence[float], judged: Sequence[float]) -> list[dict[str, float]]:
    return [
        {"step": 10.0 * i, "aesthetic": reward, "eval/judge": judge}
        for i, (reward, judge) in enumerate(zip(rewards, judged, strict=True))
    ]


def test_the_best_is_that_of_the_rule() -> None:
    guard = EarlyStopping({"eval/judge": 1.0, "aesthetic": -0.1}, early_stopping_patience=2, reward="aesthetic")
    seen = [(guard.update(row), guard.should_stop) for row in told([1, 2, 3, 4, 5], [0.2, 0.5, 0.5, 0.58, 0.6])]
    # 0.1, 0.3, 0.2, 0.18, 0.1
    assert seen == [(True, False), (True, False), (False, False), (False, True), (False, True)]
    assert guard.best is not None
    assert guard.best["step"] == 10
    with raises(DraftuneError, "eval/juge eval/judge"):
        EarlyStopping({"eval/juge": 1.0}, 0, "aesthetic").update(told([1], [1])[0])
    assert parse_criterion("eval/judge - 0.5*denoiser_mse_from_base") == {
        "eval/judge": 1.0,
        "denoiser_mse_from_base": -0.5,
    }
    quoted = """0.5*"eval/sharpness_aware(clip + 0.1*aesthetic)" - 'a*b'"""
    assert parse_criterion(quoted) == {"eval/sharpness_aware(clip + 0.1*aesthetic)": 0.5, "a*b": -1.0}
    for rule in ("2*3", "a*b*c", "eval/judge +", ""):
        with raises(DraftuneError, rule):
            parse_criterion(rule)


@pytest.mark.parametrize(
    ("rewards", "judged", "said"),
    [
        ([1, 2, 3, 4], [0.5, 0.9, 0.8, 0.7], "eval/judge 0.900 10 0.700"),
        ([1, 2, 3, 4], [0.5, 0.9, 0.8, 0.95], None),  # it came back
        ([1, 2, 3], [0.5, 0.9, 0.8], None),  # once may be chance
        ([1, 5, 3, 4], [0.5, 0.9, 0.8, 0.7], None),  # the reward fell too
    ],
)
def test_the_warning(rewards: list[float], judged: list[float], said: str | None) -> None:
    guard = EarlyStopping({"eval/judge": 1.0}, 0, "aesthetic")
    for row in told(rewards, judged):
        guard.update(row)
    warning = guard.warning()
    assert (warning is None) == (said is None)
    if said:
        assert warning is not None
        assert mentions(warning, said, "4.000")


def test_the_warning_wants_more_than_chance_and_is_not_of_diversity() -> None:
    guard = EarlyStopping({"eval/judge": 1.0}, 0, "aesthetic")
    for row in told([1, 2, 3, 4], [0.5, 0.9, 0.8, 0.7]):
        guard.update({**row, "eval/diversity": 0.5 - row["step"] / 100, "stderr": {"eval/judge": 0.06}})
    # The difference of two such means has the error 0.085: 0.1 is no fall, and both of the last two must have fallen.
    assert guard.warning() is None
    guard.update({**told([5], [0.72])[0], "step": 40.0, "eval/diversity": 0.0, "stderr": {"eval/judge": 0.06}})
    warning = guard.warning()
    assert warning is not None
    assert mentions(warning, "eval/judge 0.900 10 0.720")
    assert "diversity" not in warning


def test_a_score_that_is_not_finite_is_never_the_best() -> None:
    guard = EarlyStopping({"eval/judge": 1.0}, 0, "aesthetic")
    values: list[Any] = [float("nan"), 0.2, None, float("inf"), 0.3]
    assert [guard.update({**told([1], [0])[0], "eval/judge": value}) for value in values] == [
        True, True, False, False, True
    ]  # fmt: skip
    assert guard.warning() is None


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


class Peaks:
    """A judge that likes every evaluation better up to the third one, and then less."""

    __name__ = "judge"

    def __init__(self) -> None:
        self.told = iter([0.0, 0.1, 0.2, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(images),), next(self.told))


def test_patience_ends_a_run_and_the_best_is_kept(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values: dict[str, Any] = {"validation_steps": 1, "method": "draft_k(k=1)", "learning_rate": 0.02, "steps": 8}
    # The first number goes to the trial before training.
    run = train(
        pipeline_folder, tmp_path / "run", brightness, eval_rewards=Peaks(), early_stopping_patience=2, **values
    )
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    assert [round(row["eval/judge"], 3) for row in run.evaluations] == [0.1, 0.2, 0.3, 0.2, 0.1]
    assert mentions(caplog.text, "over-optimi eval/judge")
    second = train(pipeline_folder, tmp_path / "second", brightness, **(values | {"steps": 2}))
    best, same = (
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (run.folder / "best", second.folder / "lora")
    )
    assert all(torch.equal(best[name], same[name]) for name in same)
    # The same command has nothing left to do; without patience it goes on.
    again = train(
        pipeline_folder, tmp_path / "run", brightness, eval_rewards=Peaks(), early_stopping_patience=2, **values
    )
    assert [row["step"] for row in again.metrics] == [1, 2, 3, 4]
    longer = train(
        pipeline_folder, tmp_path / "run", brightness, eval_rewards=Peaks(), early_stopping_patience=0, **values
    )
    assert [row["step"] for row in longer.metrics] == list(range(1, 9))
    assert [row["step"] for row in rows(run.folder, "evaluations.jsonl")] == list(range(9))


def test_an_evaluation_says_how_far_the_model_has_gone(pipeline_folder: Path, tmp_path: Path) -> None:
    run = train(pipeline_folder, tmp_path / "run", brightness, learning_rate=0.02, method="draft_k(k=1)")
    first, *later = run.evaluations
    assert first["denoiser_mse_from_base"] == first["pixel_l1_from_base"] == 0
    assert all(row["denoiser_mse_from_base"] > 0 and row["pixel_l1_from_base"] > 0 for row in later)
    assert later[-1]["denoiser_mse_from_base"] > later[0]["denoiser_mse_from_base"]
    assert run.comparison is not None
    moved = (run.comparison.tuned.images - run.comparison.base.images).abs().mean()
    assert later[-1]["pixel_l1_from_base"] == pytest.approx(float(moved), rel=1e-6)


def test_the_denoiser_mse_by_hand(pipeline_folder: Path) -> None:
    model = load_model(pipeline_folder)
    base = load_model(pipeline_folder)
    add_random_lora(model)
    schedule = model.schedule(3)
    ours = denoiser_mse_from_base(model, ["a", "b"], schedule, 3.0)
    tuned, plain = (m.denoiser_for(["a", "b"], schedule, 3.0) for m in (model, base))
    x = torch.cat([model.noise(torch.Generator().manual_seed(seed), 1) for seed in (0, 1)])
    distances = []
    with torch.no_grad():
        for step in schedule.steps:
            clean, noise = tuned(x, step)
            distances.append(float((noise - plain(x, step).noise).square().mean()))
            x = step.alpha_next * clean + step.sigma_next * noise
    assert ours == pytest.approx(sum(distances) / 3, rel=1e-5)
    assert ours > 1e-6


def test_settings_of_the_guard(pipeline_folder: Path, tmp_path: Path) -> None:
    for values, message in (
        ({"early_stopping_patience": 2, "validation_steps": 0}, "patience eval_prompts validation_steps"),
        ({"early_stopping_patience": 2, "eval_prompts": ""}, "patience eval_prompts validation_steps"),
        ({"metric_for_best_model": "eval/x + "}, "eval/x +"),
        ({"metric_for_best_model": "eval/x"}, "eval/x"),
        # A reward without features, and one image of each prompt.
        ({"metric_for_best_model": "eval/diversity", "eval_rewards": "saturation"}, "eval/diversity eval/saturation"),
        ({"metric_for_best_model": "eval/diversity", "eval_rewards": "emoji_clip"}, "eval/diversity eval/emoji_clip"),
    ):
        with raises(DraftuneError, message):
            train(pipeline_folder, tmp_path / "run", brightness, **values)


@pytest.mark.parametrize("name", ["step", "best", "change", "stderr", "reward_queries", "pixel_l1_from_base"])
def test_no_reward_takes_the_name_of_another_column(name: str, pipeline_folder: Path, tmp_path: Path) -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return brightness(images, prompts)

    reward.__name__ = name
    with raises(DraftuneError, f"{name} column"):
        draftune.train(str(pipeline_folder), reward, ["a cat"], output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_columns_without_evaluations_are_told(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"eval_prompts": "", "validation_steps": 2, "metric_for_best_model": "brightness"}
    draftune.Trainer(str(pipeline_folder), brightness, ["a cat"], output=str(tmp_path / "run"), **values)
    assert mentions(caplog.text, "validation_steps 2 no effect metric_for_best_model no effect")


def test_a_held_out_reward_that_was_to_be_low() -> None:
    """A penalty that falls is no warning; one that rises is, whatever the criterion of the best LoRA."""
    for judged, said in (([0.9, 0.6, 0.3], None), ([0.3, 0.6, 0.9], "eval/judge 0.300 0 0.900")):
        guard = EarlyStopping({"aesthetic": 1.0}, 0, "aesthetic", {"eval/judge": -0.5})
        for row in told([1, 2, 3], judged):
            guard.update(row)
        warning = guard.warning()
        assert warning is None if said is None else mentions(str(warning), said)
