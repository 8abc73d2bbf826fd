"""What users hand over: rewards that change what they are given, empty and long prompts, folders, names of outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_flow import SD3, save_flux, save_sd3
from test_pixart import build as save_pixart
from test_sdxl import saved as save_sdxl
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.evaluation.image_files import prompts_of
from draftune.evaluation.metrics import evaluate
from draftune.experimental.black_box import ZerothOrder
from draftune.experimental.tune_weights import tune_weights
from draftune.guidance.noise_optimization import optimize_noise
from draftune.guidance.sample import sample_guided
from draftune.models import DiffusionModel, load_model
from draftune.prompts import Prompt
from draftune.rewards import Reward, load_reward
from draftune.rewards.base import check_prompts
from draftune.utils.images import find_images, open_image
from draftune.utils.paths import folder_output, image_output
from helpers.errors import mentions, raises
from helpers.pipelines import build_pipeline

LONG = "a photo of a cat"  # sixteen tokens of the small tokenizer, with its two special ones, of which twelve are read


def apart(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return ((images - 0.5) / 0.5).square().mean((1, 2, 3))


class InPlace:
    """The same as `apart`, in place; keeps what it is given, spoils what it was given before, returns one buffer."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.buffer = torch.zeros(64)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        for tensor in self.kept:
            tensor.fill_(9.0)
        self.kept = [] if images.requires_grad else [images]
        score = images.sub_(0.5).div_(0.5).square().mean((1, 2, 3))
        prompts.clear()
        if score.requires_grad:
            return score
        return self.buffer[: len(score)].copy_(score)


REWARDS = {"apart": lambda: apart, "in place": InPlace}


def named(which: str) -> Reward:
    reward = load_reward(REWARDS[which]())
    reward.label = "mine"
    return reward


def trained(folder: Path, output: Path, reward: Any, **settings: Any) -> Path:
    common = {"steps": 2, "batch_size": 2, "num_inference_steps": 2, "guidance_scale": 2, "num_log_prompts": 2}
    # A step of Adam would hide a wrong factor of the gradient.
    common |= {"log_images_steps": 1, "lora_rank": 2, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}
    values = {"prompts": ["a cat", "a dog"], **common}
    return draftune.train(load_model(folder), reward, output=str(output), **values | settings).folder


@pytest.mark.parametrize("method", ["draft_k(k=1)", "ddpo"])
def test_a_reward_in_place_trains_as_one_that_is_not(pipeline_folder: Path, tmp_path: Path, method: str) -> None:
    runs = [trained(pipeline_folder, tmp_path / which, named(which), method=method) for which in REWARDS]
    loras = [load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in runs]
    assert all(tensor.equal(loras[1][name]) for name, tensor in loras[0].items())
    for sample in runs[0].glob("samples/*/*.png"):
        assert sample.read_bytes() == (runs[1] / sample.relative_to(runs[0])).read_bytes()


def test_held_out_rewards_in_place_see_and_leave_the_same(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    evaluations = []
    for which, order in (("apart", 1), ("in place", 1), ("in place", -1)):
        parts = [named(which), load_reward("brightness")][::order]
        run = trained(
            pipeline_folder,
            tmp_path / f"{which}{order}",
            "saturation",
            eval_rewards=parts[0] + parts[1],
            eval_prompts=str(tmp_path / "prompts.txt"),
            num_validation_images=1,
            steps=1,
        )
        rows = map(json.loads, (run / "evaluations.jsonl").read_text().split("\n")[:-1])
        evaluations.append([{name: value for name, value in row.items() if name != "train_seconds"} for row in rows])
    assert evaluations[0] == evaluations[1] == evaluations[2]


def test_guided_and_optimized_in_place(pipeline: Any) -> None:
    model = load_model(pipeline)
    for draw in (
        lambda reward: sample_guided(model, reward, ["a cat", "a dog"], num_inference_steps=2).images,
        lambda reward: optimize_noise(model, reward, "a cat", num_inference_steps=2, steps=2).best,
    ):
        first, second = (draw(named(which)) for which in REWARDS)
        assert first.equal(second)


def test_an_estimated_gradient_in_place() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    slopes = []
    for which in REWARDS:
        torch.manual_seed(0)
        here = images.clone().requires_grad_()
        total = ZerothOrder(named(which), coordinates=4)
        slopes += torch.autograd.grad(total(here, ["a", "b"]).sum(), here)
    assert slopes[0].equal(slopes[1])
    assert slopes[0].any()


class Features(Reward):
    """A user's reward with features, slope and learning, each of which changes what it is given."""

    learns = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))

    def features(self, images: Tensor) -> Tensor:
        return images.mul_(0).flatten(1)[:, :4]

    def learn(self, images: Tensor, prompts: Sequence[str], expected: Tensor | None) -> None:
        images.zero_()


