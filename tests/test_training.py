"""The loop: what it learns, logs, refuses, and how much memory it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_gradients import batch_of, relative
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.lora import add_lora, lora_parameters, save_lora
from draftune.methods import METHODS, BackpropMethod, Batch, DraftK, all_methods, load_method
from draftune.models import DiffusionModel, StableDiffusion, load_model
from draftune.prompts import metadata
from draftune.rewards import Reward, load_reward
from draftune.settings import Settings
from draftune.training import Run
from draftune.training.gradient_check import GradientCheck
from draftune.training.step import PromptSampler, TrainStep
from draftune.training.trainer import Trainer
from draftune.training.update_row import clipped_share
from draftune.utils.images import open_image
from draftune.utils.memory import peak_memory
from helpers.errors import mentions, raises
from helpers.pipelines import build_pipeline

PROMPTS = ["a cat", "a dog", "a bird"]


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def run(model: Any, tmp_path: Path, reward: Any = brightness, **values: Any) -> Run:
    settings = {"steps": 3, "num_inference_steps": 3, "guidance_scale": 3.0, "log_images_steps": 0, "batch_size": 2}
    return draftune.train(model, reward, **(settings | {"prompts": PROMPTS, "output": str(tmp_path / "run")} | values))


CLIMBERS = [
    "draft",
    "draft_k(k=2)",
    "draft_lv",
    "refl(m=2)",
    "alignprop(m=3)",
    "drtune(k=2, m=2)",
    "leapalign",
    "flowbp_sparse(k=2)",
    "flowbp_bridge(k=2)",
    "direct_align",
    "kl(draft_lv, beta=0.0001)",
]
SCORED = {
    "draft_lv": 12,
    "kl(draft_k(k=2), beta=0.1)": 4,
    "flowbp_bridge(k=2)": 4,
    "direct_align": 8,
    "adjoint_matching(k=2)": 4,
    "ddpo": 4,
    "ddpo(inner_epochs=2)": 4,
    "dpok": 4,
    "kl(sft_pg(generator_steps=2), beta=0.1)": 4,
    "sft_pg": 4,
    "kl(ddpo(timestep_fraction=0.5), beta=0.1)": 4,
    "flow_grpo": 4,
    "mix_grpo(window=2, beta=0.1)": 4,
    "diffusion_nft(inner_epochs=2)": 4,
    "kl(online_dpo, beta=0.1)": 4,
    "online_dpo": 4,
}


def grouped(method: str) -> dict[str, int]:
    """The setting that methods on groups of images need."""
    return {"num_images_per_prompt": load_method(method).min_images_per_prompt}


def test_every_method_is_trained_below() -> None:
    named = {method.partition("(")[0] for method in (*CLIMBERS, *SCORED)}
    assert named == all_methods().keys() - {"flowbp_lagrange"}  # for flow models: tests/test_flow.py


@pytest.mark.parametrize("method", CLIMBERS)
def test_every_gradient_method_raises_the_reward(pipeline: Any, tmp_path: Path, method: str) -> None:
    result = run(pipeline, tmp_path, method=method, steps=20, learning_rate=0.02)
    first, last = (sum(r["reward"] for r in rows) / 3 for rows in (result.metrics[:3], result.metrics[-3:]))
    assert last > first + 0.004


@pytest.mark.parametrize(("method", "queries"), SCORED.items())
def test_every_kind_of_method_logs_the_same(pipeline: Any, tmp_path: Path, method: str, queries: int) -> None:
    values = {"gradient_accumulation_steps": 2, "learning_rate": 0.02, **grouped(method)}
    result = run(pipeline, tmp_path, method=method, steps=2, **values)
    keys = ["step", "reward", "reward_std", "reward_queries", "grad_norm", "grad_clip_fraction", "learning_rate"]
    own = ["clip_fraction"] if any(name in method for name in ("ddpo", "dpok", "grpo")) else []
    own += ["preference_accuracy"] if "online_dpo" in method else []
    assert [list(row) for row in result.metrics] == [[*keys, "train_seconds", *own]] * 2
    assert [row["reward_queries"] for row in result.metrics] == [queries, 2 * queries]
    assert all(row["grad_norm"] > 0 for row in result.metrics)


def test_a_reward_without_a_gradient_is_for_methods_that_need_none(pipeline_folder: Path, tmp_path: Path) -> None:
    def rounded(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (16 * images.detach()).round().mean((1, 2, 3))

    assert len(run(str(pipeline_folder), tmp_path, rounded, method="ddpo").metrics) == 3
    for method in ("draft_lv", "adjoint_matching(k=1)", "kl(draft_lv)"):
        with raises(DraftuneError, "rounded gradient"):
            run(str(pipeline_folder), tmp_path / "other", rounded, method=method)


def test_the_folder_of_a_run(pipeline_folder: Path, tmp_path: Path) -> None:
    result = run(
        str(pipeline_folder),
        tmp_path,
        method="draft_lv(n=2)",
        steps=4,
        log_images_steps=2,
        reward="jpeg_compressibility + 0.5*jpeg_incompressibility(quality=50)",
        eval_prompts="emoji-common",
        num_validation_images=1,
        gradient_accumulation_steps=2,
    )
    folder = result.folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["reward_queries"] for row in rows] == [12, 24, 36, 48]
    for row in rows:
        wanted = {"step", "reward", "reward_std", "reward_queries", "grad_norm", "grad_clip_fraction"}
        wanted |= {"learning_rate", "train_seconds"}
        assert wanted < row.keys()
        parts = row["reward/jpeg_compressibility"], row["reward/jpeg_incompressibility"]
        assert row["reward"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)
    assert rows[-1]["train_seconds"] > rows[0]["train_seconds"] > 0
    assert sorted(p.name for p in (folder / "samples").glob("*.png")) == [f"step-00000{i}.png" for i in (0, 2, 4)]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 2, 4]
    reward = load_reward(again_reward := "jpeg_compressibility + 0.5*jpeg_incompressibility(quality=50)")
    for row in samples:
        pictures = [open_image(path) for path in sorted((folder / "samples" / f"step-{row['step']:06d}").iterdir())]
        assert len(pictures) == len(row["prompts"]) == len(row["scores"])
        assert row["scores"] == pytest.approx(reward(torch.cat(pictures), row["prompts"]).tolist(), rel=0.01)
    audit = json.loads((folder / "reward_check.json").read_text())
    assert list(audit) == ["jpeg_compressibility", "jpeg_incompressibility"]
    assert 0 <= audit["jpeg_compressibility"]["pixels_without_gradient"] < 0.5
    known = json.loads((folder / "environment.json").read_text())
    assert (known["draftune"], known["torch"]) == (draftune.__version__, version("torch"))
    assert (folder / "config.yaml").read_text().count(again_reward) == 1
    assert (folder / "before_after.png").is_file()
    assert list((folder / "tensorboard").glob("events*"))
    # The resolved settings are enough to start the same run again.
    again = Settings.from_mapping(draftune.presets.read_yaml(folder / "config.yaml"))
    assert again.num_inference_steps == 3
    assert again.method == "draft_lv(n=2)"
    assert result.comparison is not None
    assert len(result.comparison.base.images) == 64
    with raises(DraftuneError, folder, "reward gradient_accumulation_steps"):
        run(str(pipeline_folder), tmp_path)


def test_the_same_seed_gives_the_same_lora(pipeline_folder: Path, tmp_path: Path) -> None:
    def weights(name: str, **values: Any) -> dict[str, Tensor]:
        model = load_model(pipeline_folder)
        run(model, tmp_path / name, **values)
        return {name: p.detach().clone() for name, p in lora_parameters(model).items()}

    first = weights("a")
    second = weights("b", log_images_steps=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights("c", seed=1)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_updates_share_the_steps_before_the_cut(pipeline_folder: Path, tmp_path: Path) -> None:
    """Three updates with one path: its last call alone is made again, from the same latent, with the new LoRA."""
    settings = {"method": "draft_k(k=1)", "prefix_reuse_steps": 3, "num_inference_steps": 4, "prompts": PROMPTS}
    trainer = Trainer(str(pipeline_folder), brightness, output=str(tmp_path / "run"), learning_rate=0.1, **settings)
    calls: list[tuple[bool, Tensor]] = []
    outputs: list[Tensor] = []
    unet = trainer.model.denoiser
    unet.register_forward_pre_hook(lambda unet, given: calls.append((torch.is_grad_enabled(), given[0].detach())))
    unet.register_forward_hook(lambda unet, given, output: outputs.append(output.sample.detach()))
    for step in range(1, 5):
        trainer.train_step.run(step)
    assert [graph for graph, _ in calls] == [False] * 3 + [True] * 3 + [False] * 3 + [True]
    assert torch.equal(calls[3][1], calls[4][1])
    assert torch.equal(calls[3][1], calls[5][1])
    assert not torch.allclose(outputs[4], outputs[5], rtol=1e-3)
    assert not torch.allclose(calls[3][1], calls[9][1], rtol=1e-3)


@pytest.mark.parametrize("mode", ["straight_through", "hard"])
def test_the_clamp_of_pixels_is_a_setting(pipeline: Any, tmp_path: Path, mode: str) -> None:
    """Where the decoder makes every pixel whiter than white, the hard clamp leaves nothing to learn from."""
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(10.0)
    model = StableDiffusion(pipeline, "tiny")
    settings = {"prompts": PROMPTS, "num_inference_steps": 3, "method": "draft_k(k=1)", "output": str(tmp_path / "run")}
    trainer = Trainer(model, brightness, **settings, pixel_clamp=mode)
    row = trainer.train_step.run(1)
    assert row["reward"] == 1
    assert (row["grad_norm"] > 0) == (mode == "straight_through")
    with raises(DraftuneError, "pixel_clamp soft"):
        Trainer(model, brightness, **settings, pixel_clamp="soft")


@pytest.mark.parametrize("own", ["hard", "straight_through"])
def test_a_run_leaves_the_model_its_own_clamp(pipeline: Any, tmp_path: Path, own: str) -> None:
    """Also where the reward is refused before the first update."""
    seen: list[str] = []

    def noted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(model.pixel_clamp)
        return brightness(images, prompts)

    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        noted(images, prompts)
        raise ValueError("broken")

    model = StableDiffusion(pipeline, "tiny")
    model.pixel_clamp = own
    other = {"hard": "straight_through", "straight_through": "hard"}[own]
    with raises(DraftuneError, "broken"):
        run(model, tmp_path, broken, steps=1, pixel_clamp=other)
    assert (seen.pop(), model.pixel_clamp) == (other, own)
    fresh = StableDiffusion(build_pipeline(tmp_path / "parts"), "tiny")
    fresh.pixel_clamp = own
    model = fresh
    run(fresh, tmp_path / "second", noted, steps=1, pixel_clamp=other)
    assert set(seen) == {other}
    assert fresh.pixel_clamp == own


SPLIT: dict[str, dict[str, int]] = {
    "one batch scored at once": {"batch_size": 4, "reward_batch_size": 4},
    "four batches": {"batch_size": 1, "gradient_accumulation_steps": 4},
    "two batches scored at once": {"batch_size": 2, "gradient_accumulation_steps": 2, "reward_batch_size": 2},
}


# Methods that draw no random numbers of their own, whose order would differ.
@pytest.mark.parametrize("method", ["draft_k(k=1)", "kl(draft_k(k=2), beta=10)"])
def test_an_update_does_not_depend_on_how_its_pictures_are_split(
    pipeline_folder: Path, tmp_path: Path, method: str
) -> None:
    """The gradient and the step of plain SGD are the same, in float64; a step of Adam would hide a wrong factor."""

    def updated(name: str, **values: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        settings = {"method": method, "num_inference_steps": 3, "guidance_scale": 3.0, "prompts": ["a cat"]}
        settings |= {"optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5, "output": str(tmp_path / name)}
        painter = load_model(StableDiffusionPipeline.from_pretrained(pipeline_folder).to(torch.float64))
        made = Trainer(painter, brightness, **settings, **values).train_step
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in made.parameters.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        before = [parameter.detach().clone() for parameter in made.parameters.values()]
        row = made.run(1)
        pairs = list(zip(before, made.parameters.values(), strict=True))
        moved = torch.cat([(now.detach() - then).flatten() for then, now in pairs])
        return torch.cat([now.grad.flatten() for _, now in pairs if now.grad is not None]), moved, row

    gradient, moved, row = updated("whole", batch_size=4)
    assert gradient.norm() > 1e-7
    assert relative(moved, -0.5 * gradient) < 1e-6
    for name, values in SPLIT.items():
        found, also_moved, other = updated(name, **values)
        assert relative(found, gradient) < 1e-9, name
        assert relative(also_moved, moved) < 1e-6, name
        for key in ("reward", "grad_norm", "reward_queries"):
            assert other[key] == pytest.approx(row[key], rel=1e-9), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_lora_tensor_gets_a_gradient(pipeline: Any, tmp_path: Path, precision: str) -> None:
    """Under autocast a cached low-precision copy of the weights would cut the gradient, silently."""
    model = StableDiffusion(pipeline, "tiny")
    run(model, tmp_path, mixed_precision=precision, method="draft_k(k=1)")
    parameters = lora_parameters(model)
    assert parameters
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    assert all(p.dtype == torch.float32 for p in parameters.values())
    assert pipeline.unet.conv_in.weight.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_somebody_elses_autocast_leaves_no_stale_weights(pipeline: Any) -> None:
    """A prefix without a graph inside a caching autocast must not feed its detached weights to the last step."""
    model = StableDiffusion(pipeline, "tiny")
    model.to("cpu", "bf16")
    torch.manual_seed(0)
    add_lora(model, rank=4)
    for parameter in lora_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.set_sampler_options("trailing")
    schedule, noise = model.schedule(3), model.noise(torch.Generator().manual_seed(0), 1)

    def gradient(outer: bool) -> Tensor:
        model.denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=outer, cache_enabled=True):
            (clean,) = DraftK(1).samples(batch_of(model.denoiser_for(["a"], schedule, 3.0), schedule, noise=noise))
        clean.square().mean().backward()
        grads = {name: p.grad for name, p in lora_parameters(model).items()}
        assert all(grad is not None and grad.any() for grad in grads.values()), grads.keys()
        return torch.cat([grad.flatten() for grad in grads.values() if grad is not None])

    assert torch.equal(gradient(outer=True), gradient(outer=False))


def test_training_stops_where_a_tensor_gets_no_gradient(pipeline: Any, tmp_path: Path) -> None:
    class Cut(BackpropMethod):
        def samples(self, batch: Batch) -> Iterator[Tensor]:
            yield batch.noise.clone().requires_grad_()

    METHODS["cut"] = Cut
    try:
        with raises(DraftuneError, "gradient lora_"):
            run(pipeline, tmp_path, method="cut", steps=5)
    finally:
        del METHODS["cut"]


def test_the_audit_names_the_tensor_left_behind() -> None:
    moved, stuck = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    moved.grad, stuck.grad = torch.ones(2), torch.zeros(2)
    audit = GradientCheck({"moved": moved, "stuck": stuck}, updates=2)
    audit.check()
    with raises(DraftuneError, "stuck"):
        audit.check()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: images.mean((1, 2, 3)).detach(), "gradient"),
        (lambda images, prompts: images.mean(), "shape (2,) ()"),
        (lambda images, prompts: images.mean((2, 3)), "(2, 3)"),
        (lambda images, prompts: images.mean((1, 2, 3)) * math.nan, "nan"),
        (lambda images, prompts: [1.0, 2.0], "tensor list"),
        (lambda images, prompts: images.round().mean((1, 2, 3)), "gradient 2"),
        (lambda images, prompts: torch.zeros(2, requires_grad=True), "depend"),
        (
            lambda images, prompts: images[:1].mean() * torch.ones(2),
            "gradient 1 2 dog",
        ),
        (lambda images, prompts: (images.mean((1, 2, 3)) * 0).sqrt(), "finite"),
    ],
)
def test_rewards_that_cannot_be_trained_on_are_refused(
    pipeline: Any, tmp_path: Path, reward: Any, message: str
) -> None:
    with raises(DraftuneError, message):
        run(pipeline, tmp_path, reward)
    assert not (tmp_path / "run").exists()


def test_prompts_metadata_reaches_the_reward_and_is_checked_first(pipeline_folder: Path, tmp_path: Path) -> None:
    class Level(Reward):
        label = "total"

        def check(self, prompts: Sequence[str]) -> None:
            for prompt in prompts:
                if "level" not in metadata(prompt):
                    raise DraftuneError(f"no level for {prompt!r}")

        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean((1, 2, 3)) * torch.tensor([float(metadata(prompt)["level"]) for prompt in prompts])

    model = str(pipeline_folder)
    (tmp_path / "prompts.csv").write_text("prompt,level\na cat,1\na dog,2\na bird,0.5\n")
    prompts = str(tmp_path / "prompts.csv")
    with raises(DraftuneError, "eval_prompts level 'cat'"):
        run(model, tmp_path, Level(), prompts=prompts, eval_prompts="animals")
    with raises(DraftuneError, "level 'a cat'"):
        run(model, tmp_path, Level())
    assert not (tmp_path / "run").exists()
    result = run(model, tmp_path, Level() + 0.5 * load_reward(brightness), prompts=prompts, eval_prompts=prompts)
    assert result.comparison is not None
    scores = result.comparison.scores
    # A part that is called as the total is does not take its place.
    assert list(scores) == ["total + 0.5*brightness", "total-2", "brightness"]
    for i in (0, 1):
        total, level, bright = (values[i] for values in scores.values())
        assert total == pytest.approx(level + 0.5 * bright, rel=1e-5)


def test_held_out_rewards_are_tried_before_training(pipeline: Any, tmp_path: Path) -> None:
    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 5].mean((1, 2))

    with raises(DraftuneError, "broken IndexError test_training.py"):
        run(pipeline, tmp_path, eval_rewards=broken, eval_prompts="animals")
    assert not (tmp_path / "run").exists()


def test_the_scale_of_rewards_by_base_pictures(pipeline_folder: Path, tmp_path: Path) -> None:
    """The weights in the written settings are those divided by the spreads that the base model's pictures have."""
    reward = "brightness - 3*sharpness"
    result = run(str(pipeline_folder), tmp_path, reward, reward_normalization_samples=6, steps=1, reward_batch_size=1)
    written = draftune.presets.read_yaml(result.folder / "config.yaml")
    assert written["reward_normalization_samples"] == 0
    model = load_model(pipeline_folder)
    model.set_sampler_options("trailing")
    pictures = model.sample_tensors((PROMPTS * 2)[:6], range(6), model.schedule(3), 3.0, batch_size=2)
    _, parts = draftune.load_reward(reward).components(pictures, [""] * 6)
    terms = draftune.load_reward(written["reward"]).terms
    assert [part.label for _, part in terms] == ["brightness", "sharpness"]
    wanted = [1 / float(parts["brightness"].std()), -3 / float(parts["sharpness"].std())]
    assert [weight for weight, _ in terms] == pytest.approx(wanted, rel=1e-3)
    # The update climbed the sum with these weights.
    (row,) = result.metrics
    climbed = wanted[0] * row["reward/brightness"] + wanted[1] * row["reward/sharpness"]
    assert row["reward"] == pytest.approx(climbed, rel=1e-3)


