"""The reward that docs/how-to/add-a-reward.md writes, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import draftune
import draftune.rewards
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.evaluation.reward_check import check_reward
from draftune.registry.catalog import CATALOG, YOUR_OWN, in_groups
from draftune.registry.factories import run_file
from draftune.rewards import REWARDS, load_reward, parse_reward
from helpers.errors import mentions, raises

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "add-a-reward.md"
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", "a bird"]
WEIGHT, BIAS = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([0.25])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (block,) = re.findall(r"```python title=\"mean_color.py\"\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mean_color.py").write_text(block)
    save_file({"weight": WEIGHT, "bias": BIAS}, tmp_path / "linear.safetensors")
    return tmp_path / "mean_color.py"


def test_its_scores_and_gradients_are_those_of_its_formula(file: Path) -> None:
    expected = IMAGES.mean((2, 3)) @ WEIGHT[0] + BIAS
    weights = file.with_name("linear.safetensors")
    for name in (f"{file}:MeanColor", "mean_color"):
        reward = load_reward(f"2*'{name}'(weights='{weights}') - brightness")
        images = IMAGES.clone().requires_grad_()
        total, parts = reward.components(images, PROMPTS)
        assert torch.allclose(parts[name.rpartition(":")[2]], expected, atol=1e-6)
        (gradient,) = torch.autograd.grad(parts_sum := total.sum(), images)
        assert parts_sum.isfinite()
        luma = torch.tensor([0.299, 0.587, 0.114])
        closed = ((2 * WEIGHT[0] - luma) / 64)[None, :, None, None].expand_as(IMAGES)
        assert torch.allclose(gradient, closed, atol=1e-7)
        assert not any(parameter.requires_grad for parameter in reward.parameters())
        check_reward(reward, IMAGES, PROMPTS)


def test_what_is_missing_is_said_before_anything_is_read(file: Path) -> None:
    run_file(file, "reward")
    with raises(DraftuneError, "nowhere.safetensors weights="):
        parse_reward("mean_color(weights='nowhere.safetensors')")
    with raises(DraftuneError, "weights"):
        parse_reward("mean_color")
    save_file({"weight": WEIGHT}, file.with_name("half.safetensors"))
    found = parse_reward(f"mean_color(weights='{file.with_name('half.safetensors')}')")
    with raises(DraftuneError, "bias"):
        found.load_weights()


def test_it_is_listed_with_its_docstring(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file(file, "reward")
    assert main(["list", "mean_color"]) == 0
    assert mentions(capsys.readouterr().out, "over-optimi")


def test_every_module_that_registers_rewards_is_imported() -> None:
    """The page says that the list in rewards/__init__.py is what makes a name known."""
    root = Path(draftune.__file__).parent
    files = (
        path for path in root.rglob("*.py") if re.search(r"\n@register\(.*\)\nclass \w+\(.*Reward", path.read_text())
    )
    registering = {".".join(path.relative_to(root.parent).with_suffix("").parts) for path in files}
    assert registering - set(draftune.rewards.MODULES) == set()
    for module in draftune.rewards.MODULES:
        assert "\n@register(" in (root.parent / module.replace(".", "/")).with_suffix(".py").read_text(), module


def test_experimental_rewards_are_imported_at_the_first_lookup() -> None:
    code = "import sys, draftune.rewards as r; assert not [m for m in sys.modules if 'draftune.experimental' in m]; "
    code += "assert r.load_reward('threshold(brightness, at=0.5)').label == 'threshold(brightness)'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_built_in_reward_is_in_one_group() -> None:
    """Others are listed as the user's own, without size and license: `CATALOG` needs a row for a new reward."""
    built_in = [name for name, factory in REWARDS.items() if factory.__module__.startswith("draftune.")]
    assert in_groups(built_in)[YOUR_OWN] == ["taste"]
    listed = [name for facts in CATALOG.values() for name in facts]
    assert sorted(listed) == sorted(built_in)


def test_the_list_shows_groups_and_facts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file(file, "reward")
    assert main(["list", "rewards"]) == 0
    text = capsys.readouterr().out
    order = [text.index(f"\n  {group}\n") for group in CATALOG]
    assert order == sorted(order)
    assert "mean_color" in text[order[-1] :]
    hpsv2 = text[text.index("    hpsv2 ") :]
    assert mentions(hpsv2[: hpsv2.index("    hpsv3 ")], "986 M Apache-2.0 arXiv:2306.09341 Compared Never")
    assert main(["list", "ocr"]) == 0
    assert mentions(capsys.readouterr().out, "box Compared Never")


def test_facts_are_those_of_the_docstrings() -> None:
    for facts in CATALOG.values():
        for name, fact in facts.items():
            text = " ".join((REWARDS[name].__doc__ or "").split())
            if fact.source.startswith(("arXiv", "github")):
                assert fact.source in text or "of `" in text, name
            if fact.license and "of `" not in text:
                assert fact.license.split()[0] in text, name
