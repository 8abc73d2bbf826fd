"""The notebook's cells run in order, with few steps; those for a shell or a GPU are checked only."""

from __future__ import annotations

import json
import shlex
from functools import partialmethod
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from test_docs import PARSER

import draftune
from draftune.models import DiffusionModel
from draftune.settings import Settings

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


def cells(tag: str | None) -> list[str]:
    """Return the source of the code cells with a tag, or with none."""
    read = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in read if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in code if cell["metadata"].get("tags", [None]) == [tag]]


def test_it_is_a_notebook_without_outputs() -> None:
    read = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (read["nbformat"], read["metadata"]["kernelspec"]["language"]) == (4, "python")
    for cell in read["cells"]:
        assert set(cell) == {"cell_type", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        assert not cell.get("outputs")
    assert sum(len(cells(tag)) for tag in (None, "install", "shell", "gpu")) == sum(
        cell["cell_type"] == "code" for cell in read["cells"]
    )


def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    train = draftune.train
    (tmp_path / "two.txt").write_text("pizza\nsun\n")
    fewer: dict[str, Any] = {"steps": 2, "num_inference_steps": 2, "batch_size": 1, "num_validation_images": 1}

    def short(*args: Any, **values: Any) -> draftune.Run:
        made = values | fewer | ({} if values.get("eval_prompts") == "" else {"eval_prompts": "two.txt"})
        return train(*args, **made, num_log_prompts=1)

    monkeypatch.setattr(draftune, "train", short)
    monkeypatch.setattr(DiffusionModel, "sample", partialmethod(DiffusionModel.sample, num_inference_steps=4))
    names: dict[str, Any] = {}
    for source in cells(None):
        exec(source, names)
    assert len(names["run"].metrics) == 2
    assert (names["strip"].width, names["strip"].height) == (6 * 128, 128)
    assert (tmp_path / "glossy" / "pytorch_lora_weights.safetensors").is_file()


def test_its_commands_and_its_gpu_cell_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in "\n".join(cells("shell")).splitlines():
        program, *arguments = shlex.split(line.removeprefix("!"))
        assert program == "draftune"
        PARSER.parse_args(arguments)
    called: list[Settings] = []

    def checked(model: str, reward: str, **values: Any) -> None:
        called.append(Settings(model=model, reward=reward, **values))

    monkeypatch.setattr(draftune, "train", checked)
    for source in cells("gpu"):
        exec(source, {"draftune": draftune})
    assert called[0].mixed_precision == "bf16"