def test_features_and_learning_have_their_own_images(pipeline_folder: Path, tmp_path: Path) -> None:
    images = torch.rand(4, 3, 8, 8)
    found = evaluate(lambda *_: images, load_reward("brightness"), Features(), ["a", "b"], 2)
    assert "eval/diversity" in found.values
    assert images.any()
    plain = trained(pipeline_folder, tmp_path / "plain", "brightness", log_images_steps=0)
    both = trained(pipeline_folder, tmp_path / "both", load_reward("brightness") + 0.0 * Features(), log_images_steps=0)
    first, second = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (plain, both))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("given", [[], ["--prompt", ""], ["--prompt", " \u200b\ufeff"]])
@pytest.mark.parametrize(
    "reward", ["emoji_clip", "brightness + 0.1*emoji_clip", "sharpness_aware(emoji_clip)", "emoji_name_accuracy"]
)
def test_a_reward_that_reads_prompts_refuses_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: str, given: list[str]
) -> None:
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "a.png")
    command = ["score", str(tmp_path / "a.png"), "--reward"]
    assert main([*command, reward, *given]) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert "emoji_" in line
    assert "prompt" in line
    assert main([*command, reward, "--prompt", "cat"]) == 0
    assert main([*command, "brightness"]) == 0


def test_an_empty_prompt_is_refused_before_anything_is_sampled(
    pipeline_folder: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = f"clip(model='{clip_folder}')"
    drawing = ["--prompt", "", "--num-inference-steps", "1", "--output", str(tmp_path / "x.png")]
    for command in (
        ["sample", str(pipeline_folder), "--guidance-reward", clip],
        ["optimize-noise", str(pipeline_folder), "--reward", clip],
    ):
        assert main([*command, *drawing]) == 2
        assert "'clip'" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    assert main(["sample", str(pipeline_folder), *drawing]) == 0  # the model can draw nothing in particular
    with raises(DraftuneError, "'clip'"):
        load_reward(clip)(torch.rand(2, 3, 32, 32), ["a cat", ""])
    mine = load_reward(lambda images, prompts: images.mean((1, 2, 3)))
    check_prompts(mine, [""])
    assert mine(torch.ones(1, 3, 4, 4), [""]) == 1


def limits(model: DiffusionModel, prompt: str) -> list[tuple[int, int]]:
    """Of each text encoder the tokens it reads, and whether it cuts the prompt."""
    return [(found.limit, found.cut) for found in model.truncated([prompt])]


def families(folder: Path) -> dict[str, tuple[DiffusionModel, list[int]]]:
    """Small pipelines, and how much their text encoders read; CLIP's small tokenizer says 12."""
    build_pipeline(folder / "parts").save_pretrained(folder / "sd")
    from diffusers import PixArtAlphaPipeline

    paths = {
        "sd": (folder / "sd", [12]),
        "sdxl": (save_sdxl(folder / "sdxl"), [12, 12]),
        "sd3": (save_sd3(folder / "sd3", SD3), [12, 12, 256]),
        "schnell": (save_flux(folder / "schnell", False), [12, 256]),
        "sigma": (save_pixart(folder / "sigma"), [300]),
        "alpha": (save_pixart(folder / "alpha", PixArtAlphaPipeline), [120]),
    }
    return {name: (load_model(path), reads) for name, (path, reads) in paths.items()}


def test_what_text_encoders_read_is_what_they_are_said_to_read(tmp_path: Path) -> None:
    for name, (model, reads) in families(tmp_path).items():
        assert [limit for limit, _ in limits(model, "a")] == reads, name

        def encoded(prompt: str, model: DiffusionModel = model) -> list[Tensor]:
            condition = model.encode([prompt], "", False)
            return [condition] if isinstance(condition, Tensor) else list(condition)

        # Every letter is a token, and one or two are special.
        for limit in set(reads):
            special = 2 if limit == 12 else 1
            fits = " ".join("ab" * limit)[: 2 * (limit - special) - 1] if limit == 12 else "a" * (limit - special - 1)
            by_limit = {read: cut for read, cut in limits(model, fits) if read == limit}
            over = {read: cut for read, cut in limits(model, fits + (" b" if limit == 12 else "b")) if read == limit}
            assert (by_limit, over) == ({limit: 0}, {limit: 1}), name
        most = "a" * max(reads)
        apart_beyond = [encoded(most + end) for end in ("bbbb", "cccc")]
        assert all(a.equal(b) for a, b in zip(*apart_beyond, strict=True)), name
        assert any(not a.equal(b) for a, b in zip(encoded("b" + most), encoded("c" + most), strict=True)), name


def said(capsys: pytest.CaptureFixture[str], what: str) -> list[str]:
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    return [line for line in lines if mentions(line, what)]


def test_what_is_cut_off_is_said_once(
    pipeline_folder: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(f"a cat\n{LONG}\n{LONG} too\n")
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "a.png")
    model, clip = str(pipeline_folder), f"clip(model='{clip_folder}')"
    drawing = ["--num-inference-steps", "1", "--guidance-scale", "1", "--output"]
    scored = ["--reward", clip]
    train = ["train", "--model", model, "--reward", clip, "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2"]
    train += ["--batch-size", "1", "--num-log-prompts", "1", *drawing, str(tmp_path / "run")]
    commands = [
        (train, ["2 of 3 prompts", "2 of 3 prompts"]),
        (["sample", model, "--prompt", "a cat", LONG, *drawing, str(tmp_path / "s.png")], ["1 of 2 prompts"]),
        (
            ["sample", model, "--prompt", "a", "--negative-prompt", LONG, *drawing, str(tmp_path / "n.png")],
            ["the negative prompt"],
        ),
        (["score", str(tmp_path), "--reward", f"{clip} + brightness", "--prompt", LONG], ["1 of 1 prompts"]),
        (
            ["optimize-noise", model, "--prompt", LONG, *scored, "--steps", "1", *drawing, str(tmp_path / "r.png")],
            ["1 of 1 prompts", "1 of 1 prompts"],
        ),
        (
            ["eval", str(tmp_path / "run"), "--num-images", "1", "--num-inference-steps", "1"],
            ["2 of 3 prompts", "2 of 3 prompts"],
        ),
    ]
    for command, wanted in commands:
        capsys.readouterr()
        assert main(command) == 0, command
        lines = said(capsys, "12 tokens")
        assert len(lines) == len(wanted), (command, lines)
        assert all(start in line for start, line in zip(wanted, lines, strict=True)), lines
        if "sample" not in command:
            assert mentions(lines[-1], "reward 'clip'")
        if "score" not in command:
            assert "text_encoder" in lines[0]
    assert main(["score", str(tmp_path / "a.png"), "--reward", clip, "--prompt", "a cat"]) == 0
    assert not said(capsys, "12 tokens")


def test_images_that_are_found_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.linear_gradient("L").resize((8, 8)).convert("RGB")
    for name in ("a.png", "sub/b.JFIF", "c.avif", "d.tga", "e.ppm", "f.jp2", ".hidden.png", ".thumbnails/g.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "in" / name, format="JPEG" if name.endswith("JFIF") else None)
    (tmp_path / "in" / "__MACOSX").mkdir()
    (tmp_path / "in" / "__MACOSX" / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    for name in ("h.heic", "i.jxl", "j.webp", "k.txt", "l.pdf", "m.h5"):
        (tmp_path / "in" / name).write_bytes(b"not an image")
    found = [str(path.relative_to(tmp_path / "in")) for path in find_images([str(tmp_path / "in")])]
    assert found == ["a.png", "c.avif", "d.tga", "e.ppm", "f.jp2", "h.heic", "i.jxl", "j.webp", "sub/b.JFIF"]
    assert main(["score", str(tmp_path / "in"), "--reward", "brightness", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert sum("brightness" not in line for line in printed.out.strip().split("\n")) == 6
    skipped = [line for line in printed.err.split("\n") if line.startswith("draftune: skipped: ")]
    assert [name for name in ("h.heic", "i.jxl", "j.webp") if any(name in line for line in skipped)] == [
        "h.heic",
        "i.jxl",
        "j.webp",
    ]
    # A folder may lie in a hidden one, and a file that is named is taken.
    assert len(find_images([str(tmp_path / "in" / ".thumbnails"), str(tmp_path / "in" / ".hidden.png")])) == 2


def test_a_prompt_for_each_image_from_every_kind_of_table(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    tables = {
        "t.csv": 'image,prompt\na.png,"a cat, asleep"\n',
        "t.tsv": "image\tcaption\na.png\ta cat, asleep\n",
        "t.jsonl": '{"image": "a.png", "text": "a cat, asleep"}\n',
        "t.json": '[{"image": "a.png", "prompt": "a cat, asleep"}]',
        "t.yaml": "- image: a.png\n  prompt: a cat, asleep\n",
    }
    for name, content in tables.items():
        (tmp_path / name).write_text(content)
        prompts = prompts_of([tmp_path / "a.png"], str(tmp_path / name))
        assert prompts == ["a cat, asleep"]
        assert isinstance(prompts[0], Prompt)
    for rows in ("a.png,a cat,1\na.png,a dog,1\n", "a.png,a cat,1\na.png,a cat,2\n"):
        (tmp_path / "t.csv").write_text(f"image,prompt,target\n{rows}")
        with raises(DraftuneError, "prompt a.png"):
            prompts_of([tmp_path / "a.png"], str(tmp_path / "t.csv"))


def test_an_output_is_a_file_by_its_ending_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "old.png").touch()
    for text in (
        "out",
        "sd1.5",
        "flux.1-dev/",
        "v1.0",
        "a/b.c",
        "x.png/",
        "x.jpg/",
        "there.png",
        "run.v2.final",
        "x.txt",
    ):
        assert image_output(text) == (Path(text), False), text
        assert folder_output(text, "--output") == Path(text), text
    for text in ("x.png", "sd1.5/x.PNG", "old.png", "a.b.png"):
        assert image_output(text) == (Path(text), True), text
        with raises(DraftuneError, "--image-dir folder"):
            folder_output(text, "--image-dir")
    for text in ("x.jpg", "x.JPEG", "x.webp", "x.heic", "sd1.5/x.tif", "file", "file/", "old.png/"):
        with raises(DraftuneError, "--output", text):
            image_output(text)


def test_folders_with_dots_are_written_to(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = ["--num-inference-steps", "1", "--guidance-scale", "1", "--output"]
    model = str(pipeline_folder)
    assert main(["sample", model, "--prompt", "cat", *drawing, str(tmp_path / "sd1.5")]) == 0
    assert open_image(tmp_path / "sd1.5" / "000-cat-seed0.png").shape == (1, 3, 16, 16)
    reno = ["optimize-noise", model, "--prompt", "cat", "--reward", "brightness", "--steps", "1"]
    assert main([*reno, *drawing, f"{tmp_path}/x.png/"]) == 0
    assert (tmp_path / "x.png" / "before.png").is_file()
    capsys.readouterr()
    assert main(["score", str(tmp_path), "--reward", "brightness", "--output", str(tmp_path / "t.CSV")]) == 0
    assert (tmp_path / "t.CSV").read_text().startswith("image,")
    assert main(["score", str(tmp_path), "--reward", "brightness", "--output", f"{tmp_path}/t2.csv/"]) == 2
    assert "t2.csv/" in capsys.readouterr().err


def test_weights_under_their_published_name(
    clip_folder: Path, head_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "a.png")
    shutil.copytree(clip_folder, tmp_path / "my models" / "clip [1] - 2")
    head = shutil.copy(head_file, tmp_path / "my models" / "sac+logos+ava1-l14-linearMSE.safetensors")
    (tmp_path / "my models" / "r.py").write_text("def fine(images, prompts):\n    return images.mean((1, 2, 3))\n")
    reward = (
        f"aesthetic(model='{tmp_path}/my models/clip [1] - 2', head='{head}') + 0.5*'{tmp_path}/my models/r.py:fine'"
    )
    assert main(["score", str(tmp_path / "a.png"), "--reward", reward]) == 0
    first = capsys.readouterr().out
    assert "fine" in first
    again = load_reward(load_reward(reward).expression)
    assert f"{float(again(open_image(tmp_path / 'a.png'), [''])[0]):.4f}" in first


class Loaded(Reward):
    """Knows which prompts it can score once its weights are loaded, as a classifier knows its classes."""

    def load(self) -> None:
        self.names = {"a cat"}

    def check(self, prompts: Sequence[str]) -> None:
        if unknown := set(prompts) - self.names:
            raise DraftuneError(f"no class {sorted(unknown)}")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


def test_prompts_are_checked_with_weights_loaded_and_in_wrappers(pipeline_folder: Path) -> None:
    asked: dict[str, Any] = {"model": str(pipeline_folder), "guidance_bounds": (1.0, 9.0), "num_inference_steps": 1}
    with raises(DraftuneError, "class 'a dog'"):
        tune_weights([], Loaded(), ["a cat", "a dog"], **asked)
    with raises(DraftuneError, "class 'a dog'"):
        black_box = ZerothOrder(load_reward(Loaded()), coordinates=4)
        check_prompts((0.5 * load_reward("brightness") + black_box).load_weights(), ["a dog"])
