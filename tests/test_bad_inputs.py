"""Whatever is wrong with an input: one line that names it, exit code 2, nothing lost and nothing left behind.

DRAFTUNE_BAD_INPUTS is their number, DRAFTUNE_BAD_SEED where they begin; a failure names both for itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import helpers.bad_expressions
import helpers.bad_files
import helpers.bad_values  # noqa: F401
from draftune.cli import COMMANDS
from draftune.cli.main import build_parser, expressions_joined, main
from draftune.errors import DraftuneError
from draftune.lora import add_lora, save_lora
from draftune.models import load_model
from draftune.presets import read_yaml
from draftune.prompts import load_prompts
from draftune.runs.logs import read_rows
from draftune.settings import Settings
from helpers.bad_inputs import MAKERS, SMALL, Bad, Making, World
from helpers.errors import normalized, raises
from helpers.pipelines import build_pipeline

COUNT = int(os.environ.get("DRAFTUNE_BAD_INPUTS", "300"))
SEED = int(os.environ.get("DRAFTUNE_BAD_SEED", "0"))
BATCHES = 12
BAR = re.compile(r"\d+%\||^run \d+ of \d+: ")
"""What is told of the progress."""


@pytest.fixture(scope="module")
def world(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(folder / "picture.png")
    model = Path(shutil.copytree(pipeline_folder, folder / "model"))
    command = ["train", "--model", str(model), "--output", str(folder / "run"), *SMALL, "--steps", "3"]
    command += [
        "--eval-prompts",
        str(folder / "prompts.txt"),
        "--num-validation-images",
        "1",
        "--validation-steps",
        "1",
    ]
    assert main([*command, "--log-images-steps", "1", "--eval-rewards", "saturation", "--lora-rank", "2"]) == 0
    shutil.rmtree(folder / "run" / "tensorboard")
    pipeline = build_pipeline(folder / "parts")
    other = load_model(pipeline)
    add_lora(other, 2, targets=["to_q"])
    path = save_lora(other, folder / "other")
    wider = {k: torch.cat([v, v], 1) if "down" in k else v for k, v in load_file(path).items()}
    save_file(wider, path, {"base_model": "someone/other"})
    shutil.rmtree(folder / "parts")
    return World(model, folder / "run", folder / "picture.png", folder / "prompts.txt", path)


@pytest.fixture(autouse=True)
def nothing_long_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would go on for hours, were the input good after all."""

    from draftune.report.rating import RatingSession
    from draftune.report.serve import Server

    def serve(server: Server | RatingSession) -> None:
        raise AssertionError("it was taken for good")

    monkeypatch.setattr(RatingSession, "run", serve)
    monkeypatch.setattr(Server, "serve_forever", serve)


def files(folder: Path) -> dict[str, str]:
    """Everything in a folder but empty folders, with what is in it."""
    found = {}
    for root, _, names in os.walk(folder):
        for path in (Path(root) / name for name in names):
            link = path.is_symlink()
            content = os.readlink(path).encode() if link else path.read_bytes()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def made(number: int, folder: Path, world: World) -> tuple[str, Bad]:
    """The bad input of this number and its kind: every kind once, then as chance has it."""
    random = Random(f"{SEED}/{number}")
    pairs = [(kind, command) for kind, (_, commands) in MAKERS.items() for command in commands]
    kind, command = pairs[number] if number < len(pairs) else random.choice(pairs)
    return f"{kind} of {command}", MAKERS[kind][0](Making(random, folder, world, command))