def test_a_reward_that_breaks_later_stops_the_run_and_keeps_the_lora(pipeline: Any, tmp_path: Path) -> None:
    calls = []

    def breaks(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(1)
        return brightness(images, prompts) * (math.nan if len(calls) > 8 else 1.0)

    with raises(DraftuneError, "nan update"):
        run(pipeline, tmp_path, breaks, steps=20)
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_settings_that_do_not_fit_are_refused_before_anything_is_written(pipeline: Any, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "draft_k(k=4)"}, "k=4 3 steps"),
        ({"method": "refl"}, "m 3 steps"),
        ({"method": "drtune(k=3, m=2)"}, "k=3 m=2 3 steps"),
        ({"method": "leapalign", "num_inference_steps": 1}, "leapalign 2 steps"),
        ({"method": "flowbp_sparse(k=4)"}, "k=4 3 steps"),
        ({"method": "flowbp_bridge"}, "k=4 3 steps"),
        ({"method": "direct_align", "num_inference_steps": 1}, "direct_align 1 steps"),
        ({"method": "ddpo", "num_inference_steps": 1, "set_alpha_to_one": True}, "num_inference_steps 2 1"),
        ({"method": "adjoint_matching", "num_inference_steps": 1, "set_alpha_to_one": True}, "num_inference_steps 2 1"),
        ({"method": "ddpo(clip_range=0)"}, "clip_range 0"),
        ({"method": "ddpo", "batch_size": 1}, "gradient_accumulation_steps 2 1"),
        ({"method": "kl(dpok)", "batch_size": 1}, "gradient_accumulation_steps 2 1"),
        ({"method": "ddpo(adv_clip_max=0)"}, "adv_clip_max 0"),
        ({"method": "ddpo(timestep_fraction=2)"}, "timestep_fraction 0 1 2"),
        ({"method": "ddpo(buffer_size=4)"}, "buffer_size 16 4"),
        ({"method": "alignprop(cut=normel)"}, "'normel' 'normal'"),
        ({"method": "drtune(k=2, m=2)", "prefix_reuse_steps": 2}, "drtune gradient prefix_reuse_steps"),
        ({"method": "kl(ddpo)", "prefix_stride": 2}, "prefix_stride 1"),
        ({"method": "refl(m=2)", "prefix_reuse_steps": 2}, "prefix_reuse_steps 2 refl"),
        ({"method": "alignprop(m=3)", "prefix_reuse_steps": 3}, "prefix_reuse_steps 3 alignprop"),
        ({"method": "refl(m=2)", "prefix_reuse_cosine": 0.9}, "prefix_reuse_cosine 0.9 refl"),
        (
            {"method": "kl(leapalign)", "prefix_reuse_steps": 2},
            "prefix_reuse_steps 2 kl",
        ),
        ({"method": "kl(draft_lv, beta=-1)"}, "beta -1 0"),
        ({"method": "adjoint_matching(scale=0)"}, "scale 0"),
        ({"method": "leapalign(discount=2)"}, "discount 0 1 2"),
        ({"lora_target_modules": "to_q, to_nothing"}, "to_nothing"),
        ({"lora_target_modules": "attn2"}, "attn2"),
        ({"height": 13}, "height 13"),
        ({"lora_rank": 0}, "lora_rank 0"),
        ({"steps": "many"}, "steps many"),
        ({"lerning_rate": 1.0}, "'lerning_rate' 'learning_rate'"),
        ({"timestep_spacing": "trailling"}, "'trailling' 'trailing'"),
        ({"mixed_precision": "fp16"}, "fp16 CPU"),
    ]
    for values, message in cases:
        with raises(DraftuneError, message):
            run(pipeline, tmp_path, **values)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "told"), [(5, 3), (2, 2)])
