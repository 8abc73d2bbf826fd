"""A run goes on where the same is computed, however it is spelled, and is refused where something else is."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_resume import PROMPTS, lora, rows, train

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.methods import DraftK
from draftune.runs.fingerprint import files_of, find_source, fingerprint
from draftune.runs.resuming import COMPUTED, FIXED, RESUMABLE_CHANGES, ROUNDING, RunIdentity, changeable
from draftune.runs.run_dir import RunFolder
from draftune.settings import Settings
from draftune.training.trainer import Trainer
from helpers.errors import mentions, raises
from helpers.pipelines import build_pipeline

WEIGHTS = "pytorch_lora_weights.safetensors"


def asked(**values: Any) -> RunIdentity:
    """What a run with these settings is asked to compute, by the files as they are now."""
    return RunIdentity(asdict(Settings(**({"reward": "brightness"} | values))), {})


def saved(run: RunIdentity) -> RunIdentity:
    """The same after it went through a checkpoint."""
    settings, sources = json.loads(json.dumps([run.settings, run.saved_sources(None)]))
    return RunIdentity(settings, {}, sources)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, clip_folder: Path) -> Path:
    """A working directory with a model, a reward's network, a user's reward and method, and a picture."""
    folder = tmp_path / "here"
    shutil.copytree(pipeline_folder, folder / "sd")
    shutil.copytree(clip_folder, folder / "w" / "clip")
    code = "def red(images, prompts, k=1):\n    return k * images[:, 0].mean((1, 2))\n"
    (folder / "mine.py").write_text(code + "from draftune.methods import DraftK as Mine\n")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    monkeypatch.chdir(folder)
    return folder


def test_every_setting_is_of_a_known_kind() -> None:
    classified = [*RESUMABLE_CHANGES, *ROUNDING, *COMPUTED, *FIXED]
    assert sorted(classified) == sorted(f.name for f in fields(Settings))
    for names, some in ((RESUMABLE_CHANGES, "output"), (ROUNDING, "device"), (COMPUTED, "method"), (FIXED, "seed")):
        assert some in names


def moved(folder: Path) -> Path:
    """The whole working directory at another place, and nothing left at the old one."""
    target = folder.with_name("there")
    shutil.copytree(folder, target)  # with other times
    shutil.rmtree(folder)
    os.chdir(target)
    return target


EXPRESSIONS = {
    "reward": [
        "mine.py:red",
        "clip(model='w/clip')",
        "0.5*'mine.py:red'(k=2) + sharpness_aware(clip(model='w/clip'), rho=0.01)",
        "image_similarity(image='red.png') - 'mine.py:red'",
    ],
    "eval_rewards": ["clip(model='w/clip')"],
    "method": ["'mine.py:Mine'(k=2)", "kl('mine.py:Mine', beta=0.2)"],
    "model": ["sd"],
    "tiny_decoder": ["sd"],
}
CASES = [(name, value) for name, values in EXPRESSIONS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_path_may_be_spelled_otherwise(here: Path, name: str, value: str) -> None:
    """Relative, with a dot, absolute, by a link, by a copy, and after all was moved."""
    before = saved(asked(**{name: value}))
    shutil.copytree(here, here.with_name("copy"))
    here.with_name("link").symlink_to(here)
    for prefix in ("", "./", f"{here}/", "../link/", "../here/", "../copy/"):
        spelled = re.sub(r"mine\.py|w/clip|red\.png|^sd$", lambda found: prefix + found[0], value)  # noqa: B023
        assert asked(**{name: spelled}).differences(before) == [], spelled
    moved(here)
    assert asked(**{name: value}).differences(before) == []


def rewrite(path: Path) -> None:
    """Change a file without changing its size or time."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "value", "file"),
    [
        ("model", "sd", "sd/unet/diffusion_pytorch_model.safetensors"),
        ("model", "sd", "sd/scheduler/scheduler_config.json"),
        ("model", "sd", "sd/tokenizer/tokenizer.json"),
        ("reward", "mine.py:red", "mine.py"),
        ("reward", "brightness + 0.1*clip(model='w/clip')", "w/clip/model.safetensors"),
        ("eval_rewards", "image_similarity(image='red.png')", "red.png"),
        ("method", "kl('mine.py:Mine', beta=0.2)", "mine.py"),
    ],
)
def test_other_contents_are_another_run(here: Path, name: str, value: str, file: str) -> None:
    before = saved(asked(**{name: value}))
    os.utime(here / file)  # the same contents at another time
    assert asked(**{name: value}).differences(before) == []
    rewrite(here / file)
    os.utime(here / file)
    now = asked(**{name: value})
    assert now.differences(before) == [name]
    assert mentions(now.describe_difference(name, before), name, value)
    rewrite(here / file)  # back again
    assert asked(**{name: value}).differences(before) == []
    rewrite(here / file)
    moved(here)
    assert asked(**{name: value}).differences(before) == [name]


