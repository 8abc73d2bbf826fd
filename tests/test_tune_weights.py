"""A few numbers tuned by a reward: what is found, what is asked, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_merge import ATTENTION, CONVOLUTIONS, drawn_with, saved_lora
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.experimental.tune_weights import GUIDANCE, Parameter1D, WeightEvaluator, tune_weights
from draftune.lora import FILE_NAME
from draftune.models import load_model

FAST: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "prompts": ["a cat", "a dog", "a bird"]}


@pytest.fixture(scope="module")
def loras(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("loras")
    a = saved_lora(pipeline_folder, folder / "a", 0, 2, 3.0, ATTENTION)
    b = saved_lora(pipeline_folder, folder / "b", 1, 3, 1.5, CONVOLUTIONS)
    return str(a), str(b)


def peak(monkeypatch: pytest.MonkeyPatch, *best: float, noise: float = 0.0) -> list[tuple[list[int], Tensor]]:
    """Scores that fall with the squared distance from the best values, whatever is drawn, and what was asked."""
    asked: list[tuple[list[int], Tensor]] = []

    def rewards(self: WeightEvaluator, places: Tensor, prompts: Sequence[str], seeds: list[int]) -> Tensor:
        asked.append((seeds, places.clone()))
        self.queries += len(places) * len(seeds)
        values = torch.tensor([list(self.named(place).values()) for place in places])
        distance = (values - torch.tensor(best)).square().sum(1, keepdim=True)
        draws = [torch.randn(1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return -distance + noise * torch.cat(draws)

    monkeypatch.setattr(WeightEvaluator, "rewards", rewards)
    return asked


def test_the_best_numbers_are_found(loras: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of prompts and seeds is the same at both sides of a knob, and far above what a step changes."""
    asked = peak(monkeypatch, 1.1, -0.4, 3.0, noise=100.0)
    bounds: dict[str, Any] = {"weight_bounds": (-1.0, 1.5), "guidance_bounds": (1.0, 6.0)}
    sources = [(loras[0], 0.5), (loras[1], 0.5)]
    found = tune_weights(sources, "brightness", **FAST, **bounds, steps=60, learning_rate=0.05, batch_size=2)
    assert found.values == pytest.approx({loras[0]: 1.1, loras[1]: -0.4, GUIDANCE: 3.0}, abs=0.1)
    assert found.weights == [(loras[0], found.values[loras[0]]), (loras[1], found.values[loras[1]])]
    gained, low, high = found.difference
    assert gained == pytest.approx(0.6**2 + 0.9**2 + 4, abs=0.1)
    assert high - low < 1e-3
    # Three knobs, two sides each, two pictures; the check's two points of 16 pictures.
    assert found.queries == 60 * 3 * 2 * 2 + 2 * 16
    assert [row["reward_queries"] for row in found.steps][-1] == 720
    # Every step has prompts and seeds of its own.
    assert len({tuple(seeds) for seeds, _ in asked}) == 61
    places = torch.cat([where for _, where in asked])
    assert places.min() >= 0
    assert places.max() <= 1


