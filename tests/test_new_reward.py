"""The reward that docs/how-to/add-a-reward.md writes, run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import draftune.rewards
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.registry.custom import run_file
from draftune.rewards import REWARDS, find_reward, load_reward
from draftune.training.checks import probe_reward

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "add-a-reward.md"
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", "a bird"]
WEIGHT, BIAS = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([0.25])


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    (block,) = re.findall(r"```python title=\"mean_color.py\"\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mean_color.py").write_text(block)
    save_file({"weight": WEIGHT, "bias": BIAS}, tmp_path / "linear.safetensors")
    yield tmp_path / "mean_color.py"
    REWARDS.pop("mean-color", None)


def test_its_scores_and_gradients_are_those_of_its_formula(file: Path) -> None:
    expected = IMAGES.mean((2, 3)) @ WEIGHT[0] + BIAS
    weights = file.with_name("linear.safetensors")
    for name in (f"{file}:mean_color", f"{file}:MeanColor", "mean-color"):
        reward = load_reward(f"2*{name}(weights={weights}) - brightness")
        images = IMAGES.clone().requires_grad_()
        total, parts = reward.parts(images, PROMPTS)
        assert torch.allclose(parts[name.rpartition(":")[2]], expected, atol=1e-6)
        (gradient,) = torch.autograd.grad(parts_sum := total.sum(), images)
        assert parts_sum.isfinite()
        luma = torch.tensor([0.299, 0.587, 0.114])
        closed = ((2 * WEIGHT[0] - luma) / 64)[None, :, None, None].expand_as(IMAGES)
        assert torch.allclose(gradient, closed, atol=1e-7)
        assert not any(parameter.requires_grad for parameter in reward.parameters())
        probe_reward(reward, IMAGES, PROMPTS)


def test_what_is_missing_is_said_before_anything_is_read(file: Path) -> None:
    run_file(file, "reward")
    with pytest.raises(DraftuneError, match=r"nowhere.safetensors.*weights="):
        find_reward("mean-color(weights=nowhere.safetensors)")
    with pytest.raises(DraftuneError, match="weights"):
        find_reward("mean-color")
    save_file({"weight": WEIGHT}, file.with_name("half.safetensors"))
    found = find_reward(f"mean-color(weights={file.with_name('half.safetensors')})")
    with pytest.raises(DraftuneError, match="bias"):
        found.ready()


def test_it_is_listed_with_its_docstring(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file(file, "reward")
    assert main(["list", "mean-color"]) == 0
    assert "Over-optimized: one plain color." in capsys.readouterr().out


def test_every_module_that_registers_rewards_is_imported() -> None:
    """The page says that the import line in rewards/__init__.py is what makes a name known."""
    folder = Path(draftune.rewards.__file__).parent
    registering = {path.stem for path in folder.glob("*.py") if "\n@register(" in path.read_text()}
    line = re.findall(r"from draftune\.rewards import \((.*?)\)", (folder / "__init__.py").read_text(), re.DOTALL)
    assert registering == set(re.findall(r"^    (\w+),$", line[0], re.MULTILINE))