def test_a_run_without_a_gradient_says_which_factor_was_0(
    pipeline: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, told: int
) -> None:
    def never(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(images),), -7.3)

    result = run(pipeline, tmp_path, never, method="ddpo", steps=steps, batch_size=3)
    assert [row["grad_norm"] for row in result.metrics] == [0] * steps
    said = caplog.text
    assert sum(mentions(line, "gradient 0 updates 3 -7.3", told) for line in said.splitlines()) == 1
    assert not mentions(said, "learning rate")


def test_a_gradient_that_vanishes_later_is_told_too(
    pipeline: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, made = TrainStep.run, [0]

    def counted(self: TrainStep, step: int) -> dict[str, float]:
        made.append(step)
        return update(self, step)

    def dies(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return brightness(images, prompts) * (made[-1] < 4)

    monkeypatch.setattr(TrainStep, "run", counted)
    result = run(pipeline, tmp_path, dies, steps=8, learning_rate=0.02)
    assert [row["step"] for row in result.metrics if row["grad_norm"] == 0] == [4, 5, 6, 7, 8]
    said = caplog.text
    assert sum(mentions(line, "gradient 0 3 updates") for line in said.splitlines()) == 1
    assert not mentions(said, "learning rate")


def test_a_lora_that_takes_no_part_is_named_by_policy_gradients_too(pipeline: Any, tmp_path: Path) -> None:
    """Rewards differ and no ratio is clipped: that the gradient is 0 is the LoRA's fault."""
    settings = {"steps": 4, "num_inference_steps": 3, "guidance_scale": 3.0, "log_images_steps": 0, "batch_size": 2}
    trainer = Trainer(
        pipeline, brightness, prompts=PROMPTS, output=str(tmp_path / "run"), method="ddpo(min_count=4)", **settings
    )
    for module in trainer.model.denoiser.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            module.scaling = dict.fromkeys(scaling, 0.0)
    with raises(DraftuneError, "gradient lora_target_modules"):
        trainer.run()


@pytest.mark.parametrize(("limit", "share"), [(1e-9, 1.0), (1e9, 0.0), (0, 0.0)])
def test_the_share_of_clipped_gradients(pipeline: Any, tmp_path: Path, limit: float, share: float) -> None:
    result = run(pipeline, tmp_path, method="ddpo(inner_epochs=2)", steps=2, max_grad_norm=limit, learning_rate=0.01)
    assert [row["grad_clip_fraction"] for row in result.metrics] == [share] * 2
    assert all(0 < row["clip_fraction"] <= 0.5 for row in result.metrics)


def test_the_share_of_clipped_gradients_counts_each_optimizer_step() -> None:
    assert clipped_share([0.5, 2.0, 3.0, 1.0], 1.0) == 0.5
    assert math.isnan(clipped_share([0.5, math.inf], 1.0))


def test_each_model_has_its_recommended_method() -> None:
    assert (Settings().method, Settings().num_inference_steps) == ("draft", 2)
    assert Settings(model="other/model").method == "draft_lv"


def test_only_a_prefix_of_one_length_is_shared(pipeline_folder: Path, tmp_path: Path) -> None:
    """Methods that allow it ask for the same number of steps in every update, and those that do not for several."""
    for name, shared in (
        ("draft_k(k=2)", True),
        ("refl(m=1)", True),
        ("refl(m=3)", False),
        ("leapalign", False),
        ("flowbp_sparse(k=2)", False),
        ("direct_align", True),
    ):
        method = load_method(name)
        asked: set[int] = set()
        trainer = Trainer(
            str(pipeline_folder), brightness, output=str(tmp_path / "run"), method=name, num_inference_steps=4,
            prompts=PROMPTS, batch_size=1, resume=False, seed=1,
        )  # fmt: skip
        for step in range(1, 7):
            trainer.train_step.sample_inputs()
            latents = trainer.train_step.pending[0].prefix_cache
            trainer.train_step.run(step)
            asked.add(max(latents.latents))
        assert method.prefix_is_reusable() == (len(asked) == 1) == shared, (name, asked)


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    order = PromptSampler(5, torch.Generator().manual_seed(0))
    flat = [i for _ in range(10) for i in order.next(2)]
    for start in range(0, 20, 5):
        assert sorted(flat[start : start + 5]) == [0, 1, 2, 3, 4]
    assert flat[:5] != flat[5:10]


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_the_lora_loads_in_diffusers(pipeline_folder: Path, tmp_path: Path, alpha: float | None) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors import safe_open

    model = load_model(pipeline_folder)
    torch.manual_seed(0)
    add_lora(model, rank=4, alpha=alpha)
    for parameter in lora_parameters(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    path = save_lora(model, tmp_path / "lora")
    tuned = model.sample_tensors(["a cat"], [1], model.schedule(4), 3.0)
    with safe_open(path, "pt") as file:
        assert file.metadata()["base_model"] == str(pipeline_folder)

    def draw(pipe: StableDiffusionPipeline) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        # PNDM by its config; the sampler in training is DDIM.
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        return pipe("a cat", num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="pt").images

    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    base = draw(pipe)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=path.name)
    loaded = draw(pipe)
    assert (loaded - base).abs().max() > 0.02
    assert (loaded - tuned).abs().max() < 1e-3

    again = load_model(pipeline_folder)
    draftune.load_lora(again, tmp_path / "lora")
    assert torch.allclose(again.sample_tensors(["a cat"], [1], again.schedule(4), 3.0), tuned, atol=1e-5)


def peak_of_one_update(model: DiffusionModel, method: str, steps: int) -> int:
    schedule = model.schedule(steps)
    noise = model.noise(torch.Generator().manual_seed(0), 2)

    def update() -> None:
        denoise, base = model.denoisers_for(["a", "b"], schedule, 3.0)
        batch = batch_of(denoise, schedule, base, noise, lambda clean: model.decode(clean).mean((1, 2, 3)))
        for loss in draftune.load_method(method).losses([batch]):
            loss.backward()
            del loss

    return peak_memory(update)


def test_peak_memory(tmp_path: Path) -> None:
    model = StableDiffusion(build_pipeline(tmp_path), "tiny")
    add_lora(model, rank=2)
    peak_of_one_update(model, "draft_k(k=1)", 10)  # makes the gradients' own tensors
    short, long = (peak_of_one_update(model, "draft_k(k=1)", steps) for steps in (10, 50))
    assert long == pytest.approx(short, rel=0.03)
    assert peak_of_one_update(model, "draft", 50) < 1.3 * long
    # Without checkpoints, 10 graphs stand beside each other: the measure sees that.
    model.set_checkpointing("none")
    assert peak_of_one_update(model, "draft", 10) > 2 * long
