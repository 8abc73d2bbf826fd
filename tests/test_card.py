"""`draftune card` and `draftune push`: the model card of a run, and its upload."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from PIL import Image

from draftune.cli.main import build_parser, main
from draftune.cli.train import train_settings
from draftune.prompts import load_prompts
from draftune.recommended import EMOJI
from draftune.report import card as module
from draftune.settings import Settings
from helpers.errors import mentions

TRAIN = "train --num-inference-steps 2 --steps 2 --batch-size 1 --num-validation-images 2 --num-log-prompts 2"
TRAIN += " --report-to none --lora-rank 2"
FILES = ["README.md", "before_after.png", "config.yaml", "prompts.txt", "pytorch_lora_weights.safetensors"]


REWARD = EMOJI["reward"]
"""Column of the default reward of the embedded model."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "names.txt").write_text("pizza\nsun\nrocket\n")
    prompts = ["--prompts", str(folder / "names.txt"), "--eval-prompts", str(folder / "names.txt")]
    assert main([*TRAIN.split(), *prompts, "--output", str(folder / "glossy")]) == 0
    return folder / "glossy"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "glossy"))


def card_of(run: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Return the metadata and the text of a run's card."""
    assert main(["card", str(run), *options]) == 0
    _, head, text = (run / "card" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_was_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, text = card_of(run, "--license", "cc-by-4.0")
    assert mentions(capsys.readouterr().out, "README.md")
    assert (data["library_name"], data["license"], "base_model" in data) == ("diffusers", "cc-by-4.0", False)
    assert {"lora", "draft"} <= set(data["tags"])
    first, last = (json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines())
    row = next(line for line in text.splitlines() if line.startswith(f"| `{REWARD}`"))
    _, scores, change, *_ = re.split(r"trained on|rose|fell|no measurable", row)
    numbers = [float(number) for number in re.findall(r"\d[\d.e-]*", scores)]
    expected = [value for r in (first, last) for value in (r[REWARD], 2 * r["stderr"][REWARD])]
    assert numbers == pytest.approx(expected, rel=0.05)
    assert numbers[::2] == pytest.approx(expected[::2], rel=5e-4)
    low, high = last["change"][REWARD]
    assert f"({low:+.3g} to {high:+.3g})" in change
    assert "trained on" in row
    assert mentions(text, "2 updates", "--batch-size 1", "emoji_name_accuracy")
    assert sorted(path.name for path in (run / "card").iterdir()) == FILES


def test_its_command_works_for_a_stranger(run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts are beside the card, and no path of this machine is in it."""
    _, text = card_of(run)
    (command,) = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    monkeypatch.chdir(run / "card")
    settings = train_settings(build_parser().parse_args(shlex.split(command)[1:]))
    assert settings == Settings.from_mapping(yaml.safe_load((run / "card" / "config.yaml").read_text()))
    assert load_prompts(settings.prompts) == load_prompts(settings.eval_prompts) == ["pizza", "sun", "rocket"]
    for path in (run / "card").glob("*.[my]*"):
        assert str(trained.parent) not in path.read_text(), path
    (run / "p.csv").write_text("text,n\na cat,1\n")
    for given, name, copied in (
        (f"{run}/p.csv:text", "prompts.csv:text", ["prompts.csv"]),
        ("animals", "animals", []),
        (f"{run}/gone.txt", "gone.txt", []),
    ):
        shown, copies = module.shared(Settings(prompts=given, eval_prompts="2"))
        assert (shown.prompts, list(copies), shown.eval_prompts) == (name, copied, "2")


def test_its_code_samples_an_image(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = card_of(run)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(run)  # where the folder has the name that the hub's repository would have
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["image"], Image.Image)
    assert names["pipe"].get_active_adapters()
    assert names["pipe"].scheduler.config.timestep_spacing == "trailing"


def test_over_optimization_is_said(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    rows = [{**row, "stderr": dict.fromkeys(row["stderr"], 0.0)} for row in rows]
    rows.append(rows[-1] | {"step": 3})
    for row, reward, accuracy in zip(rows, (4.0, 8.0, 9.0), (1.0, 0.2, 0.2), strict=True):
        row |= {REWARD: reward, "eval/emoji_name_accuracy": accuracy}
    (run / "evaluations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    _, text = card_of(run)
    expected = module.warning(module.read_settings(run / "config.yaml"), rows, REWARD)
    assert expected
    assert expected in text


def test_models_of_the_hub_are_linked(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"model": "CompVis/stable-diffusion-v1-4", "eval_rewards": ""}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = module.model_card(run, "me/glossy")
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["base_model"], "license" in data) == ("CompVis/stable-diffusion-v1-4", False)
    assert mentions(text, "'me/glossy'", "'CompVis/stable-diffusion-v1-4'", "would not have been noticed")


def test_without_a_run_or_evaluations(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(tmp_path / "none")]) == 2
    assert mentions(capsys.readouterr().err, tmp_path / "none")
    (run / "evaluations.jsonl").unlink()
    assert "no evaluations" in card_of(run)[1]
    assert main(["card", str(run)]) == 2  # it is there already
    assert mentions(capsys.readouterr().err, run / "card")


def test_a_dry_run_uploads_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert main(["push", str(run), "me/glossy", "--dry-run", "--license", "mit"]) == 0
    assert mentions(capsys.readouterr().out, "me/glossy/README.md", "pytorch_lora_weights.safetensors", "license: mit")
    assert not (run / "card").exists()


def test_a_token_is_needed_before_anything_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(module, "write_card", None)
    assert main(["push", str(run), "me/glossy"]) == 2
    assert mentions(capsys.readouterr().err, "hf auth login", "HF_TOKEN")
    assert main(["push", str(run), "glossy"]) == 2
    assert mentions(capsys.readouterr().err, "OWNER/NAME", "'glossy'")


@pytest.mark.parametrize("private", [False, True])
def test_an_upload(
    run: Path, private: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded: list[Any] = []

    class Api:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            uploaded.append((name, private, exist_ok))
            return f"https://example.org/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            uploaded.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["push", str(run), "me/glossy", *(["--private"] if private else [])]) == 0
    assert uploaded == [("me/glossy", private, True), ("me/glossy", FILES)]
    assert capsys.readouterr().out == "https://example.org/me/glossy\n"


def test_a_failed_upload_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")  # and the tests are offline
    assert main(["push", str(run), "me/glossy"]) == 2
    assert mentions(capsys.readouterr().err, "'me/glossy'")