def test_fewer_knobs_are_asked_about_than_there_are(loras: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = peak(monkeypatch, 1.2, 0.5)
    found = tune_weights([(lora, 0.5) for lora in loras], "brightness", **FAST, steps=60, num_parameters=1)
    steps = [len(where) // 2 for _, where in asked[:-1]]
    # One on the average: one of them, both, or none, which asks about nothing.
    assert set(steps) == {1, 2}
    assert sum(steps) == pytest.approx(60, abs=15)
    assert sum(math.isnan(row["reward"]) for row in found.steps) == 60 - len(steps) > 0
    assert found.values[loras[0]] == pytest.approx(1.2, abs=0.15)


def test_a_number_at_its_bound_stays_there(loras: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = peak(monkeypatch, 9.0)
    found = tune_weights([(loras[0], 1.4)], "brightness", **FAST, steps=10)
    assert found.values[loras[0]] == pytest.approx(1.5, abs=1e-4)
    places = torch.cat([where for _, where in asked])
    assert places.max() <= 1 + 1e-6


def test_pictures_are_those_of_the_weights_and_one_seed_decides_all(
    pipeline_folder: Path, loras: tuple[str, str]
) -> None:
    sources = [(loras[0], 0.7), (loras[1], -0.5)]
    options: dict[str, Any] = {"weight_bounds": (-1.0, 1.5), "steps": 2, "batch_size": 2, "num_images": 3}
    seen: list[Tensor] = []

    def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.extend(images)
        return images.mean((1, 2, 3)) + torch.rand(len(images))

    found, again = (tune_weights(sources, bright, **FAST, **options) for _ in range(2))
    assert found.values == again.values
    assert torch.equal(found.after, again.after)
    # A reward's own random numbers are the same wherever the knobs are.
    assert (found.after - found.before).abs().max() < 0.2
    assert len(seen) == 2 * found.queries == 2 * (2 * 2 * 2 * 2 + 2 * 3)

    model = load_model(pipeline_folder)
    for i, (source, _) in enumerate(sources):
        draftune.load_lora(model, source, f"lora-{i}")
    drawn: list[Tensor] = []
    reward = draftune.load_reward(lambda images, prompts: drawn.append(images) or images.mean((1, 2, 3)))
    settings = draftune.settings.Settings(model=str(pipeline_folder), num_inference_steps=3, guidance_scale=2.0)
    evaluator = WeightEvaluator(
        model, reward, [Parameter1D(source, weight, -1, 1.5) for source, weight in sources], ["cat"], settings, 0
    )
    evaluator.rewards_at(dict(sources), ["cat", "dog"], [3, 4])
    assert torch.allclose(torch.cat(drawn), drawn_with(pipeline_folder, *((Path(s), w) for s, w in sources)), atol=1e-5)


def test_the_command_writes_the_numbers_and_the_mix(
    loras: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\na dog\n")
    argv = ["experimental", "tune-weights", f"{loras[0]}@0.7", loras[1], "--reward", "jpeg_file_size"]
    argv += ["--prompts", str(prompts), "--merge"]
    argv += ["--steps", "2", "--batch-size", "1", "--num-images", "2", "--num-inference-steps", "2"]
    argv += ["--guidance-scale", "2", "--guidance-bounds", "1,4", "--output", str(out)]
    assert main(argv) == 0
    said = json.loads((out / "weights.json").read_text())
    assert said["start"] == {loras[0]: 0.7, loras[1]: 1.0, GUIDANCE: 2.0}
    assert said["reward_queries"] == 2 * 3 * 2 + 2 * 2
    assert said["difference"] == pytest.approx(said["after"] - said["before"], abs=1e-6)
    with (out / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[1][GUIDANCE]) == pytest.approx(said["values"][GUIDANCE], rel=1e-4)  # of two steps the last half
    printed = capsys.readouterr().out
    assert f"draftune sample {out} --guidance-scale {said['values'][GUIDANCE]:.3g}" in printed
    assert "16 reward queries" in printed
    assert ("no measurable improvement" in printed) == (said["interval"][0] <= 0)
    mixed = tmp_path / "mixed"
    draftune.merge_loras([(lora, said["values"][lora]) for lora in loras], mixed)
    expected = load_file(mixed / FILE_NAME)
    assert all(torch.equal(v, expected[k]) for k, v in load_file(out / "lora" / FILE_NAME).items())
    assert main(argv) == 2
    assert "give a new folder (--output)" in capsys.readouterr().err


def test_a_model_alone_has_its_guidance(pipeline_folder: Path) -> None:
    options = {"steps": 1, "batch_size": 1, "num_images": 2, "guidance_bounds": (1.0, 4.0)}
    found = tune_weights([], "brightness", **(FAST | {"guidance_scale": 2.0}), **options, model=str(pipeline_folder))
    assert list(found.values) == [GUIDANCE]
    assert 1 <= found.values[GUIDANCE] <= 4
    assert abs(found.values[GUIDANCE] - 2) == pytest.approx(0.05 * 3, rel=0.01)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "there is nothing to tune"),
        ([], {"guidance_bounds": (1.0, 4.0)}, "--model"),
        ([("a", 1.0), ("a", 0.5)], {}, "'a' is given twice"),
        ([("a", math.nan)], {}, "the weight of 'a' must be finite"),
        ([("a", 1.0)], {"guidance_bounds": (0.0, 4.0)}, "--guidance-bounds must be at least 1"),
        ([("a", 1.0)], {"fd_step": 0.5}, "fd_step must be above 0 and below 0.5"),
        ([("a", 1.0)], {"num_images": 1}, "num_images at least 2"),
        ([("LORA", 1.7)], {}, "between its bounds 0 and 1.5, got 1.7"),
        ([("LORA", 1.0)], {"weight_bounds": (1.0, 0.0)}, "bounds of .* must be two numbers, the lower first"),
        ([("LORA", 1.0)], {"reward": "nothing"}, "unknown reward 'nothing'"),
        ([("nowhere", 1.0)], {}, "no LoRA at 'nowhere'"),
    ],
)
def test_what_is_refused(
    loras: tuple[str, str], sources: list[tuple[str, float]], options: dict[str, Any], message: str
) -> None:
    reward = options.pop("reward", "brightness")
    with pytest.raises(DraftuneError, match=message):
        tune_weights([(s.replace("LORA", loras[0]), w) for s, w in sources], reward, **(FAST | options))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weight-bounds", "1"], "--weight-bounds must be two numbers such as 0,1.5, got '1'"),
        (["--weight-bounds", "-1,x"], "--weight-bounds must be two numbers"),
        (["--guidance-bounds", "4,1"], "--guidance-bounds must be two numbers"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--num-images", "1"], "--num-images must be at least 2"),
        (["--merge"], "--merge needs"),
    ],
)
def test_flags_that_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["experimental", "tune-weights", "--reward", "brightness", "--output", str(tmp_path / "out")]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err
