"""The command line: what it does, and how it answers mistakes."""

from __future__ import annotations

import csv
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from draftune.cli.list import described
from draftune.cli.main import main
from draftune.methods import all_methods
from draftune.models import load_model
from draftune.training.optim import gradient_filters, optimizers
from draftune.utils.images import open_image
from helpers.errors import mentions

SMALL = ["--steps", "2", "--num-inference-steps", "2", "--batch-size", "1", "--log-images-steps", "0"]
SMALL += ["--reward", "jpeg_compressibility", "--guidance-scale", "2", "--num-log-prompts", "2"]
SMALL += ["--timestep-spacing", "leading"]


@pytest.fixture(scope="module")
def run_folder(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    args = ["--learning-rate", "0.05", "--lora-alpha", "3"]
    assert main(["train", "--model", str(pipeline_folder), "--output", str(folder), *SMALL, *args]) == 0
    return folder


def test_flags_win_over_the_file(pipeline_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump({"model": str(pipeline_folder), "seed": 7, "learning_rate": "1e-3", "steps": 50}))
    assert main(["train", "--config", str(config), *SMALL, "--output", str(tmp_path / "run")]) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["seed"], written["learning_rate"], written["steps"]) == (7, 0.001, 2)
    assert (written["weight_decay"], written["lora_rank"]) == (0.1, 8)


