"""The page of `draftune ui`: who may use it, what its form accepts, and what it knows of its processes."""

from __future__ import annotations

import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import written_run

from draftune.cli.main import build_parser, main
from draftune.cli.train import train_settings
from draftune.presets import PRESETS, read_yaml
from draftune.settings import Settings
from draftune.ui.choices import reward_facts
from draftune.ui.form import LEFT_OUT, default_texts, form_fields, given, typed, worded
from draftune.ui.security import MAX_BODY
from draftune.ui.validation import named_in, to_download, validated
from helpers.errors import mentions
from helpers.ui import ADDRESS, Client, client, folder, inputs, problems, state

__all__ = ["client", "folder"]  # fixtures of another file


def test_foreign_requests_are_refused(client: Client, folder: Path) -> None:
    for host, status in {"evil.example": 403, "127.0.0.1.evil.example": 403, "localhost:99": 200, "": 403}.items():
        assert client.get("/", headers={"Host": host}).status_code == status, host
    for origin in ("", "null", "http://evil.example", "https://127.0.0.1:8644", "http://localhost:8644"):
        assert client.submit("/new", origin=origin, name="a", then="save").status_code == 403, origin
    for token in ("", "x", "é"):
        assert client.submit("/new", token=token, name="a", then="save").status_code == 403
    assert client.put("/new", headers={"Origin": ADDRESS}).status_code == 403
    big = client.submit("/new", name="a", file=("p.txt", b"cat\n" * (MAX_BODY // 4 + 1)))
    assert big.status_code == 413
    endless = client.post("/new", content=iter([b"token=x"]), headers={"Origin": ADDRESS})
    assert endless.status_code == 411
    assert [path.name for path in (folder / ".ui").iterdir()] == []
    assert client.submit("/new", name="a", then="save").status_code == 303
    headers = client.get("/").headers
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_no_name_leads_out_of_the_folder(client: Client, folder: Path, tmp_path: Path) -> None:
    outside = written_run(tmp_path / "secret")
    (folder / "link").symlink_to(outside)
    (folder / ".ui" / "other").symlink_to(outside)
    written_run(folder / "inside")
    assert client.state.folder.names() == ["inside"]
    encoded = ("%2e%2e", "..%2fsecret", "inside%00", "inside%2f..%2flink")
    for name in ("link", ".ui", "other", "-x", "nothing", *encoded):
        for page in ("", "data", "status", "images/x"):
            assert client.get(f"/runs/{name}/{page}").status_code in (404, 307), (name, page)
        assert client.submit(f"/runs/{name}/start").status_code == 404, name
    for name in ("../x", "/tmp/x", "", ".hidden", "a/b", "x" * 65, "link", "inside", "-x"):
        answer = client.submit("/new", name=name, then="save")
        assert answer.status_code == 422, name
        assert list(problems(answer.text)) == ["name"]
    assert client.get("/static/..%2fpage.py").status_code == client.get("/static/app.py").status_code == 404
    assert client.get("/runs/inside/data").json()["name"] == "inside"
    assert client.submit("/runs/inside/nothing").status_code == 404


def test_every_setting_has_a_field() -> None:
    shown = [f.name for group in form_fields({}, {}).values() for f in group]
    assert sorted([*shown, *LEFT_OUT]) == sorted(f.name for f in fields(Settings))
    unknown = ("--", "'draftune ", "''", "command")
    assert not any(word in f.help for word in unknown for group in form_fields({}, {}).values() for f in group)


def test_errors_stand_beside_their_fields_and_what_was_typed_stays(client: Client, folder: Path) -> None:
    typed = {"batch_size": "many", "learning_rate": "-1", "mixed_precision": "fp8", "negative_prompt": "<b>blurry</b>"}
    answer = client.submit("/new", name="first", then="start", source="pasted", pasted="a <i>cat</i>", **typed)
    assert answer.status_code == 422
    found = problems(answer.text)
    assert sorted(found) == ["batch_size", "learning_rate", "mixed_precision"]
    assert "'many'" in found["batch_size"]
    assert 'value="many"' in answer.text
    assert "&lt;b&gt;blurry&lt;/b&gt;" in answer.text
    assert "a &lt;i&gt;cat&lt;/i&gt;</textarea>" in answer.text
    later = {
        "reward": "pikscore",
        "eval_rewards": "clip(k=",
        "method": "draft_q",
        "model": "nowhere",
        "prompts": "x.txt",
    }
    found = problems(client.submit("/new", name="first", **later).text)
    assert sorted(found) == sorted(later)
    assert "pickscore" in found["reward"]
    found = problems(client.submit("/new", name="first", early_stopping_patience="3").text)
    assert list(found) == ["early_stopping_patience"]
    assert not (folder / ".ui" / "first").exists()


def test_errors_are_found_by_the_name_or_flag_in_them() -> None:
    assert named_in("batch_size must be at least 1, not 0") == "batch_size"
    assert named_in("offload does not work with --quantization, --compile or FSDP") == "offload"
    assert named_in("give --eval-prompts 3") == "eval_prompts"
    assert named_in("the disk is full") == ""


def test_a_draft_has_the_settings_of_the_command_line(client: Client, folder: Path) -> None:
    typed = {"steps": "4", "reward": "-1*brightness", "eval_rewards": "none", "compile": "off", "learning_rate": "1e-4"}
    answer = client.submit("/new", name="first", then="save", prompts="animals", **typed)
    assert answer.headers["Location"] == "/runs/first/"
    flags = ["--steps", "4", "--reward=-1*brightness", "--eval-rewards", "", "--no-compile", "--learning-rate", "1e-4"]
    flags += ["--prompts", "animals", "--output", "runs/first"]
    expected = train_settings(build_parser().parse_args(["train", *flags]))
    written = Settings(**yaml.safe_load((folder / ".ui" / "first" / "settings.yaml").read_text()))
    assert written == replace(expected, output=str(folder / "first"))
    assert state(client, "first") == "draft"
    # The form shows them again, and changes the same draft.
    page = client.get("/new?edit=first").text
    assert 'value="-1*brightness"' in page
    assert 'value="first"' in page
    assert 'name="eval_rewards" value="none"' in page
    assert client.submit("/runs/first/delete").headers["Location"] == "/"
    assert client.state.folder.names() == []


@pytest.mark.parametrize("preset", PRESETS)
def test_the_form_keeps_the_settings_of_a_preset(client: Client, folder: Path, preset: str) -> None:
    """From a preset to the form, a draft, the form again and a draft again."""
    page, values = client.get(f"/new?preset={preset}&name=first").text, read_yaml(PRESETS[preset])
    expected = Settings(**values)
    shown = inputs(page)
    assert shown["preset"] == preset
    for name, text in shown.items():
        if name in values and name != "prompts":
            assert text in ("", str(values[name])), name
    assert shown["model"] == values["model"]
    settings = folder / ".ui" / "first" / "settings.yaml"
    for _ in range(2):
        assert shown["name"] == "first"
        again = Settings.from_mapping(given(shown) | ({"prompts": shown["prompts"]} if shown["prompts"] else {}))
        assert again == expected
        settings.parent.mkdir(exist_ok=True)
        settings.write_text(again.to_yaml())
        shown = inputs(client.get("/new?edit=first").text)


def test_an_empty_field_means_the_default_that_it_shows() -> None:
    """Defaults depend on the model, the method and the number of sampling steps."""
    for values in (
        {"method": "draft_k(k=2)", "prefix_reuse_steps": 4},
        {"method": "draft_k(k=2)"},
        {"model": "black-forest-labs/FLUX.1-dev", "num_inference_steps": 4, "method": "refl(m=4)"},
        {"model": "black-forest-labs/FLUX.1-dev", "num_inference_steps": 4, "method": "refl(m=20)"},
        {"model": "CompVis/stable-diffusion-v1-4", "eval_rewards": "", "set_alpha_to_one": False, "lora_alpha": 8.0},
    ):
        settings = Settings(**values)  # type: ignore[arg-type]
        assert Settings(**given(typed(asdict(settings)))) == settings, values
    assert default_texts({"model": "CompVis/stable-diffusion-v1-4", "steps": "many"})["steps"] == "2000"
    assert default_texts({"model": "CompVis/stable-diffusion-v1-4"})["model"] == "emoji"
    # Where the run decides, the default stands in words, and not as "none".
    shown = default_texts({"model": "CompVis/stable-diffusion-v1-4"})
    assert "tensorboard" in shown["report_to"]
    assert "blocks" in shown["gradient_checkpointing"]
    assert default_texts({})["gradient_checkpointing"] == "none"
    assert not any("default:" in f.help for group in form_fields({}, {}).values() for f in group)


def test_all_errors_are_reported_at_once_by_the_labels(client: Client) -> None:
    wrong = {"batch_size": "0", "learning_rate": "-1", "reward": "pikscore", "model": "nowhere", "report_to": "x"}
    page = client.submit("/new", name="a/b", source="file", **wrong).text
    assert sorted(problems(page)) == sorted([*wrong, "name", "prompts"])
    assert problems(page)["batch_size"].startswith("“Images of a batch” must")
    assert worded("give --eval-prompts 3, not model=x or /a/batch_size") == (
        "give “Evaluation prompts” 3, not model=x or /a/batch_size"
    )


def test_an_uploaded_file_is_kept_for_the_next_try(client: Client, folder: Path) -> None:
    shown = inputs(
        client.submit("/new", name="a", source="file", file=("mine.csv", b"prompt\na cat\n"), steps="0").text
    )
    answer = client.submit("/new", **(shown | {"source": "file", "steps": "3", "then": "save"}))
    assert answer.status_code == 303
    assert (folder / ".ui" / "a" / "prompts.csv").read_bytes() == b"prompt\na cat\n"
    # So is the file of a draft that is edited.
    shown = inputs(client.get("/new?edit=a").text)
    assert client.submit("/new", **(shown | {"source": "file", "then": "save"})).status_code == 303
    assert (folder / ".ui" / "a" / "prompts.csv").read_bytes() == b"prompt\na cat\n"
    found = problems(client.submit("/new", name="bad", source="file", file=("my list.json", b"{")).text)
    assert "my list.json" in found["prompts"]


def test_a_form_of_an_earlier_server_comes_back_with_what_was_typed(client: Client, folder: Path) -> None:
    answer = client.submit("/new", token="old", name="first", steps="7", preset="sdxl-12gb", then="start")
    assert answer.status_code == 403
    shown = inputs(answer.text)
    assert [shown[name] for name in ("name", "steps", "preset", "token")] == [
        "first", "7", "sdxl-12gb", client.state.token
    ]  # fmt: skip
    assert not (folder / ".ui" / "first").exists()


def test_spaces_in_a_name_become_hyphens(client: Client, folder: Path) -> None:
    assert client.submit("/new", name=" my  first run ", then="save").headers["Location"] == "/runs/my-first-run/"
    assert inputs(client.submit("/new", name="a b", steps="0").text)["name"] == "a-b"


def test_prompts_are_pasted_uploaded_or_named(client: Client, folder: Path) -> None:
    def prompts(name: str) -> Path:
        return Path(yaml.safe_load((folder / ".ui" / name / "settings.yaml").read_text())["prompts"])

    client.submit("/new", name="pasted", then="save", source="pasted", pasted="a cat\r\n\r\na dög\r\n")
    assert prompts("pasted").read_text(encoding="utf-8") == "a cat\n\na dög\n"
    assert prompts("pasted").parent == folder / ".ui" / "pasted"
    assert "a cat\n\na dög\n</textarea>" in client.get("/new?from=pasted").text
    table = ("../../up.CSV", b"prompt,weight\na cat,2\n")
    client.submit("/new", name="uploaded", then="save", source="file", file=table)
    assert prompts("uploaded") == folder / ".ui" / "uploaded" / "prompts.csv"
    for name, content in {"p.exe": b"x", "p.txt": b"\x00\x01", "p.json": b"{"}.items():
        found = problems(client.submit("/new", name="bad", source="file", file=(name, content)).text)
        assert list(found) == ["prompts"]
        assert str(folder) not in found["prompts"]
    for source in ("file", "pasted"):
        assert list(problems(client.submit("/new", name="bad", source=source).text)) == ["prompts"]
    assert sorted(path.name for path in (folder / ".ui").iterdir()) == ["pasted", "uploaded"]


def test_the_page_runs_no_file_of_the_user(client: Client, tmp_path: Path) -> None:
    program = tmp_path / "mine.py"
    program.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef red(images, prompts): return images.mean((1, 2, 3))\n"
    )
    own = {"reward": f"0.5*'{program}:red' + brightness", "method": f'"{program}:red"', "optimizer": f'"{program}:red"'}
    assert client.get("/reward", params={"expression": own["reward"]}).json()["rewards"][0]["missing"] is False
    assert client.submit("/new", name="own", then="save", **own).status_code == 303
    assert client.get("/runs/own/").status_code == 200
    assert not (tmp_path / "ran").exists()
    found = problems(client.submit("/new", name="other", reward=f'"{tmp_path}/no.py:red"').text)
    assert list(found) == ["reward"]


def test_missing_weights_are_found_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def asked(*args: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(HfApi, "repo_info", asked)
    found = reward_facts("pickscore + 0.1*relative(clip, good=sharp, bad=dull) - brightness")
    assert {one["name"]: one["missing"] for one in found["rewards"]} == {
        "pickscore": True, "relative": False, "clip": True, "brightness": False
    }  # fmt: skip
    assert "3.9 GB" in found["rewards"][0]["text"]
    assert reward_facts("pikscore")["error"]
    # A reward that needs several downloads is no error, and what is known of one with an error is still said.
    assert reward_facts("hpsv2")["rewards"][0]["missing"] is True
    assert reward_facts("hpsv2")["error"] == ""
    assert "LAION" in reward_facts("aesthetic")["rewards"][0]["text"]
    # A file that nothing downloads is an error, which says how the form takes it; what the start downloads is none.
    head = 'aesthetic(head="/path/to/sac+logos+ava1-l14-linearMSE.pth")'
    for error in (
        reward_facts("aesthetic")["error"],
        validated({"model": "CompVis/stable-diffusion-v1-4"})[1]["reward"],
    ):
        assert mentions(error, "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw", head)
        assert "clip-vit" not in error
    settings, errors = validated({"reward": "pickscore", "model": "CompVis/stable-diffusion-v1-4"})
    assert errors == {}
    assert settings is not None
    downloads = to_download(settings)
    assert [("v1-4" in text, "pickscore" in text) for text in downloads] == [(True, False), (False, True)]


def test_the_command_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for words, named in {("--port", "70000"): "70000", ("--folder", str(tmp_path / "file")): "--folder"}.items():
        assert main(["ui", *words]) == 2
        assert named in capsys.readouterr().err
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert main(["ui", "--folder", str(tmp_path / "closed")]) == 2
