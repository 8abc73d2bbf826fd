"""Taking a LoRA from the page of `draftune ui`: comparing its scales, and downloading it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_report import written_run

from draftune.runs.formats import fitting_formats, formats_at
from draftune.utils.scales import parse_scales
from helpers.ui import Client, client, folder, inputs, problems, stand_in, state

__all__ = ["client", "folder"]  # fixtures of another file

EVALUATION = {"reward_queries": 0, "train_seconds": 0.0, "clip": 0.5, "stderr": {}}
SCALES = "0, 0.25, 0.5, 0.75, 1, 1.25, 1.5"


def evaluated(run: Path, *rows: dict[str, Any]) -> None:
    """Write the log of evaluations, and a best LoRA."""
    (run / "evaluations.jsonl").write_text("".join(json.dumps(EVALUATION | row) + "\n" for row in rows))
    (run / "best").mkdir(exist_ok=True)
    save_file({"unet.mid_block.x.lora_A.weight": torch.zeros(1)}, run / "best" / "pytorch_lora_weights.safetensors")


def test_a_finished_run_can_be_taken(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written_run(folder / "old")
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert state(client, "old") == "elsewhere"
    assert client.submit("/runs/old/export", format="exe").status_code == 400
    assert client.submit("/runs/old/export", format="comfyui", scale="x").status_code == 400
    assert client.submit("/runs/old/export", format="comfyui", which="best").status_code == 400
    page = client.submit("/runs/old/card", license="My License").text
    assert "My License" in problems(page)["license"]
    assert 'value="My License"' in page
    seen: list[Any] = []

    def write_card(source: Path, target: Path, **options: Any) -> Path:
        seen.append((source, options))
        target.mkdir()
        (target / "README.md").write_text("card")
        return target

    monkeypatch.setattr("draftune.ui.actions.write_card", write_card)
    answer = client.submit("/runs/old/card", license="apache-2.0")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="old-with-card.zip"'
    assert zipfile.ZipFile(io.BytesIO(answer.content)).read("old/README.md") == b"card"
    assert seen == [(run, {"best": False, "license": "apache-2.0"})]
    stand_in(monkeypatch)
    client.submit("/runs/old/sweep", scales="-1,1", images="1")
    assert client.state.jobs.get("old", "sweep").arguments == ["sweep", str(run), "--scales=-1,1", "--num-images=1"]


def test_the_best_lora_is_one_that_was_trained(client: Client, folder: Path) -> None:
    run = written_run(folder / "old")
    evaluated(run, {"step": 0, "best": True})
    assert "of the best evaluation" not in client.get("/runs/old/").text
    assert client.submit("/runs/old/export", format="comfyui", which="best").status_code == 400
    evaluated(run, {"step": 0, "best": True}, {"step": 8, "best": True}, {"step": 16, "best": False})
    assert "of the best evaluation, update 8<" in client.get("/runs/old/").text


def test_errors_of_comparing_and_downloading_stand_on_the_run_page(client: Client, folder: Path) -> None:
    run = written_run(folder / "old")
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    for text, hint in {"0, 0,5, 1": "0.5", "0,25": "0.25", "0;0,5;1": "0.5", "a": "a", "": "", "0,inf": "inf"}.items():
        answer = client.submit("/runs/old/sweep", scales=text, images="3")
        assert answer.status_code == 400
        assert hint in problems(answer.text)["scales"], text
        assert [inputs(answer.text)[name] for name in ("scales", "images")] == [text or SCALES, "3"]
        assert client.state.jobs.get("old", "sweep") is None
    for images in ("0", "x", "-1"):
        assert list(problems(client.submit("/runs/old/sweep", scales="1", images=images).text)) == ["images"]
    for text, hint in {"0,75": "0.75", "1,2": "1.2", "x": "x", "nan": "nan", "1, 2": "1, 2"}.items():
        answer = client.submit("/runs/old/export", format="comfyui", scale=text)
        assert hint in problems(answer.text)["scale"], text
        assert inputs(answer.text)["scale"] == text
        assert inputs(answer.text)["format"] == "comfyui"
    assert parse_scales("0,0.25,0.5") == [0, 0.25, 0.5]
    assert parse_scales("0, 5, 10") == [0, 5, 10]
    assert parse_scales("-1,1") == [-1, 1]


def test_downloads_are_named_by_what_they_are(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written_run(folder / "old")
    (run / "lora").mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, run / "lora" / "pytorch_lora_weights.safetensors")
    evaluated(run, {"step": 8, "best": True})

    def export_lora(source: Path, target: Path, *options: Any) -> Path:
        target.write_bytes(b"weights")
        return target

    monkeypatch.setattr("draftune.ui.actions.export_lora", export_lora)
    for values, name in (
        ({"format": "comfyui"}, "old-comfyui.safetensors"),
        ({"format": "kohya", "which": "best", "scale": "0.75"}, "old-best-scale0.75-kohya.safetensors"),
    ):
        answer = client.submit("/runs/old/export", **values)
        assert answer.headers["Content-Disposition"] == f'attachment; filename="{name}"'


def test_formats_that_do_not_fit_are_not_offered(tmp_path: Path) -> None:
    model, lora = tmp_path / "model", tmp_path / "lora.safetensors"
    model.mkdir()
    for name, kind, fit in (
        ("unet.down.attentions.0.transformer_blocks.0.attn1.to_q", "UNet2DConditionModel", "diffusers comfyui kohya"),
        ("unet.down.attentions.0.to_q", "UNet2DModel", "diffusers"),
        ("transformer.blocks.0.attn.to_q", "FluxTransformer2DModel", "diffusers comfyui"),
        ("transformer.blocks.0.attn.to_q", "DiTTransformer2DModel", "diffusers"),
    ):
        save_file({f"{name}.lora_A.weight": torch.zeros(1)}, lora)
        (model / "model_index.json").write_text(json.dumps({name.partition(".")[0]: ["diffusers", kind]}))
        formats_at.cache_clear()
        assert fitting_formats(lora, str(model)) == tuple(fit.split()), kind
    formats_at.cache_clear()
    assert fitting_formats(lora, "a/hub-id-that-is-not-here") == ("diffusers", "comfyui")
