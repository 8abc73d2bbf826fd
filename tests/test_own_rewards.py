"""A user's own reward: from Python, from a file, and what is said when it does not work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.evaluation.reward_check import check_reward
from draftune.prompts import Prompt, metadata
from draftune.rewards import Reward, load_reward
from draftune.utils.images import from_pil, to_pil

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", "a bird"]

FILE = """
import torch
from draftune import Reward
from helper import FACTOR

def red(images, prompts, k=1.0):
    return FACTOR * k * images[:, 0].mean((1, 2))

class Green(Reward):
    def __init__(self, power: int = 1):
        super().__init__()
        self.power = power
    def score(self, images, prompts):
        return images[:, 1].pow(self.power).mean((1, 2))

class Plain:
    def __call__(self, images, prompts):
        return images[:, 2].mean((1, 2))

def blind(images):
    return images.mean((1, 2, 3))

def breaks(images, prompts):
    return images[:, 7]

def round_trip(images, prompts):
    from draftune.utils.images import from_pil, to_pil
    return torch.cat([from_pil(p) for p in to_pil(images)]).mean((1, 2, 3))

def half(images, prompts):
    return torch.stack([i.mean() if p == "a cat" else i.mean().detach() for i, p in zip(images, prompts)])
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("FACTOR = 2.0\n")
    (tmp_path / "my rewards.py").write_text(FILE)
    (tmp_path / "rewards.py").write_text(FILE)
    return tmp_path / "rewards.py"


def test_functions_and_classes_of_a_file(file: Path) -> None:
    reward = load_reward(f"'{file}:red'(k=3) + 0.5*'{file}:Green'(power=2) - '{file}:Plain'")
    total, parts = reward.components(IMAGES, PROMPTS)
    red, green, blue = (IMAGES[:, i] for i in range(3))
    wanted = 6 * red.mean((1, 2)) + 0.5 * green.pow(2).mean((1, 2)) - blue.mean((1, 2))
    assert torch.allclose(total, wanted)
    assert list(parts) == ["red", "Green", "Plain"]
    quoted = load_reward(f"'{file.with_name('my rewards.py')}:red'")
    assert torch.allclose(quoted(IMAGES, PROMPTS), 2 * red.mean((1, 2)))
    assert load_reward(reward.expression)(IMAGES, PROMPTS).equal(total)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewards.py:rde", r"unknown reward in .*rewards.py': 'rde': did you mean 'red'"),
        ("rewards.py:FACTOR", "known: Green, Plain, blind, breaks, half, red, round_trip$"),
        ("rewards.py:red|(q=1)", "setting of reward .*red: 'q'.*k"),
        ("rewards.py:Green|(power=1.5)", "power of reward .*Green must be a whole number"),
        ("rewards.py:blind", r"'blind' must take \(images, prompts\)"),
        ("nowhere.py:red", "no file .*nowhere.py"),
        ("broken.py:red", r"broken.py' can't be run: ZeroDivisionError: division by zero \(.*broken.py, line 2\)"),
        ("syntax.py:red", r"syntax.py' can't be run: SyntaxError"),
    ],
)
def test_files_that_do_not_work(file: Path, name: str, message: str) -> None:
    (file.parent / "broken.py").write_text("\n1 / 0\n")
    (file.parent / "syntax.py").write_text("def red(:\n")
    name, _, settings = name.partition("|")
    with pytest.raises(DraftuneError, match=message):
        load_reward(f"'{file.parent}/{name}'{settings}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("breaks", r"'breaks' failed: IndexError: .* \(.*rewards.py, line 24\)"),
        ("round_trip", "'round_trip' has no gradient for any of the 3 images: look for .*PIL"),
        ("half", r"'half' gives no gradient to 2 of 3 images: image 2 \(a dog\), 3 \(a bird\)"),
    ],
)
def test_what_is_wrong_is_said_before_training(file: Path, name: str, message: str) -> None:
    with pytest.raises(DraftuneError, match=message):
        check_reward(load_reward(f"brightness + '{file}:{name}'"), IMAGES, PROMPTS)


def no_grad(images: Tensor, prompts: Sequence[str]) -> Tensor:
    with torch.no_grad():
        return images.mean((1, 2, 3))


def through_numpy(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor(np.stack([np.asarray(p).mean() for p in to_pil(images)]))


def argmax(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).argmax(1)


def rounds(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images * 3).round().mean((1, 2, 3))


def hinge(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images.mean((1, 2, 3)) - 0.5).relu()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_grad, "'no_grad' has no gradient for any of the 3 images: look for no_grad"),
        (through_numpy, "has no gradient for any of the 3"),
        (argmax, "numbers, not torch.int64: look for argmax"),
        (rounds, r"no gradient to 3 of 3 images: image 1 \(a cat\), 2 \(a dog\), 3 \(a bird\); look for rounding"),
        (hinge, r"no gradient to 1 of 3 images: image 3 \(a bird\)"),
    ],
)
def test_a_part_without_a_gradient_is_refused_beside_one_that_has_it(function: Any, message: str) -> None:
    images = torch.stack([IMAGES[0] * 0.1 + 0.6, IMAGES[1] * 0.1 + 0.6, IMAGES[2] * 0.1])
    with pytest.raises(DraftuneError, match=message):
        check_reward(load_reward("brightness") + load_reward(function), images, PROMPTS)


def test_the_command_line_says_it_in_one_line(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    to_pil(IMAGES)[0].save(tmp_path / "a.png")
    assert main(["score", str(tmp_path / "a.png"), "--reward", f"{file}:breaks"]) == 2
    assert "failed: IndexError" in capsys.readouterr().err.splitlines()[-1]
    assert main(["score", str(tmp_path / "a.png"), "--reward", f"{file}:red"]) == 0
    expected = float(2 * from_pil(to_pil(IMAGES)[0])[:, 0].mean())
    assert f"{expected:.4f}" in capsys.readouterr().out


def test_rewards_see_the_metadata_of_prompts() -> None:
    class Wanted(Reward):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            levels = torch.tensor([float(metadata(prompt)["level"]) for prompt in prompts])
            return -(images.mean((1, 2, 3)) - levels).abs()

    prompts = [Prompt("a", {"level": "0.25"}), Prompt("b", {"level": "1"})]
    reward = load_reward(Wanted())
    reward.set_chunk_size(1)
    assert torch.allclose(reward(torch.full((2, 3, 4, 4), 0.5), prompts), torch.tensor([-0.25, -0.5]))
