"""A LoRA on a range of the sampling steps: the range, its file, and every command that samples with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from test_docs import DOCS, blocks
from test_eval import SMALL
from test_lora_steps_gradients import marked
from test_merge import random_lora
from test_second_reward import prepared
from torch import Tensor

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.evaluation.compare import compare
from draftune.evaluation.eval_spec import resolve_eval_spec
from draftune.lora import FILE_NAME, load_lora, save_lora
from draftune.models import FAMILIES, DiffusionModel, load_model
from draftune.report.collect import collect
from draftune.runs.load import load_for_sampling, resolve_loras
from draftune.sampling.sampler import PrefixCache, skip_steps
from draftune.sampling.schedule import Prediction, Step
from draftune.sampling.step_range import StepRange
from draftune.settings import Settings
from helpers.errors import mentions, raises

TARGETS = ("to_q", "to_v", "to_out.0")


@pytest.mark.parametrize(
    ("text", "count", "indices"),
    [
        ("", 3, [0, 1, 2]),
        ("0.0-1.0", 1, [0]),
        ("0-0.4", 1, [0]),
        ("0.0-0.4", 50, list(range(20))),
        ("0.4-1", 50, list(range(20, 50))),
        (".25-0.75", 4, [1, 2]),
        ("0.3-0.6", 10, [3, 4, 5]),
        ("0.00001-1", 2, [1]),
    ],
)
def test_a_range_holds_the_steps_from_its_start_to_before_its_end(text: str, count: int, indices: list[int]) -> None:
    lora_steps = StepRange.parse(text)
    assert list(lora_steps.indices(count)) == indices
    assert StepRange.parse(str(lora_steps)) == lora_steps


def test_two_ranges_with_a_common_bound_hold_every_step_once() -> None:
    for count in range(10, 61):
        for tenth in range(1, 10):
            first, second = StepRange(0.0, tenth / 10), StepRange(tenth / 10, 1.0)
            assert [*first.indices(count), *second.indices(count)] == list(range(count))


@pytest.mark.parametrize(
    "text", ["0.4", "0.4-0.4", "0.6-0.4", "0-1.1", "-0.1-0.4", "a-b", "0.1-0.2-0.3", "0:0.4", "1e-1-1"]
)
def test_what_is_no_range_is_refused(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", f"--lora-steps={text}", "--output", str(tmp_path / "run")]) == 2
    assert mentions(capsys.readouterr().err, "lora_steps", f"'{text}'")


def test_a_mistyped_number_of_steps_does_not_hang() -> None:
    assert len(StepRange(0.5, 1.0).indices(2**62)) == pytest.approx(2**61)


def test_a_range_without_a_step_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ["--num-inference-steps", "4", "--output", str(tmp_path / "run")]
    assert main(["train", "--lora-steps", "0.8-1.0", *few]) == 2
    assert mentions(capsys.readouterr().err, "lora_steps 0.8-1.0 4 num_inference_steps")
    assert not (tmp_path / "run").exists()


def test_steps_with_and_without_the_lora_are_not_merged() -> None:
    schedule = marked("0.2-0.8")
    assert [step.tuned for step in schedule.steps] == [False, True, True, True, False]
    merged = skip_steps(schedule.steps, 2)
    assert [step.tuned for step in merged] == [False, True, True, False]
    assert [(step.alpha, step.alpha_next) for step in merged[1:3]] == [
        (schedule.steps[1].alpha, schedule.steps[1].alpha_next),
        (schedule.steps[2].alpha, schedule.steps[3].alpha_next),
    ]
    seen = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        seen.append(step.tuned)
        return Prediction(x, x)

    PrefixCache(torch.zeros(1, 1, 1, 1), stride=2).get(4, denoise, schedule.steps)
    assert seen == [False, True, True]


@pytest.mark.parametrize("family", dict.fromkeys(FAMILIES.values()))
def test_no_family_bypasses_the_range(family: type[DiffusionModel]) -> None:
    """A family defines `_schedule`; `schedule` marks its steps."""
    assert family.schedule is DiffusionModel.schedule


def ranged(base: Path, folder: Path, lora_steps: str, seed: int = 0) -> Path:
    """A LoRA that does something, with a range."""
    model = random_lora(base, seed, 2, 3.0, TARGETS)
    model.lora_steps = StepRange.parse(lora_steps)
    save_lora(model, folder)
    return folder


def switching() -> Callable[..., Any]:
    """Return `on_steps` of the documentation."""
    (block,) = [block for block in blocks(DOCS / "how-to" / "lora-steps.md") if block.title]
    names: dict[str, Any] = {}
    exec(block.text, names)
    on_steps: Callable[..., Any] = names["on_steps"]
    return on_steps


@pytest.mark.parametrize("lora_steps", ["0.0-0.4", "0.4-1.0", "0.2-0.8", "0.0-1.0"])
def test_images_are_those_of_diffusers_with_the_callback_of_the_documentation(
    pipeline_folder: Path, tmp_path: Path, lora_steps: str
) -> None:
    folder = ranged(pipeline_folder, tmp_path / "lora", lora_steps)
    model, _ = load_for_sampling(str(folder), device="cpu")
    ours = [model.sample_tensors(["cat"], [seed], model.schedule(5), 2.0) for seed in (3, 4)]
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_lora_weights(folder, weight_name=FILE_NAME)  # diffusers 0.35 needs the name offline
    pipe.set_progress_bar_config(disable=True)
    callback = switching()(pipe, *map(float, lora_steps.split("-")))
    options = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "pt"}
    for image, seed in zip(ours, (3, 4), strict=True):
        noise = model.noise(torch.Generator().manual_seed(seed), 1)
        theirs = pipe("cat", latents=noise, callback_on_step_end=callback, **options).images
        assert (image - theirs).abs().max() < 1e-5
    everywhere = load_model(pipeline_folder)
    load_lora(everywhere, folder)
    everywhere.lora_steps = StepRange()
    difference = (everywhere.sample_tensors(["cat"], [3], everywhere.schedule(5), 2.0) - ours[0]).abs().max()
    assert (difference > 1e-4) == (lora_steps != "0.0-1.0")


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_the_scale_acts_inside_the_range(pipeline_folder: Path, tmp_path: Path, scale: float) -> None:
    model, _ = load_for_sampling(
        str(ranged(pipeline_folder, tmp_path / "a", "0.0-0.4")), device="cpu", lora_scale=scale
    )
    images = model.sample_tensors(["cat"], [3], model.schedule(5), 2.0)
    base = load_model(pipeline_folder)
    same = torch.equal(images, base.sample_tensors(["cat"], [3], base.schedule(5), 2.0))
    assert same == (scale == 0)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_run_saves_its_range_and_all_steps_change_no_byte(pipeline_folder: Path, tmp_path: Path) -> None:
    def trained(name: str, **values: Any) -> Path:
        prepared(pipeline_folder, tmp_path / name, method="draft", **values).train()
        return tmp_path / name

    usual, every = trained("usual"), trained("every", lora_steps="0.0-1.0")
    early = trained("early", lora_steps="0.0-0.4", validation_steps=1, eval_rewards="saturation")
    first, second = ((folder / "lora" / FILE_NAME).read_bytes() for folder in (usual, every))
    assert first == second
    assert "lora_steps" not in metadata(usual / "lora" / FILE_NAME)
    assert "lora_steps: 0.0-0.4" in (early / "config.yaml").read_text()
    for name in ("lora", "best"):
        assert metadata(early / name / FILE_NAME)["lora_steps"] == "0.0-0.4"
    assert ["LoRA steps", "0.0-0.4"] in collect(early)["facts"]
    assert load_file(early / "lora" / FILE_NAME).keys() == load_file(usual / "lora" / FILE_NAME).keys()
    # Resuming: the same range in other words is the same run, another one is not.
    options = {"method": "draft", "steps": 4, "eval_rewards": "saturation"}
    again = prepared(pipeline_folder, early, lora_steps="0-.4", **options)
    assert again.context.model.lora_steps == StepRange(0.0, 0.4)
    with raises(DraftuneError, "lora_steps", "0.0-0.4", "0.0-0.7"):
        prepared(pipeline_folder, early, lora_steps="0.0-0.7", **options)


def test_commands_restore_the_range(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command samples with the LoRA on 2 of its 5 steps."""
    folder, seen = str(ranged(pipeline_folder, tmp_path / "lora", "0.2-0.6")), []
    build = DiffusionModel.schedule

    def schedule(self: DiffusionModel, count: int) -> Any:
        found = build(self, count)
        seen.append([step.tuned for step in found.steps])
        return found

    monkeypatch.setattr(DiffusionModel, "schedule", schedule)
    common = ["--num-inference-steps", "5", "--device", "cpu"]
    scored = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", "brightness", "--num-images", "1"]
    (tmp_path / "prompts.txt").write_text("a fish\na tree\n")
    image = str(tmp_path / "a.png")
    for command in (
        ["sample", folder, "--prompt", "cat", "--output", image, *common],
        ["sample", folder, "--prompt", "cat", "--output", image, "--guidance-reward", "brightness", *common],
        ["optimize-noise", folder, "--prompt", "cat", "--output", image, *scored[2:4], "--steps", "1", *common],
        ["eval", folder, *scored, *common],
        ["sweep", folder, "--scales", "1", "--output", str(tmp_path / "sweep"), *scored, *common],
        ["experimental", "tune-weights", folder, *scored[:-1], "2", "--steps", "1", "--output", image[:-4], *common],
    ):
        seen.clear()
        assert main(command) == 0, command
        assert seen, command
        assert all(tuned == [False, True, True, False, False] for tuned in seen), command


def test_loras_of_different_ranges_are_compared_each_on_its_own(pipeline_folder: Path, tmp_path: Path) -> None:
    folders = [str(ranged(pipeline_folder, tmp_path / name, name)) for name in ("0.0-0.4", "0.4-1.0", "0.0-1.0")]
    loras = [replace(lora, settings=Settings(model=lora.base, **SMALL)) for lora in resolve_loras(folders)]
    found: dict[str, Tensor] = {}
    spec = resolve_eval_spec(loras, ["cat"], "brightness", num_images=1)
    compare(loras, spec, device="cpu", on_comparison=lambda lora, both: found.update({lora.source: both.tuned.images}))
    for lora in loras:
        model, _ = load_for_sampling(lora.source, device="cpu")
        expected = model.sample_tensors(["cat"], [0], model.schedule(2), SMALL["guidance_scale"])
        assert torch.equal(found[lora.source], expected)