def complaint(argv: list[str], names: list[str], code: Any, out: str, err: str) -> str | None:
    """What is wrong with an answer."""
    said = [line.rpartition("\r")[2] for line in err.splitlines()]
    lines = [line for line in said if line.strip() and not BAR.search(line)]
    if code != 2:
        return f"exit code {code!r}"
    if len(lines) != 1 or not lines[0].startswith("draftune: "):
        return f"{len(lines)} lines"
    # Several problems of one kind are said at once.
    if max(map(len, lines[0].split("; "))) >= 600:
        return f"{len(lines[0])} characters"
    if not lines[0].isprintable():
        return "control characters"
    if not any(name and normalized(name) in normalized(lines[0]) for name in names):
        return f"it names none of {[name[:80] for name in names]}"
    return f"it prints {out[:80]!r}" if out.strip() else None


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_bad_input_is_one_line(
    batch: int,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = []
    before = files(world.run.parent)
    for number in range(batch, COUNT, BATCHES):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        kind, bad = made(number, folder, world)
        held = files(folder)
        caplog.clear()
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            try:
                code: Any = main(bad.argv)
            except BaseException as error:
                code = f"{type(error).__name__}: {str(error)[:300]}"
        printed = capfd.readouterr()
        problem = complaint(bad.argv, bad.names, code, printed.out, printed.err)
        noise = [str(w.message) for w in warned if not issubclass(w.category, DeprecationWarning | ResourceWarning)]
        noise += [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        if not problem and noise:
            problem = f"it also says {noise[0]!r}"
        if not problem and files(folder) != held:
            problem = f"files: {sorted(set(files(folder).items()) ^ set(held.items()))[:4]}"
        if not problem and files(world.run.parent) != before:
            problem, before = "the good things are not what they were", files(world.run.parent)
        if problem:
            shown = [argument if len(argument) < 300 else f"{argument[:300]}…" for argument in bad.argv]
            failures.append(f"{number}, seed {SEED}, {kind}: {problem}\n  {shown}\n  {printed.err.strip()[-700:]!r}")
        shutil.rmtree(folder)
    assert not failures, f"{len(failures)} of them:\n" + "\n".join(failures)


def test_a_log_ends_where_the_run_was_cut_off_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    row = b'{"step": %d, "prompts": ["a"], "scores": [1.5]}'
    ends = {b"": [1], b"\n": [1], b"\n" + row % 2: [1, 2], b"\n" + row[:20]: [1], b"\n\0\0\0": [1]}
    for tail, steps in ends.items():
        path.write_bytes(row % 1 + tail)
        assert [found["step"] for found in read_rows(path)] == steps
    for wrong in (b"oops", b"", b'{"step": "2"}', row[:20]):
        path.write_bytes(row % 1 + b"\n" + wrong + b"\n" + row % 3 + b"\n")
        with raises(DraftuneError, "samples.jsonl line 2"):
            read_rows(path)


def test_what_is_odd_but_good(tmp_path: Path) -> None:
    (tmp_path / "excel.csv").write_bytes(b"\xef\xbb\xbfprompt,style\r\na cat,3d\r\n\r\n,\r\n")
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\na dog")
    assert load_prompts(str(tmp_path / "excel.csv")) == ["a cat"]
    assert load_prompts(str(tmp_path / "windows.txt")) == ["a cat", "a dog"]
    (tmp_path / "odd.yaml").write_text("mixed_precision: no\nlearning_rate: 1e-3\neval_rewards: ''\nsteps: 1_000\n")
    settings = Settings.from_mapping(read_yaml(tmp_path / "odd.yaml"))
    assert (settings.mixed_precision, settings.learning_rate, settings.eval_rewards, settings.steps) == (
        "no",
        1e-3,
        "",
        1000,
    )
    for flag, value in (
        ("--metric-for-best-model", "-eval/judge"),
        ("--reward", "-2*brightness"),
        ("--metric-for-best-model", "-1*a + b"),
    ):
        args = build_parser().parse_args(expressions_joined(["train", flag, value]))
        assert getattr(args, flag[2:].replace("-", "_")) == value


def test_what_is_said_is_short_and_moves_no_cursor() -> None:
    error = DraftuneError("x" * 10_000 + " do this", "two\nlines \x1b[31m")
    first, second = str(error).split("; ")
    assert len(first) < 600
    assert first.endswith(" do this")
    assert second == "two lines \\x1b[31m"


def test_every_command_has_bad_inputs() -> None:
    assert {command for _, commands in MAKERS.values() for command in commands} == {c.name for c in COMMANDS}