def test_what_a_pipeline_is_not_loaded_from_does_not_matter(here: Path) -> None:
    before = saved(asked(model="sd"))
    for name in ("README.md", "unet/diffusion_pytorch_model.bin", "v1.safetensors", ".git/x", "safety_checker/a.json"):
        (here / "sd" / name).parent.mkdir(exist_ok=True)
        (here / "sd" / name).write_text("other")
    assert asked(model="sd").differences(before) == []


def test_what_is_not_read_does_not_matter(here: Path) -> None:
    """Files that came into a folder later, a variant beside the file that is loaded, a text that is a folder's name."""
    (here / "dog").mkdir()
    values = {
        "model": "sd",
        "reward": "clip(model='w/clip')",
        "eval_rewards": "object_removal(query=dog, model='w/clip')",
    }
    before = saved(asked(**values))
    shutil.copy(here / "w/clip/model.safetensors", here / "w/clip/other.safetensors")
    unet = here / "sd/unet/diffusion_pytorch_model.safetensors"
    unet.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    (here / "dog" / "new.txt").write_text("new")
    assert asked(**values).differences(before) == []
    assert "dog" not in asked(**values).sources
    # Where a half-precision variant alone is there, it is what is loaded.
    unet.unlink()
    assert asked(**values).differences(before) == ["model"]


def test_a_name_of_another_folder_is_another_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved(asked(model="sd"))
    other = here.with_name("elsewhere")
    build_pipeline(other / "parts", beta_end=0.013).save_pretrained(other / "sd")
    monkeypatch.chdir(other)
    assert asked(model="sd").differences(before) == ["model"]


