"""The scripts in examples/ run: on the embedded model as they are, else on a small random model of the same class."""

from __future__ import annotations

import json
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_sdxl

import draftune
from helpers.odd_models import scheduler
from helpers.vision_language import save_vlm

EXAMPLES = Path(__file__).parent.parent / "examples"
MOST_LINES = 40
SMALL = {"steps": 2, "batch_size": 1, "num_inference_steps": 4, "device": "cpu", "mixed_precision": "no"}
SMALL |= {"num_log_prompts": 1, "num_validation_images": 1, "height": 32, "width": 32}


def test_each_example_is_short_and_has_a_test() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    tested = set(re.findall(r"example\(\"(\w+)\"", Path(__file__).read_text()))
    assert {path.stem for path in files} == tested
    assert all(len(path.read_text().splitlines()) <= MOST_LINES for path in files)
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"]({path.name})" in readme for path in files)


def example(name: str) -> None:
    """Run an example as the command line does."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Values that replace those of an example's call of `draftune.train`; the first two are model and reward."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    values: dict[str, Any] = dict(SMALL)
    train = draftune.train

    def small_train(model: str, reward: str, **given: Any) -> draftune.Run:
        made = {"model": model, "reward": reward, **given, **values}
        for name in ("prompts", "eval_prompts"):
            made |= {name: "two.txt"} if name in given else {}
        made |= {name: 1 for name in ("validation_steps",) if name in given}
        return train(made.pop("model"), made.pop("reward"), **made)

    monkeypatch.setattr(draftune, "train", small_train)
    return values


def metrics(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_stable_diffusion(small: dict[str, Any], pipeline_folder: Path, clip_folder: Path) -> None:
    small |= {"model": str(pipeline_folder), "reward": f"pickscore(model={str(clip_folder)!r})"}
    small |= {"eval_rewards": "brightness"}
    example("sd15_pickscore")
    assert len(metrics("runs/sd15-pickscore")) == 2
    assert Path("sd15-pickscore.safetensors").is_file()


def test_turbo(small: dict[str, Any], tmp_path: Path, clip_folder: Path) -> None:
    folder = test_sdxl.saved(tmp_path / "sdxl")
    scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")(folder)
    small |= {"model": str(folder), "reward": f"pickscore(model={str(clip_folder)!r})"}
    small |= {"tiny_decoder": None}  # one that was not trained for the model is refused
    example("turbo")
    assert len(metrics("runs/turbo")) == 2
    assert Path("turbo-pickscore", "pytorch_lora_weights.safetensors").is_file()


def test_question(small: dict[str, Any], tmp_path: Path, pipeline_folder: Path) -> None:
    vlm = save_vlm(tmp_path / "vlm", "smolvlm")
    question = re.search(r'QUESTION = "(.*)"', (EXAMPLES / "question.py").read_text())
    assert question is not None
    small |= {"model": str(pipeline_folder), "eval_rewards": "brightness"}
    small |= {"reward": f"vqa(question={question[1]!r}, model={str(vlm)!r}, max_side=32)"}
    example("question")
    assert len(metrics("runs/question")) == 2


def test_the_readme_s_question_trains(small: dict[str, Any], tmp_path: Path, pipeline_folder: Path) -> None:
    """One line of the README makes a question a reward; the other, of a function, runs with the documentation."""
    (expression,) = re.findall(r"--reward '(vqa\(.*\))'", (EXAMPLES.parent / "README.md").read_text())
    options = f", model={str(save_vlm(tmp_path / 'vlm', 'smolvlm'))!r}, max_side=32)"
    run = draftune.train(
        str(pipeline_folder), expression.removesuffix(")") + options, prompts="two.txt", output="runs/hands"
    )
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in run.metrics)


def test_own_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = draftune.Trainer
    fewer = {"steps": 10, "num_inference_steps": 3, "batch_size": 1, "eval_prompts": "", "num_log_prompts": 1}
    monkeypatch.setattr(
        draftune, "Trainer", lambda *a, **values: trainer(*a, **{**values, **fewer, "eval_rewards": ""})
    )
    example("own_reward")
    assert "update 10: reward " in capsys.readouterr().out
    assert len(metrics("runs/warm")) == 10


def test_guidance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draftune, "sample_guided", partial(draftune.sample_guided, num_inference_steps=10))
    example("guidance")
    rewards = re.findall(r"reward ([\d.]+) without guidance, ([\d.]+)", capsys.readouterr().out)
    assert len(rewards) == 3
    assert all(float(guided) > float(plain) for plain, guided in rewards)
    assert Path("cat-face.png").is_file()
