"""`eval_prompt_template`: what the base model reaches with other words, beside what training reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import draftune
from draftune.errors import DraftuneError
from draftune.evaluation.metrics import evaluate
from draftune.recommended import EMOJI
from draftune.report.collect import collect
from draftune.runs.logs import EVALUATIONS, read_rows
from draftune.settings import Settings
from draftune.training import validation

PROMPTS = ["a cat", "a dog"]
SMALL: dict[str, Any] = {
    "method": "draft_k(k=1)",
    "steps": 2,
    "batch_size": 2,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "lora_rank": 2,
    "log_images_steps": 0,
    "num_log_prompts": 1,
    "checkpointing_steps": 1,
    "num_validation_images": 2,
    "device": "cpu",
    "seed": 0,
}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "eval.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


def test_the_base_model_is_also_scored_with_the_prompts_of_the_template(
    pipeline_folder: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, folder = "a photo of {prompt}, {prompt}", tmp_path / "run"
    values = SMALL | {"eval_prompts": prompts, "eval_prompt_template": template, "output": str(folder)}
    trainer = draftune.Trainer(str(pipeline_folder), "brightness", PROMPTS, **values | {"steps": 1})

    def draw(texts: Any, seeds: Any) -> Any:
        texts = [f"a photo of {text}, {text}" for text in texts]
        return trainer.model.sample_tensors(texts, seeds, trainer.schedule, 3.0, batch_size=2)

    expected = evaluate(draw, trainer.reward, None, PROMPTS, 2).scores["brightness"]
    run = trainer.train()
    assert run.comparison is not None
    base = run.comparison.scores["brightness"][0]
    assert run.comparison.template["brightness"] == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(base, abs=1e-5)
    assert f"{expected:.3f}" in run.comparison.table()
    scores = collect(folder)["scores"]
    assert scores["head"][-1] == f'base model, "{template}"'
    assert scores["rows"][0][-1] == f"{expected:.4g}"

    bounds = read_rows(folder / EVALUATIONS)[1]["change"]["brightness"]
    paired = run.comparison.paired()["brightness"]
    assert bounds == [paired.low, paired.high]
    page = collect(folder)
    assert f"({paired.low:+.3g} to {paired.high:+.3g})" in page["summary"]
    assert f"({paired.low:+.3g} to {paired.high:+.3g})" in page["scores"]["rows"][0][4]

    rows, evaluated = (folder / EVALUATIONS).read_text(), list[None]()
    monkeypatch.setattr(validation, "evaluate", lambda *values: evaluated.append(None) or evaluate(*values))
    resumed = draftune.train(str(pipeline_folder), "brightness", PROMPTS, **values)
    assert (folder / EVALUATIONS).read_text().startswith(rows)
    assert resumed.comparison is not None
    assert resumed.comparison.template == run.comparison.template
    assert len(evaluated) == 2, "the base model and the fine-tuned one; the template's scores are in the log"
    assert ["template" in row for row in read_rows(folder / EVALUATIONS)] == [True, False, False]


def test_a_template_without_a_place_for_the_prompt_is_refused() -> None:
    with pytest.raises(DraftuneError, match=r"eval_prompt_template.*\{prompt\}.*'a photo'"):
        Settings(eval_prompt_template="a photo")


def test_the_recommended_template_belongs_to_the_recommended_reward() -> None:
    assert Settings().eval_prompt_template == EMOJI["eval_prompt_template"]
    assert Settings(reward="emoji_clip").eval_prompt_template == ""
    assert Settings(reward="emoji_clip").eval_rewards == "emoji_name_accuracy"
    assert Settings(model="CompVis/stable-diffusion-v1-4", reward="clip").eval_rewards is None
    same = EMOJI["reward"].replace("0.25*", "0.250 * ").replace('"', "'")
    assert same != EMOJI["reward"]
    assert Settings(reward=same).eval_prompt_template == EMOJI["eval_prompt_template"]
    assert Settings(reward="emoji_clip", eval_prompt_template="3d {prompt}").eval_prompt_template == "3d {prompt}"