def test_the_hubs_cache_is_the_model_of_its_id(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id and a folder with the same files are one model; large files there have their sum as their name."""
    from huggingface_hub import constants

    cache = tmp_path / "hub" / "models--some--model"
    snapshot = cache / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (cache / "refs").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs" / "main").write_text(snapshot.name)
    for name, file in files_of(here / "sd"):
        blob = cache / "blobs" / fingerprint(file)[""]
        shutil.copy(file, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = find_source("some/model")
    assert found is not None
    assert found.sha256 == fingerprint(here / "sd")
    assert asked(model="some/model").differences(saved(asked(model="sd"))) == []
    assert asked(model="sd").differences(saved(asked(model="some/model"))) == []
    assert asked(model="sd").differences(saved(asked(model="other/model"))) == ["model"]


SAME: list[dict[str, tuple[Any, Any]]] = [
    {"method": ("draft_k", " draft_k( k=1 )")},
    {"method": ("kl(draft_lv)", "kl('draft_lv'(n=2), beta=0.1)")},
    {"reward": ("2*brightness", "brightness * 2.0")},
    {"reward": ("jpeg_compressibility", "jpeg_compressibility(quality=10)")},
    {"optimizer": ("sgd", "sgd(momentum=0)")},
    {"gradient_filter": ("channel_mean", "channel_mean(weight=2)")},
    {"lora_alpha": (None, 8.0)},
    {"lora_target_modules": ("to_q,to_k", "to_k, to_q")},
    {"eval_rewards": ("", None), "model": ("other/model", "other/model")},
]
OTHER: list[dict[str, tuple[Any, Any]]] = [
    {"method": ("draft_k", "draft_k(k=2)"), "prefix_reuse_steps": (1, 1)},
    {"method": ("kl(draft_lv)", "kl(draft_lv, beta=0.2)")},
    {"method": ("kl(draft_lv)", "draft_lv")},
    {"reward": ("brightness", "2*brightness")},
    {"reward": ("brightness - saturation", "brightness + saturation")},
    {"reward": ("brightness", "saturation")},
    {"reward": ("mine.py:red", "'mine.py:red'(k=2)")},
    {"reward": ("clip(model='w/clip')", "clip(model=sd)")},
    {"optimizer": ("adamw", "adamw(weight_decay=0.1)"), "weight_decay": (0.2, 0.2)},
    {"lora_alpha": (None, 4.0)},
    {"mixed_precision": ("no", "bf16")},
    {"batch_size": (4, 2)},
]


@pytest.mark.parametrize(("values", "same"), [*((v, True) for v in SAME), *((v, False) for v in OTHER)])
def test_what_is_computed_counts(here: Path, values: dict[str, tuple[Any, Any]], same: bool) -> None:
    (before, now) = ({name: pair[i] for name, pair in values.items()} for i in range(2))
    for first, second in ((before, now), (now, before)):
        found = asked(**second).differences(saved(asked(**first)))
        assert found == ([] if same else [next(iter(values))])


def test_a_checkpoint_that_knows_no_sources_is_compared_by_names(here: Path) -> None:
    before = asked(model="sd")
    old = RunIdentity(before.settings, {}, ())
    assert asked(model="sd").differences(old) == []
    assert asked(model="./sd").differences(old) == ["model"]


def test_a_setting_that_is_new_had_its_default(here: Path) -> None:
    run = asked()
    run.settings.pop("max_grad_norm")
    assert asked().differences(saved(run)) == []
    assert asked(max_grad_norm=0.5).differences(saved(run)) == ["max_grad_norm"]
    run.settings["unknown_setting"] = 3
    assert asked().differences(saved(run)) == ["unknown_setting"]


def test_changes_can_be_read() -> None:
    assert changeable("learning-rate, reward,") == {"learning_rate", "reward"}
    assert changeable("") == set()
    with raises(DraftuneError, "'lerning_rate' 'learning_rate'"):
        changeable("lerning_rate")
    for name in FIXED:
        with raises(DraftuneError, "allow_changes", name):
            changeable(f"reward,{name}")


SHORT: dict[str, Any] = {
    "checkpointing_steps": 1,
    "validation_steps": 0,
    "num_inference_steps": 2,
    "method": "draft_k(k=1)",
}


def learned(run: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in lora(run).values()])


def test_a_run_goes_on_with_another_spelling_bit_for_bit(here: Path) -> None:
    """The same model, reward, prompts and method at another place, after the old one was taken away."""
    (here / "p.txt").write_text("\n".join(PROMPTS))
    values = SHORT | {"eval_prompts": "p.txt", "prompts": "p.txt"}
    expression: Any = "'mine.py:red' + 0.1*image_similarity(image='red.png')"

    def start(reward: str, output: Path, **more: Any) -> Path:
        settings = values | {"batch_size": 2, "log_images_steps": 0, "num_log_prompts": 1, "learning_rate": 0.01} | more
        settings |= {
            "guidance_scale": 3.0,
            "num_validation_images": 1,
            "output": str(output),
            "reward": reward,
            "device": "cpu",
        }
        text = yaml.safe_dump({"model": "sd"} | settings)
        (Path.cwd() / "settings.yaml").write_text(text)
        assert main(["train", "--config", "settings.yaml"]) == 0
        return output

    whole = start(expression, here.with_name("whole"), steps=3)
    cut = start(expression, here.with_name("cut"), steps=2)
    there = moved(here)
    (there / "q").mkdir()
    (there / "p.txt").rename(there / "q" / "p.txt")
    expression = f"'{there}/mine.py:red'(k=1) + 0.1*image_similarity(image='./red.png')"
    more = {"model": "./sd", "method": "draft_k", "prompts": "q/p.txt", "eval_prompts": str(there / "q" / "p.txt")}
    start(expression, cut, steps=3, **more)
    assert torch.equal(learned(whole), learned(cut))
    assert rows(whole, "metrics.jsonl") == rows(cut, "metrics.jsonl")
    assert rows(whole, "evaluations.jsonl")[-1] == rows(cut, "evaluations.jsonl")[-1]
    assert not (cut / "changes.json").exists()


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"reward_batch_size": 2}, {"reward_batch_size": 1}),
        ({"gradient_checkpointing": "none"}, {"gradient_checkpointing": "blocks"}),
        ({"device": "auto"}, {"device": "cpu"}),
    ],
)
def test_what_concerns_memory_and_device_alone_may_change(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, first: Any, then: Any
) -> None:
    whole = train(pipeline_folder, tmp_path / "whole", **SHORT | {"steps": 2} | first)
    train(pipeline_folder, tmp_path / "cut", **SHORT | {"steps": 1} | first)
    caplog.clear()
    train(pipeline_folder, tmp_path / "cut", **SHORT | {"steps": 2} | then)
    (name,) = then
    said = [line for line in caplog.text.splitlines() if mentions(line, name)]
    assert len(said) == 1
    assert mentions(said[0], then[name], first[name])
    assert torch.allclose(learned(whole.folder), learned(tmp_path / "cut"), atol=1e-6)
    (change,) = json.loads((tmp_path / "cut" / "changes.json").read_text())
    assert change == {"step": 1, "setting": name, "was": first[name], "now": then[name]}


def test_what_is_only_measured_or_saved_may_change(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = SHORT | {"gradient_accumulation_steps": 2, "validation_steps": 1}
    whole = train(pipeline_folder, tmp_path / "whole", **values | {"steps": 3})
    train(pipeline_folder, tmp_path / "cut", **values | {"steps": 1})
    caplog.clear()
    free: dict[str, Any] = {
        "log_gradient_snr": True,
        "num_log_prompts": 2,
        "log_images_steps": 1,
        "validation_steps": 0,
    }
    free |= {
        "early_stopping_patience": 0,
        "nonfinite_action": "skip",
        "checkpointing_steps": 0,
        "allow_changes": "learning_rate",
    }
    free |= {"report_to": "none"}
    assert set(free) | {"steps", "output", "resume"} == set(RESUMABLE_CHANGES)
    train(pipeline_folder, tmp_path / "cut", **values | {"steps": 3} | free)
    assert not any(mentions(line, "run", name) for line in caplog.text.splitlines() for name in free)
    assert torch.equal(learned(whole.folder), learned(tmp_path / "cut"))


def test_what_differs_is_named_with_the_ways_on(pipeline_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(pipeline_folder, output, **SHORT | {"steps": 1})
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        (
            {"learning_rate": 0.02, "batch_size": 4},
            ("learning_rate 0.01 0.02", "batch_size 2 4", "--allow-changes batch_size,learning"),
        ),
        ({"prompts": ["a bear"]}, ("--allow-changes prompts",)),
        ({"mixed_precision": "bf16"}, ("mixed_precision 'no' 'bf16'", "--allow-changes mixed_precision")),
        ({"reward": lambda images, prompts: images.mean((1, 2, 3))}, ()),
    ]
    for values, said in cases[:3]:
        with raises(DraftuneError, *said, "--output --init-lora", output):
            train(pipeline_folder, output, **SHORT | {"steps": 2} | values)
    for values in (
        {"lora_rank": 4},
        {"seed": 1},
        {"num_validation_images": 2},
        {"metric_for_best_model": "pixel_l1_from_base"},
    ):
        with raises(DraftuneError, next(iter(values))) as error:
            train(pipeline_folder, output, **SHORT | {"steps": 2} | values)
        assert not mentions(str(error.value), "--allow-changes")
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


CHANGES: dict[str, dict[str, Any]] = {
    "learning rate": {"learning_rate": 0.02},
    "fewer prompts": {"prompts": ["a bear"]},
    "batches": {"batch_size": 1, "gradient_accumulation_steps": 3, "prefix_reuse_steps": 1},
    "method": {"method": "ddpo(min_count=2)", "prefix_reuse_steps": 1},
    "groups": {"method": "diffusion_nft", "num_images_per_prompt": 2, "batch_size": 4, "prefix_reuse_steps": 1},
    "optimiser": {"optimizer": "sgd(momentum=0.5)"},
    "precision": {"mixed_precision": "bf16"},
    "sampler": {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 24},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_who_insists_goes_on_with_the_change(pipeline_folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    output, values = tmp_path / "run", SHORT | {"prefix_reuse_steps": 2}
    train(pipeline_folder, output, **values | {"steps": 1})
    first = learned(output)
    names = ",".join(change)
    train(pipeline_folder, output, **values | {"steps": 3, "allow_changes": names} | change)
    assert [row["step"] for row in rows(output, "metrics.jsonl")] == [1, 2, 3]
    assert not torch.equal(first, learned(output))
    changes = json.loads((output / "changes.json").read_text())
    assert {(row["step"], row["setting"]) for row in changes} == {(1, name) for name in change}
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["allow_changes"] == ""
    # From here on it is a run with the new settings, and one with the old ones is another.
    train(pipeline_folder, output, **values | {"steps": 4} | change)
    assert json.loads((output / "changes.json").read_text()) == changes
    with raises(DraftuneError, output, *change):
        train(pipeline_folder, output, **values | {"steps": 5})


def test_a_change_is_made_from_the_next_update_on(pipeline_folder: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 nothing more is learned, though the rest of the run's state was taken up."""
    train(pipeline_folder, tmp_path / "run", **SHORT | {"steps": 2, "weight_decay": 0.0})
    first = learned(tmp_path / "run")
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "allow_changes": "learning_rate"}
    train(pipeline_folder, tmp_path / "run", **SHORT | {"steps": 3} | still)
    assert torch.equal(first, learned(tmp_path / "run"))


