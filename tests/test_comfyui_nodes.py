"""The nodes in integrations/comfyui, with stand-ins for ComfyUI's modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import draftune
from draftune.errors import DraftuneError
from draftune.lora.metadata import STEPS_METADATA
from draftune.sampling.step_range import StepRange
from helpers.errors import raises

ROOT = Path(__file__).parent.parent / "integrations"


class Hooks:
    """A stand-in for ComfyUI's group of hooks."""

    def __init__(self, **made: Any) -> None:
        self.made, self.keyframes = made, []

    def set_keyframes_on_hooks(self, group: Any) -> None:
        self.keyframes = [(frame.start_percent, frame.strength, frame.guarantee_steps) for frame in group.frames]

    def clone_and_combine(self, other: Any) -> list[Any]:
        return [self, other]


class Keyframes:
    """A stand-in for ComfyUI's group of keyframes."""

    def __init__(self) -> None:
        self.frames: list[Any] = []

    def add(self, frame: Any) -> None:
        self.frames.append(frame)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the nodes, imported as ComfyUI imports a folder."""
    modules = {
        "comfy": {},
        "comfy.model_management": {"get_torch_device": lambda: torch.device("cpu")},
        "comfy.utils": {"load_torch_file": lambda path, safe_load: load_file(path) if safe_load else None},
        "comfy.hooks": {
            "create_hook_lora": Hooks,
            "HookKeyframeGroup": Keyframes,
            "HookKeyframe": lambda **values: SimpleNamespace(**values),
        },
        "folder_paths": {
            "get_full_path": lambda kind, name: str(tmp_path / name),
            "get_filename_list": lambda kind: sorted(path.name for path in tmp_path.glob("*.safetensors")),
        },
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "comfyui", raising=False)
    return importlib.import_module("comfyui")


def test_images_are_scored_in_comfyui_s_layout(nodes: Any) -> None:
    images = torch.rand(3, 8, 12, 4, generator=torch.Generator().manual_seed(0))
    node = nodes.NODE_CLASS_MAPPINGS["DraftuneScoreImages"]()
    assert set(node.INPUT_TYPES()["required"]) == {"images", "prompt", "reward"}
    found = node.score(images, "a cat", "2*brightness")
    expected = draftune.load_reward("2*brightness")(images[..., :3].permute(0, 3, 1, 2), ["a cat"] * 3)
    mean, text, best = found["result"]
    assert mean == pytest.approx(float(expected.mean()))
    assert [float(line.split(": ")[1]) for line in text.splitlines()] == pytest.approx(expected.tolist(), rel=1e-3)
    assert torch.equal(best[0], images[int(expected.argmax())])
    assert found["ui"]["text"] == [text]
    with raises(DraftuneError, "brightnes"):
        node.score(images, "a cat", "brightnes")


@pytest.mark.parametrize("text", ["", "0.0-0.4", "0.4-1.0", "0.25-0.75"])
@pytest.mark.parametrize("count", [4, 10, 20])
def test_keyframes_hold_on_the_steps_of_the_range(nodes: Any, text: str, count: int) -> None:
    """As ComfyUI: the last keyframe that starts at or before a step's fraction of the path holds."""
    steps = StepRange.parse(text)
    frames = importlib.import_module("comfyui.nodes").keyframes(steps)
    assert frames[0][0] == 0
    strengths = [[strength for start, strength in frames if start <= i / count][-1] for i in range(count)]
    assert strengths == [float(i in steps.indices(count)) for i in range(count)]


@pytest.mark.parametrize("steps", ["", "0.5-1.0"])
def test_hooks_of_a_lora(nodes: Any, tmp_path: Path, steps: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors", {STEPS_METADATA: "0.0-0.4"})
    node = nodes.NODE_CLASS_MAPPINGS["DraftuneLoRAOnSteps"]()
    assert node.INPUT_TYPES()["required"]["lora_name"] == (["a.safetensors"],)
    (hooks,) = node.create("a.safetensors", 0.7, steps)
    assert hooks.keyframes == ([(0, 0, 0), (0.5, 1, 0)] if steps else [(0, 1, 0), (0.4, 0, 0)])
    assert (hooks.made["strength_model"], hooks.made["strength_clip"]) == (0.7, 0)
    assert list(hooks.made["lora"]) == ["x"]
    before = Hooks()
    (both,) = node.create("a.safetensors", 0.7, steps, before)
    assert both[0] is before
    with raises(DraftuneError, "lora_steps '0.4'"):
        node.create("a.safetensors", 1.0, "0.4")