def test_sample_draws_what_the_loaded_lora_draws(run_folder: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    assert main(["sample", str(run_folder), "--prompt", "cat", "--seed", "5", "--output", str(tmp_path / "a.png")]) == 0
    command = ["sample", str(pipeline_folder), "--prompt", "cat", "--seed", "5", "--output", str(tmp_path / "b.png")]
    assert main([*command, "--num-inference-steps", "2", "--guidance-scale", "2"]) == 0
    command = ["sample", str(run_folder), "--lora-scale", "0", "--prompt", "cat", "--seed", "5"]
    assert main([*command, "--output", str(tmp_path / "c.png")]) == 0
    tuned, base, zero = (open_image(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    assert torch.equal(base, zero)
    assert not torch.equal(tuned, base)
    model = load_model(pipeline_folder)
    model.pipeline.load_lora_weights(run_folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    again = model.sample_tensors(["cat"], [5], model.schedule(2), 2.0)
    assert (again - tuned).abs().max() < 1e-3 + 0.5 / 255


def test_sample_several(run_folder: Path, tmp_path: Path) -> None:
    prompts = ["--prompt", "a cat", "a dog/bird"]
    lora = run_folder / "lora" / "pytorch_lora_weights.safetensors"
    assert main(["sample", str(lora), *prompts, "--num-images", "2", "--output", str(tmp_path / "folder")]) == 0
    assert len(list((tmp_path / "folder").glob("*.png"))) == 4
    assert main(["sample", str(run_folder), *prompts, "--output", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height > 2 * 128


def test_score_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 30), "red").save(tmp_path / "flat.png")
    noisy = torch.rand(30, 20, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    Image.fromarray(noisy).save(tmp_path / "noisy.png")
    reward = "jpeg_incompressibility + 2*jpeg_compressibility"
    assert main(["score", str(tmp_path / "flat.png"), str(tmp_path / "noisy.png"), "--reward", reward]) == 0
    header, flat, noisy_line = capsys.readouterr().out.splitlines()
    assert header.split() == ["image", "jpeg_incompressibility", "jpeg_compressibility", "total"]
    up, down, total = (float(cell) for cell in noisy_line.split()[1:])
    assert up > 100 > float(flat.split()[1])
    assert total == pytest.approx(up + 2 * down, abs=1e-3)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    everything = capsys.readouterr().out
    for word in ("emoji", "jpeg_compressibility", "draft_lv", "animals"):
        assert word in everything
    assert main(["list", "methods"]) == 0
    methods = capsys.readouterr().out
    assert "jpeg_compressibility" not in methods
    assert [line.split()[0] for line in methods.splitlines() if line.endswith("(experimental)")] == ["sft_pg"]


def test_lists_are_those_of_the_loaded_registries() -> None:
    from draftune.guidance.methods import GUIDES
    from draftune.rewards import REWARDS
    from draftune.sampling.call_cache import CALL_CACHES

    loaded = {"rewards": REWARDS, "methods": all_methods(), "guidance": GUIDES, "caches": CALL_CACHES}
    loaded |= {"optimizers": optimizers(), "filters": gradient_filters()}
    sources = described()
    assert sources.keys() == loaded.keys()
    for what, table in loaded.items():
        # Rewards that other tests registered are in the modules of tests, or in files: "draftune.registry.files:…".
        built_in = {name: made for name, made in table.items() if re.fullmatch(r"draftune\.[\w.]+", made.__module__)}
        assert {name: source.load() for name, source in sources[what].items()} == built_in
        assert all(source.doc == inspect.getdoc(built_in[name]) for name, source in sources[what].items())


@pytest.mark.parametrize("command", ["--help", "list"])
def test_help_and_list_need_no_torch(command: str) -> None:
    code = "import sys; from draftune.cli.main import main; main([sys.argv[1]]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, command], check=True, capture_output=True)


ENTRY_POINT = "from importlib.metadata import entry_points as e; e(group='console_scripts')['draftune'].load()()"
ROOT = Path(__file__).parent.parent
SCRIPTS = [Path(__file__).with_name("conftest.py"), *sorted((ROOT / "benchmarks").glob("*.py"))]
STARTS = {path.name: [str(path)] for path in SCRIPTS if "import torch" in path.read_text()}
STARTS |= {"console script": ["-c", ENTRY_POINT, "list", "hpsv2"], "module": ["-m", "draftune", "list", "hpsv2"]}


def policy_seen_by_torch(folder: Path, arguments: list[str], **environment: str) -> str:
    """Start Python with a torch that prints the environment's OMP_WAIT_POLICY when it is imported, and ends there."""
    (folder / "torch").mkdir()
    code = "import os; os.write(1, os.environ.get('OMP_WAIT_POLICY', 'none').encode()); os._exit(0)"
    (folder / "torch" / "__init__.py").write_text(code)
    given = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | environment
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, *arguments], env=given, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS)
def test_waiting_threads_sleep_from_the_import_of_torch_on(arguments: list[str], tmp_path: Path) -> None:
    assert policy_seen_by_torch(tmp_path, arguments) == "passive"


@pytest.mark.parametrize("name", ["module", "conftest.py", "overhead.py"])
def test_a_users_own_wait_policy_wins(name: str, tmp_path: Path) -> None:
    assert policy_seen_by_torch(tmp_path, STARTS[name], OMP_WAIT_POLICY="active") == "active"


def test_the_library_leaves_the_environment_alone(tmp_path: Path) -> None:
    assert policy_seen_by_torch(tmp_path, ["-c", "import draftune; draftune.load_model"]) == "none"


def test_score_of_folders_patterns_and_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, (name, size) in enumerate(
        {"a.png": (8, 8), "deep/b.JPG": (9, 5), "c.webp": (8, 8), "d.png": (8, 8)}.items()
    ):
        Image.new("RGB", size, (i * 50,) * 3).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes((tmp_path / "in" / "d.png").read_bytes()[:40])
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    command = ["score", str(tmp_path / "in"), str(tmp_path / "in" / "*.webp"), "--reward", "brightness + 2*saturation"]
    assert main([*command, "--output", str(tmp_path / "out" / "scores.csv")]) == 1
    printed = capsys.readouterr()
    assert mentions(printed.err, "skipped broken.png")
    assert "Traceback" not in printed.err
    assert [line.split()[0].rpartition("/")[2] for line in printed.out.splitlines()] == [
        "image", "a.png", "c.webp", "d.png", "b.JPG"
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert [row["image"] for row in rows] == [line.split()[0] for line in printed.out.splitlines()[1:]]
    assert float(rows[2]["brightness"]) == pytest.approx(150 / 255)
    assert float(rows[2]["total"]) == pytest.approx(150 / 255)
    (tmp_path / "in" / "broken.png").unlink()
    assert main([*command, "--output", str(tmp_path / "scores.json")]) == 0
    assert [row["total"] for row in json.loads((tmp_path / "scores.json").read_text())] == pytest.approx(
        [0, 100 / 255, 150 / 255, 50 / 255], abs=1e-2
    )


def test_score_with_a_prompt_for_each_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), "orange").save(tmp_path / name)
    (tmp_path / "prompts.csv").write_text("image,prompt\na.png,pumpkin\nb.png,whale\n")
    command = ["score", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--reward", "emoji_clip", "--prompts"]
    assert main([*command, str(tmp_path / "prompts.csv")]) == 0
    first, second = (line.split()[1] for line in capsys.readouterr().out.splitlines()[1:])
    for name, prompt, wanted in (("a.png", "pumpkin", first), ("b.png", "whale", second)):
        assert main(["score", str(tmp_path / name), "--reward", "emoji_clip", "--prompt", prompt]) == 0
        assert capsys.readouterr().out.split()[-1] == wanted
    assert first != second
    (tmp_path / "prompts.csv").write_text("image,prompt\na.png,pumpkin\n")
    assert main([*command, str(tmp_path / "prompts.csv")]) == 2
    assert mentions(capsys.readouterr().err, "b.png prompt")
    (tmp_path / "prompts.txt").write_text("pumpkin\n")
    assert main([*command, str(tmp_path / "prompts.txt")]) == 2
    assert mentions(capsys.readouterr().err, "prompts.txt")


def test_score_shows_the_total_where_it_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    (tmp_path / "mine.py").write_text("def image(images, prompts):\n    return images.mean((1, 2, 3)) * 0.5\n")
    for reward, columns, values in (
        ("brightness", ["brightness"], [1.0]),
        ("-2*brightness", ["brightness", "total"], [1.0, -2.0]),
        ("sharpness_aware(-2*brightness, rho=1)", ["sharpness_aware_brightness", "total"], [1.0, -2.0]),
        (f"'{tmp_path}/mine.py:image' + brightness", ["image-2", "brightness", "total"], [0.5, 1.0, 1.5]),
    ):
        command = ["score", str(tmp_path / "white.png"), "--reward", reward, "--output", str(tmp_path / "s.csv")]
        assert main(command) == 0
        header, row = (line.split() for line in capsys.readouterr().out.splitlines())
        assert header == ["image", *columns]
        assert [float(cell) for cell in row[1:]] == pytest.approx(values, abs=0.3 if "sharpness" in reward else 1e-4)
        assert (tmp_path / "s.csv").read_text().splitlines()[0] == ",".join(header)


def test_list_says_everything_about_a_reward(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "hpsv2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("hpsv2(version: float = 2.1, weights: str = '', tokenizer: str = ")
    for word in ("arXiv", "Apache-2.0", "224x224", "Over-optimized"):
        assert word in text


def test_mistakes_get_one_line_and_code_2(
    pipeline_folder: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "cat"}\n{bad\n')
    (tmp_path / "lines.txt").write_text("a cat\n")
    (tmp_path / "bad.yaml").write_text("steps: [1\n")
    (tmp_path / "key.yaml").write_text("leraning_rate: 1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "lora.safetensors").write_text("no tensors")
    out = str(tmp_path / "out.png")
    train = ["train", "--model", str(pipeline_folder), "--output", str(tmp_path / "new"), *SMALL]
    missing = str(tmp_path / "missing.csv")
    cases = {
        "model emojy": [*train, "--model", "emojy"],
        "someone/some-model": [*train, "--model", "someone/some-model"],
        "folder model_index.json": [*train, "--model", str(tmp_path / "folder")],
        "jpeg_compressability jpeg_compressibility": [*train, "--reward", "jpeg_compressability"],
        "clip +": [*train, "--reward", "clip +"],
        "method drift": [*train, "--method", "drift"],
        "k=3 2 steps": [*train, "--method", "draft_k(k=3)"],
        "lora_rank 0": [*train, "--lora-rank", "0"],
        "--steps some": [*train, "--steps", "some"],
        "steps 0 1": [*train, "--steps", "0"],
        "--lerning-rate --learning-rate": [*train, "--lerning-rate", "1"],
        "empty.txt": [*train, "--prompts", str(tmp_path / "empty.txt")],
        "binary.txt": [*train, "--prompts", str(tmp_path / "binary.txt")],
        "missing.txt": [*train, "--prompts", str(tmp_path / "missing.txt")],
        "'animal' 'animals'": [*train, "--prompts", "animal"],
        "first learning_rate": [*train, "--output", str(run_folder)],
        "--output": [*train, "--output", str(tmp_path)],
        "empty.txt folder": [*train, "--output", str(tmp_path / "empty.txt")],
        "bad.yaml line 2": [*train, "--config", str(tmp_path / "bad.yaml")],
        "leraning_rate learning_rate": [*train, "--config", str(tmp_path / "key.yaml")],
        "list.yaml": [*train, "--config", str(tmp_path / "list.yaml")],
        "missing.yaml": [*train, "--config", str(tmp_path / "missing.yaml")],
        "trian": ["trian"],
        "'reward' 'rewards'": ["list", "reward"],
        "'hpsv22' 'hpsv2'": ["list", "hpsv22"],
        "'mine.py' function mine.py:my_name": [*train, "--reward", "mine.py"],
        "--config empty": [*train, "--config", ""],
        "model emojii 'emoji'": [*train, "--model", "emojii", "--reward", "aesthetic"],
        "emojii 'emoji'?": ["sample", "emojii", "--prompt", "x", "--output", out],
        "no LoRA runs run": ["sample", str(run_folder.parent), "--prompt", "x", "--output", out],
        "brightness weights 0": [*train, "--reward", "0*brightness"],
        "weights cancel": [*train, "--reward", "brightness - brightness"],
        "broken.jsonl line 2 not JSON": [*train, "--prompts", str(tmp_path / "broken.jsonl")],
        "lines.txt no keys leave ':prompt'": [*train, "--prompts", f"{tmp_path / 'lines.txt'}:prompt"],
        "'cat face' .txt": [*train, "--prompts", "cat face"],
        "OWNER/NAME 'me/a b'": ["push", str(run_folder), "me/a b", "--dry-run"],
        "nest": [*train, "--reward", "sharpness_aware(" * 300],
        "missing.csv": [
            "score",
            str(tmp_path),
            "--reward",
            "clip",
            "--prompts",
            missing,
        ],
        "xswu/HPSv2 HPS_v2.1_compressed.pt weights= head=": [
            *train,
            "--reward",
            "hpsv2 + aesthetic",
        ],
        "LoRA folder": ["sample", str(tmp_path / "folder"), "--prompt", "x", "--output", out],
        "lora.safetensors": ["sample", str(tmp_path / "lora.safetensors"), "--prompt", "x", "--output", out],
        "--output .png x.jpg": ["sample", "x", "--prompt", "x", "--output", "x.jpg"],
        "adam_beta1 1.5": [*train, "--adam-beta1", "1.5"],
        f"seed {'9' * 30}": [*train, "--seed", "9" * 30],
        f"seed {2**32}": [*train, "--seed", str(2**32)],
        "--num-images 0": ["sample", "x", "--prompt", "x", "--num-images", "0", "--output", out],
        "text.png": ["score", str(tmp_path / "text.png"), "--reward", "brightness"],
        "*.jpg": ["score", str(tmp_path / "*.jpg"), "--reward", "brightness"],
        "x.txt .csv .json": ["score", "x.png", "--reward", "brightness", "--output", "x.txt"],
        "--prompt --prompts": ["score", "x.png", "--reward", "clip", "--prompt", "a", "--prompts", "b"],
        "xswu/HPSv2 weights=": [*train, "--reward", "brightness + hpsv2"],
        "yuvalkirstain/PickScore_v1": [*train, "--eval-rewards", "pickscore"],
        "--reward": ["score", str(tmp_path / "text.png")],
    }
    for message, argv in cases.items():
        code = main(argv)
        lines = capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), (argv, lines)
        assert mentions(lines[0], message), (message, lines[0])
    assert not (tmp_path / "new").exists()


def test_an_interrupt_keeps_what_was_learned(pipeline_folder: Path, tmp_path: Path) -> None:
    import signal

    command = [sys.executable, "-m", "draftune", "train", "--model", str(pipeline_folder)]
    command += [*SMALL, "--steps", "100000", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_a_reader_that_ends_early_is_no_error() -> None:
    """As in `draftune env | head -0`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "draftune", "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, "")