def test_a_model_of_another_shape_can_not_be_insisted_on(pipeline_folder: Path, tmp_path: Path) -> None:
    train(pipeline_folder, tmp_path / "run", **SHORT | {"steps": 1})
    other = build_pipeline(tmp_path / "parts")
    from diffusers import UNet2DConditionModel

    config = dict(other.unet.config) | {"cross_attention_dim": other.unet.config.cross_attention_dim}
    config["block_out_channels"] = [2 * width for width in config["block_out_channels"]]
    other.unet = UNet2DConditionModel.from_config(config)
    other.save_pretrained(tmp_path / "other")
    with raises(DraftuneError, "model", tmp_path / "other"):
        train(tmp_path / "other", tmp_path / "run", **SHORT | {"steps": 2})
    with raises(DraftuneError, "fit"):
        train(tmp_path / "other", tmp_path / "run", **SHORT | {"steps": 2, "allow_changes": "model"})


def test_going_on_from_a_lora_that_lies_elsewhere(here: Path) -> None:
    """Its weights count, and the model that it names may be named otherwise too."""
    train(Path("sd"), here / "first", **SHORT | {"steps": 1})
    values = SHORT | {"init_lora": "first", "eval_prompts": ""}
    whole = train(Path("sd"), here / "whole", **values | {"steps": 2})
    train(here / "sd", here / "cut", **values | {"steps": 1})
    (here / "loras").mkdir()
    shutil.copy(here / "first" / "lora" / WEIGHTS, here / "loras")
    train(Path("./sd"), here / "cut", **values | {"steps": 2, "init_lora": "loras"})
    assert torch.equal(learned(whole.folder), learned(here / "cut"))
    path = here / "loras" / WEIGHTS
    tensors = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    with raises(DraftuneError, "init_lora"):
        train(Path("sd"), here / "cut", **values | {"steps": 3, "init_lora": "loras"})


