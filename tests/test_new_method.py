"""Run the example method of docs/how-to/add-a-method.md as it is written there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from test_gradients import GRIDS, NOISE, Network, T, batch_of, clean_and_noise, gradient_of_method, relative, reward

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.methods import DraftK, load_method
from draftune.sampling.schedule import Prediction, Step
from helpers.errors import raises

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "add-a-method.md"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (block,) = re.findall(r"```python title=\"fading.py\"\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) <= 30
    path = tmp_path / "fading.py"
    path.write_text(block)
    return path


def test_gradient_equals_plain_autograd(file: Path) -> None:
    schedule, network = GRIDS["clean"], Network()
    plain = gradient_of_method(load_method(f"'{file}:Fading'(k=3, fade=1)"), schedule, network)
    assert relative(plain, gradient_of_method(DraftK(3), schedule, network)) < 1e-12
    ours = gradient_of_method(load_method(f"'{file}:Fading'(k=2, fade=0.3)"), schedule, network)
    network.zero_grad()
    x = NOISE
    for i, step in enumerate(schedule.steps):
        x = x.detach() if i <= T - 2 else 0.3 * x + 0.7 * x.detach()
        clean, noise = clean_and_noise(network(x, step.timestep), x, step, "epsilon")
        x = step.alpha_next * clean + step.sigma_next * noise
    reward(x).mean().backward()
    assert relative(ours, torch.cat([p.grad.flatten() for p in network.parameters()])) < 1e-12


def test_trains_from_the_command_line(file: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ["--model", str(pipeline_folder), "--reward", "brightness", "--prompts", "animals", "--steps", "2"]
    arguments += ["--num-inference-steps", "4", "--log-images-steps", "0", "--num-log-prompts", "1", "--device", "cpu"]
    assert main(["train", *arguments, "--method", f"kl('{file}:Fading'(k=2), beta=0.1)", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward_queries"] for row in rows] == [4, 8]
    assert (output / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_mistakes_are_reported(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("class Other:\n    pass\n\n\ndef broken():\n    raise ValueError('no')\n")
    for text, message in (
        (f"{file}:Fadin", "'Fadin' 'Fading'"),
        (f"{file}:Fading(kk=2)", "'kk' 'k'"),
        (f"{file}:Fading(k=two)", "k Fading two"),
        (f"{tmp_path}/other.py:Other", "Other Method"),
        (f"{tmp_path}/other.py:broken", "broken ValueError: no"),
        (f"{tmp_path}/none.py:Other", "none.py"),
        ("kl", "kl method"),
        ("kl(draft_lv + refl)", "kl method"),
        ("draft_k(draft_lv)", "draft_k draft_lv"),
        ("draft_lv + refl", "draft_lv + refl"),
        ("kl(nothing)", "method nothing"),
    ):
        with raises(DraftuneError, message):
            load_method(text)


def test_calls_with_and_without_gradient(file: Path) -> None:
    schedule = GRIDS["clean"]
    network = Network()
    calls: list[bool] = []

    def denoise(x: torch.Tensor, step: Step) -> Prediction:
        calls.append(torch.is_grad_enabled())
        return schedule.to_prediction(network(x, step.timestep), x, step)

    (clean,) = load_method(f"'{file}:Fading'(k=2)").samples(batch_of(denoise, schedule))  # type: ignore[attr-defined]
    assert clean.shape == NOISE.shape
    assert calls == [False] * (T - 2) + [True] * 2
