"""The commands and Python blocks of the documentation run, with few steps and images."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_docs import DOCUMENTS, PARSER, Block, blocks, calls, named

import draftune
from draftune.cli.main import expressions_joined, main

pytestmark = pytest.mark.slow

SMALL = {
    "sample": ["--num-inference-steps", "2", "--num-images", "1"],
    "optimize-noise": ["--num-inference-steps", "2", "--steps", "1"],
    "eval": ["--num-inference-steps", "2", "--num-images", "1", "--prompts", "two.txt"],
    "sweep": ["--num-inference-steps", "2", "--num-images", "1", "--prompts", "two.txt", "--scales", "0,1"],
    "experimental tune-weights": [
        "--num-inference-steps",
        "2",
        "--num-images",
        "2",
        "--prompts",
        "two.txt",
        "--steps",
        "1",
    ],
    "experimental distill": ["--num-trajectories", "1", "--steps-per-trajectory", "1", "--batch-size", "1"],
}
"""Flags that make a command take seconds. The last of equal flags counts."""
RUN = re.compile(r"\bruns/[\w.-]+")


def runnable(document: Path) -> list[Block]:
    """Return the files, commands and Python of a page that need nothing special."""
    found = [block for block in blocks(document) if block.language in ("bash", "python") and not block.needs]
    return found if any(block.language == "python" or list(calls(block.text)) for block in found) else []


PAGES = [document for document in DOCUMENTS if runnable(document)]


def small_run(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings that make a run take seconds. A folder that holds a run gets one update more."""
    log = Path(str(values.get("output") or "runs/draftune")) / "metrics.jsonl"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    depth = 10 if re.search(r"k=|m=|drtune|refl|alignprop|direct_align", str(values.get("method") or "")) else 3
    group = values.get("num_images_per_prompt") or 1
    small = {"steps": done + 1, "num_inference_steps": depth, "batch_size": max(2, group), "num_log_prompts": 1}
    small |= {
        "eval_prompts": "two.txt",
        "num_validation_images": 1,
        "validation_steps": 0,
        "early_stopping_patience": 0,
    }
    return small | ({"reward_normalization_samples": 2} if values.get("reward_normalization_samples") else {})


def small_command(argv: list[str]) -> list[str]:
    if argv[0] not in ("train", "preflight"):
        name = " ".join(argv[:2]) if argv[0] == "experimental" else argv[0]
        return [*argv, *SMALL.get(name, [])]
    args = vars(PARSER.parse_args(expressions_joined(argv)))
    return [*argv, *(f"--{name.replace('_', '-')}={value}" for name, value in small_run(args).items())]


def write_inputs(folder: Path) -> None:
    """Write the files that the pages assume to be there."""
    (folder / "two.txt").write_text("pizza\nsun\n")
    (folder / "things.txt").write_text("rocket\nhouse\n")
    (folder / "faces.txt").write_text("cat face\n")
    (folder / "my.py").write_text("def scorer(images, prompts):\n    return images.round().mean((1, 2, 3))\n")
    save_file({"weight": torch.ones(1, 3), "bias": torch.zeros(1)}, folder / "linear.safetensors")
    image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    names = ["half.png", "mask.png", "base.png", "cats/000-cat-face-seed3.png", "photos/a.png", "photos/b.png"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        image.save(folder / name)
    (folder / "out").mkdir()
    image.save(folder / "out" / "pizza.jpg")
    (folder / "prompts.csv").write_text("image,prompt\npizza.jpg,pizza\n")


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the embedded model, which stands for every run that a page does not make itself."""
    folder = tmp_path_factory.mktemp("docs")
    write_inputs(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(small_command(["train", "--prompts", "emoji-common", "--output", "runs/base"])) == 0
    finally:
        os.chdir(before)
    return folder / "runs" / "base"


def provide(text: str, base: Path) -> None:
    """Copy the short run to each run that the text reads and that is not there."""
    for name in RUN.findall(text):
        if not Path(name).exists():
            shutil.copytree(base, name)


@pytest.mark.parametrize("document", PAGES, ids=named)
def test_commands_run(document: Path, base_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    train = draftune.train
    monkeypatch.setattr(draftune, "train", lambda *a, **values: train(*a, **values | small_run(values)))
    names: dict[str, Any] = {"draftune": draftune}
    seen: list[list[str]] = []
    found = runnable(document)
    for block in found:
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
    for block in found:
        if block.title or "from_pretrained" in block.text:
            continue
        if block.language == "python":
            made = set(re.findall(r"output=\"([^\"]+)\"", block.text))
            provide(" ".join(name for name in RUN.findall(block.text) if name not in made), base_run)
            exec(block.text, names)
            continue
        for argv in calls(block.text):
            if argv in seen or argv[0] in ("watch", "ui"):
                continue
            seen.append(argv)
            output = argv.index("--output") + 1 if "--output" in argv else None
            provide(" ".join(word for i, word in enumerate(argv) if i != output), base_run)
            allowed = (0, 1) if argv[0] == "preflight" else (0,)
            assert main(small_command(argv)) in allowed, argv