def test_a_changed_reward_begins_its_statistics_and_its_best_anew(pipeline_folder: Path, tmp_path: Path) -> None:
    """Rewards of another scale are not held against those before, neither by the method nor by the best LoRA."""
    output = str(tmp_path / "run")
    values = SHORT | {
        "method": "ddpo(min_count=2)",
        "batch_size": 2,
        "eval_prompts": "animals",
        "num_validation_images": 1,
    }
    values |= {"model": str(pipeline_folder), "prompts": "animals", "guidance_scale": 2.0, "num_inference_steps": 3}
    Trainer(**values, reward="brightness", steps=1, output=output).train()
    trainer = Trainer(**values, reward="1000*brightness", allow_changes="reward", steps=2, output=output)
    trainer.train()
    seen = [reward for rewards in trainer.method.rewards.values() for reward in rewards]
    assert min(seen) > 100
    assert {"1000*brightness"} <= set(trainer.validation.guard.rows[-1])


def test_a_changed_reward_of_the_same_name_is_not_compared_with_the_former(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    """Both rewards have the column `color`."""
    values = SHORT | {"prompts": "animals", "eval_prompts": "animals", "num_validation_images": 1}
    values |= {"guidance_scale": 1.0, "num_inference_steps": 2, "validation_steps": 1, "output": str(tmp_path / "run")}
    values |= {"model": str(pipeline_folder), "early_stopping_patience": 9}
    Trainer(**values, reward="color(target=red)", steps=1).train()
    for steps, known in ((2, [0, 2]), (3, [0, 2, 3])):
        changed = Trainer(**values, reward="color(target=blue)", steps=steps, allow_changes="reward")
        changed.train()
        guard, base = changed.validation.guard, changed.validation.evaluations[0]
        assert [row["step"] for row in guard.rows] == known
        assert guard.rows[0]["color"] == pytest.approx(base.scores["color"])


def test_a_method_object_is_compared_by_its_settings(pipeline_folder: Path, tmp_path: Path) -> None:
    values = SHORT | {"prompts": "animals", "guidance_scale": 1.0, "num_inference_steps": 2, "eval_prompts": ""}
    values |= {"model": str(pipeline_folder), "reward": "brightness", "output": str(tmp_path / "run")}
    del values["method"]
    Trainer(**values, method=DraftK(k=1), steps=1).train()
    with raises(DraftuneError, "method", "k=1", "k=2"):
        Trainer(**values, method=DraftK(k=2), steps=2)
    Trainer(**values, method=DraftK(k=1), steps=2).train()


def test_a_run_with_settings_of_another_version(here: Path) -> None:
    folder = RunFolder(Settings(output="run"), {})
    earlier = RunIdentity(asdict(Settings()) | {"former_setting": 3}, {})
    folder.changed = folder.identity.differences(earlier)
    with raises(DraftuneError, "former_setting", "version"):
        folder.check_changes(earlier)


def test_a_changed_reward_leaves_the_reference_of_online_dpo(pipeline_folder: Path, tmp_path: Path) -> None:
    """With `reference_updates=0` that is the base model, whose LoRA is 0."""
    values = SHORT | {"method": "online_dpo(reference_updates=0)", "guidance_scale": 1.0, "num_inference_steps": 2}
    values |= {"batch_size": 2, "num_images_per_prompt": 2, "output": str(tmp_path / "run"), "learning_rate": 0.01}
    values |= {"model": str(pipeline_folder), "prompts": "animals"}
    Trainer(**values, reward="brightness", steps=2).train()
    changed = Trainer(**values, reward="saturation", allow_changes="reward", steps=3)
    changed.train()
    reference = changed.method.reference.weights
    assert any(parameter.any() for name, parameter in changed.train_step.parameters.items() if "lora_B" in name)
    assert not any(weight.any() for name, weight in reference.items() if "lora_B" in name)


def test_state_of_other_steps_is_not_taken_up(pipeline_folder: Path, tmp_path: Path) -> None:
    """The value network of sft_pg has an output for each sampling step."""
    values = SHORT | {"method": "sft_pg", "guidance_scale": 1.0, "num_inference_steps": 3}
    train(pipeline_folder, tmp_path / "run", **values | {"steps": 1})
    changed = {"steps": 2, "num_inference_steps": 4, "allow_changes": "num_inference_steps"}
    run = train(pipeline_folder, tmp_path / "run", **values | changed)
    assert len(run.metrics) == 2


def test_folders_of_nothing_that_is_read_are_told_apart_by_their_path(here: Path) -> None:
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / "w.pt").write_text(name)
    before = saved(asked(reward="'mine.py:red'(folder=a)"))
    assert asked(reward="'mine.py:red'(folder=a)").differences(before) == []
    assert asked(reward="'mine.py:red'(folder=b)").differences(before) == ["reward"]
