"""The models that travel with the package: they load as the published ones do, and training on them works."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import draftune
from draftune.assets import ROOT
from draftune.errors import DraftuneError
from draftune.evaluation.metrics import score_batches
from draftune.models import DiffusionModel, load_model
from draftune.prompts import load_prompts
from draftune.recommended import recommended
from draftune.rewards import load_reward
from draftune.utils.images import to_pil
from helpers.errors import raises

README = Path(__file__).parents[1] / "README.md"
STEPS, GUIDANCE = recommended("emoji")["num_inference_steps"], recommended("emoji")["guidance_scale"]


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return load_model("emoji")


def test_sizes() -> None:
    def megabytes(folder: str) -> float:
        return sum(path.stat().st_size for path in (ROOT / folder).rglob("*") if path.is_file()) / 1e6

    assert megabytes("emoji") < 27
    assert megabytes("") < 40


def test_plain_diffusers_draws_the_same(model: DiffusionModel) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "emoji", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        ["cat face", "pizza"],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="pt",
    ).images
    ours = model.sample_tensors(["cat face", "pizza"], [3, 4], model.schedule(STEPS), GUIDANCE)
    assert (ours - theirs).abs().max() < 1e-3


def test_the_pictures_show_their_names_and_the_style_word_works(model: DiffusionModel) -> None:
    names = load_prompts("emoji-common")[::4]
    schedule, seeds = model.schedule(STEPS), [0] * len(names)
    judge = load_reward("emoji_name_accuracy + emoji_style_probability(style='3d')")
    plain = model.sample_tensors(names, seeds, schedule, GUIDANCE, batch_size=16)
    _, parts = score_batches(judge, plain, names)
    assert parts["emoji_name_accuracy"].mean() >= 0.9
    glossy, flat = (
        score_batches(judge, model.sample_tensors(prompts, seeds, schedule, GUIDANCE, batch_size=16), prompts)[1]
        for prompts in ([f"3d {name}" for name in names], [f"twemoji {name}" for name in names])
    )
    assert glossy["emoji_style_probability"].mean() > 0.7 > 0.3 > flat["emoji_style_probability"].mean()


def test_training_moves_the_reward_the_judge_and_the_lora_loads(tmp_path: Path) -> None:
    model = load_model("emoji")
    run = draftune.train(
        model,
        steps=30,
        log_images_steps=0,
        eval_prompts=str(few_prompts(tmp_path)),
        num_validation_images=2,
        output=str(tmp_path / "run"),
    )
    assert run.comparison is not None
    base, tuned = run.comparison.scores[load_reward(recommended("emoji")["reward"]).label]
    assert tuned > base + 0.02
    base, tuned = run.comparison.scores["eval/emoji_style_probability"]
    assert tuned > base
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "emoji", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "run" / "lora", weight_name="pytorch_lora_weights.safetensors")
    prompt = run.comparison.prompts[0]
    theirs = pipe(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert (theirs[0] - run.comparison.tuned.images[0]).abs().max() < 1e-3
    assert (theirs[0] - run.comparison.base.images[0]).abs().max() > 0.05


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python runs as it stands, but for a shorter training: two updates, three steps, four prompts."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = "".join(block for block in blocks if "from_pretrained" not in block)
    code = code.replace("steps=20", "steps=2, num_inference_steps=3, num_validation_images=1, num_log_prompts=2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("draftune.prompts.sets.emoji", lambda part: ["pizza", "rocket", "house", "sun"])
    names: dict[str, Any] = {}
    exec(code, names)
    assert (tmp_path / "cat.png").is_file()
    assert (tmp_path / "my-lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len((tmp_path / "runs" / "python" / "metrics.jsonl").read_text().splitlines()) == 2


def test_training_on_the_jpeg_reward_shrinks_the_files(tmp_path: Path) -> None:
    """The true size of PIL's JPEG files of the samples, on prompts that were not trained on."""
    run = draftune.train(
        "emoji",
        "jpeg_compressibility",
        steps=15,
        learning_rate=3e-3,
        lr_scheduler="constant",
        num_inference_steps=5,
        log_images_steps=0,
        eval_prompts=str(few_prompts(tmp_path)),
        num_validation_images=2,
        eval_rewards="",
        output=str(tmp_path / "run"),
    )
    assert run.comparison is not None
    both = run.comparison.base.images, run.comparison.tuned.images
    base, tuned = (sum(map(jpeg_size, to_pil(images))) for images in both)
    assert tuned < 0.97 * base


def few_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(load_prompts("emoji-common")[::8]))
    return path


def jpeg_size(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=75)
    return buffer.tell()


def test_a_text_encoder_that_is_not_all_there_is_refused(tmp_path: Path) -> None:
    """The libraries would go on with random weights."""
    shutil.copytree(ROOT / "emoji", tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with raises(DraftuneError, "text_encoder tensors"):
        load_model(tmp_path / "model")
