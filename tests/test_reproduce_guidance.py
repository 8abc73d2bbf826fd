"""The experiment on guidance: what is counted, and its words on rows made up for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from draftune.guidance.methods import load_guide, sample_guided
from draftune.models import load_model
from draftune.reproduce.guidance import guidance
from draftune.reproduce.guided import AHEAD, LORA, TUNED, aheads, calls, counts, ratios, sheets, training_calls
from draftune.reproduce.lab import DIVERSITY, FULL, JUDGE, NAMED, QUICK, REWARD, Lab, Record, Work
from draftune.reproduce.report import Report
from draftune.utils.images import save_image, to_pil


@pytest.mark.parametrize("method", ["ratio(strength=0.1)", "look-ahead(rounds=2)", "look-ahead(rounds=3, tune_from=2)"])
def test_the_calls_that_are_counted_are_made(
    method: str, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(pipeline_folder)
    model.set_checkpointing("none")
    made = 0
    scales = set()
    predict = model.predict

    def counted(x: torch.Tensor, timestep: float, condition: Any, guidance_scale: float) -> torch.Tensor:
        nonlocal made
        made += 1 + torch.is_grad_enabled()
        scales.add((torch.is_grad_enabled() and not x.requires_grad, guidance_scale))
        return predict(x, timestep, condition, guidance_scale)

    monkeypatch.setattr(model, "predict", counted)
    found = sample_guided(model, "brightness", "a cat", method, num_inference_steps=5, guidance_scale=3)
    assert made == calls(method, 5)
    # The LoRA learns to predict the noise without classifier-free guidance.
    assert scales == ({(False, 3), (True, 1)} if "tune_from" in method else {(False, 3)})
    rounds = load_guide(method).draws - 1
    assert found.queries == (2 * rounds + 1 if rounds else 5 + 1)


def test_equal_calls() -> None:
    assert counts(FULL) == [1, 2, 9, 17]
    assert all(FULL.num_inference_steps * calls(way, 1) == calls(way, FULL.num_inference_steps) for way in aheads(FULL))
    assert training_calls(FULL) == 40 * 4 * 21
    assert len(ratios(QUICK)) == 2


class MadeUp(Lab):
    """What each way gives, as a story tells it."""

    def __init__(self, folder: Path, story: Callable[[str, int], float]) -> None:
        super().__init__(folder, FULL)
        self.story = story

    def run(self, work: Work) -> Record:
        row = {REWARD: self.story(LORA, work.seed), JUDGE: 0.5, NAMED: 1.0, DIVERSITY: 0.4}
        return Record([], [row], self.folder)

    def cost(self, method: str, batch_size: int = 4) -> dict[str, float]:
        return {"seconds": 2.0}

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        said = {"judge_3d": 0.5, "judge_name": 1.0, "diversity": 0.4, "seconds": 0.5}
        if name == "guidance-pictures":
            return {f"{way} {kind}": value for way in ("filled", "coloured") for kind, value in DISTANCES.items()}
        seed = int(name[-1])
        if name.startswith("guidance-best"):
            return [said | {"reward": self.story(f"best {n}", seed), "count": n} for n in counts(FULL)]
        (method,) = measure.args[1:2]
        reward = self.story(method, seed)
        rows = [said | {"reward": reward, "seconds": 1.5, "rewards": [4.0, reward]}]
        return rows + [said | {"reward": 4.5}] * (method == TUNED)


DISTANCES = {"guided": 0.01, "plain": 0.03, "unguided": 0.05}


def told(folder: Path, story: Callable[[str, int], float]) -> Report:
    images = torch.rand(1, 3, 8, 8)
    for name in ("mask.png", *(f"{kind}-{i}.png" for kind in ("whole", "filled", "coloured") for i in range(4))):
        save_image(to_pil(images)[0], folder / "guidance-pictures" / name)
    return guidance(MadeUp(folder, story))


@pytest.mark.parametrize(
    ("ahead", "tuned", "words"),
    [
        (6.0, 7.0, ["confirmed", "confirmed"]),
        (3.0, 2.0, ["reversed", "reversed"]),
        (4.01, 4.0, ["not seen", "not seen"]),
    ],
)
def test_what_is_said(tmp_path: Path, ahead: float, tuned: float, words: list[str]) -> None:
    rewards = {AHEAD: ahead, TUNED: tuned, "ratio(strength=0.5)": 9.0, "best 9": 5.0}

    def story(way: str, seed: int) -> float:
        return rewards.get(way, 4.0) + 0.1 * (seed - 1) * (way in (AHEAD, "ratio(strength=0.5)"))

    report = told(tmp_path, story)
    assert [claim.verdict for claim in report.claims] == [*words, "confirmed"]
    assert "at least 3.0 times nearer" in report.claims[2].measured
    assert f"`{AHEAD}` has {ahead:.3f} and the best of 9 seeds 5.000: {ahead - 5:+.3f}" in report.text
    assert "standard deviation over seeds of 0.100" in report.text
    assert "`ratio(strength=0.5)` has 9.000" in report.text
    assert "P(3D) is 0.500 with it, 0.500 with the ratio" in report.text
    # 3,360 calls of training over 160 that look-ahead takes more than plain drawing; 80 s over one that the ratio does.
    assert "for 21 pictures, and the seconds of the ratio for 80." in report.text
    (row,) = [row for row in report.table if row["way"] == AHEAD]
    assert (row["calls"], row["scored"], row["reward"]) == (180, 9, pytest.approx(ahead))
    assert [row["seconds"] for row in report.table if row["way"] == LORA] == [0.5]


def test_the_sheets(tmp_path: Path) -> None:
    whole = torch.rand(2, 3, 4, 4)
    hidden = torch.zeros(1, 3, 4, 4)
    hidden[..., 2:] = 1
    for i in range(2):
        for kind, picture in (("whole", whole), ("filled", 1 - whole), ("coloured", whole / 2)):
            save_image(to_pil(picture[i : i + 1])[0], tmp_path / f"{kind}-{i}.png")
    save_image(to_pil(hidden)[0], tmp_path / "mask.png")
    filled, coloured = sheets(tmp_path, 2)
    assert torch.allclose(filled[0][..., :2], whole[..., :2], atol=0.003)
    assert (filled[0][..., 2:] == 0.5).all()
    assert torch.allclose(filled[1], 1 - whole, atol=0.003)
    assert torch.allclose(coloured[0], whole.mean(1, keepdim=True).expand_as(whole), atol=0.003)
    assert torch.allclose(coloured[1], whole / 2, atol=0.003)
