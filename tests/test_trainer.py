"""The public training API: callbacks, trackers, learning-rate schedules, EMA, compilation and optional packages."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError, require
from draftune.lora import lora_parameters
from draftune.models import load_model
from draftune.runs.checkpoint import load_optimizer, optimizer_tensors, read_tensors
from draftune.settings import SCHEDULERS, Settings
from draftune.training import placement
from draftune.training.optim import learning_rates, make_optimizer
from draftune.training.trackers import TensorBoard, Trackers
from draftune.training.validation import Validation

PROMPTS = ["a cat", "a dog", "a bird"]
SMALL: dict[str, Any] = {
    "method": "draft_k(k=1)",
    "steps": 4,
    "batch_size": 2,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "learning_rate": 0.01,
    "lora_rank": 2,
    "log_images_steps": 0,
    "num_log_prompts": 1,
    "checkpointing_steps": 1,
    "num_validation_images": 1,
    "device": "cpu",
}


def trainer(model: Any, output: Path, *callbacks: draftune.Callback, **values: Any) -> draftune.Trainer:
    values = SMALL | {"output": str(output)} | values
    return draftune.Trainer(str(model), "brightness", PROMPTS, callbacks=callbacks, **values)


def lora(folder: Path, name: str = "lora") -> dict[str, Tensor]:
    return load_file(folder / name / "pytorch_lora_weights.safetensors")


class Recorder(draftune.Callback):
    """Note each event with its step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[Mapping[str, Any]] = []

    def on_train_begin(self, trainer: draftune.Trainer) -> None:
        self.events.append(("begin", trainer.global_step))
        self.trainer = trainer

    def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
        self.events.append(("step", step))
        self.logs.append(logs)

    def on_evaluate(self, step: int, row: Mapping[str, Any]) -> None:
        self.events.append(("evaluate", step))
        assert {"step", "brightness", "best"} <= row.keys()

    def on_save(self, step: int) -> None:
        self.events.append(("save", step))
        assert (self.trainer.folder.path / "checkpoints" / f"step-{step:06d}").is_dir()

    def on_train_end(self) -> None:
        self.events.append(("end", self.trainer.global_step))


def test_callbacks_see_every_event(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text("a fish\na tree\n")
    values = {"steps": 2, "eval_prompts": str(tmp_path / "eval.txt"), "eval_rewards": ""}
    recorder = Recorder()
    run = trainer(pipeline_folder, tmp_path / "run", recorder, **values).train()
    assert recorder.events == [
        *[("begin", 0), ("save", 0), ("step", 1), ("save", 1), ("step", 2), ("save", 2)],
        *[("evaluate", 0), ("evaluate", 2), ("save", 2), ("end", 2)],
    ]
    assert [dict(row) for row in recorder.logs] == run.metrics
    again = Recorder()
    trainer(pipeline_folder, tmp_path / "run", again, **(values | {"steps": 3})).train()
    # The base model's evaluation is in the log already.
    assert again.events[:3] == [("begin", 0), ("step", 3), ("save", 3)]


def test_the_base_model_is_evaluated_alike_before_and_after_updates(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eval.txt").write_text("a fish\na tree\n")
    # The fine-tuned model is brighter, so the base model is the best by this metric.
    values = {"steps": 4, "eval_prompts": str(tmp_path / "eval.txt"), "eval_rewards": "", "learning_rate": 0.05}
    values |= {"metric_for_best_model": "-brightness", "ema_decay": 0.5, "validation_steps": 3}
    late = trainer(pipeline_folder, tmp_path / "late", **values).train()
    monkeypatch.setattr(Validation, "base_comes_first", True)
    early = trainer(pipeline_folder, tmp_path / "early", **values).train()
    for run in (early, late):
        for row in (*run.metrics, *run.evaluations):
            del row["train_seconds"]
        assert [row["best"] for row in run.evaluations] == [True, False, False]
        best = load_file(run.folder / "best" / "pytorch_lora_weights.safetensors")
        assert not any(tensor.any() for name, tensor in best.items() if ".lora_B." in name)
        assert (run.folder / "checkpoints" / "step-000000").is_dir()
    assert late.evaluations == early.evaluations
    assert late.metrics == early.metrics
    assert all(torch.equal(tensor, lora(early.folder)[name]) for name, tensor in lora(late.folder).items())
    assert late.comparison is not None
    assert early.comparison is not None
    assert torch.equal(late.comparison.base.images, early.comparison.base.images)


@pytest.mark.parametrize(
    ("reward", "report_to", "first"),
    [("brightness", "tensorboard", False), ("brightness", "wandb", True), ("threshold(brightness, at=1)", "", True)],
)
def test_a_reward_that_changes_and_hosted_trackers_get_the_base_model_first(
    reward: str, report_to: str, first: bool, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftune.training.trackers.require", lambda *_: None)
    values = SMALL | {"output": str(tmp_path / "run"), "report_to": report_to}
    assert draftune.Trainer(str(pipeline_folder), reward, PROMPTS, **values).validation.base_comes_first is first


def test_a_callback_ends_the_run(pipeline_folder: Path, tmp_path: Path) -> None:
    class Stop(Recorder):
        def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
            super().on_step_end(step, logs)
            self.trainer.should_stop = step == 2

    assert len(trainer(pipeline_folder, tmp_path / "run", Stop()).train().metrics) == 2
    assert lora(tmp_path / "run")


def test_a_callback_that_fails_is_named(pipeline_folder: Path, tmp_path: Path) -> None:
    class Broken(Recorder):
        def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
            raise KeyError("loss")

    other = Recorder()
    with pytest.raises(DraftuneError, match=r"callback Broken\.on_step_end failed: KeyError: 'loss'"):
        trainer(pipeline_folder, tmp_path / "run", Broken(), other).train()
    assert other.events[-1][0] == "end"


def test_a_callback_needs_no_base_class(pipeline_folder: Path, tmp_path: Path) -> None:
    class Plain:
        steps: ClassVar[list[int]] = []

        def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
            self.steps.append(step)

    trainer(pipeline_folder, tmp_path / "run", Plain(), steps=2).train()  # type: ignore[arg-type]
    assert Plain.steps == [1, 2]


def test_objects_in_place_of_names(pipeline_folder: Path, tmp_path: Path) -> None:
    method, reward = draftune.load_method("draft_k(k=1)"), draftune.load_reward("brightness")
    values = {name: value for name, value in SMALL.items() if name != "method"}
    first = draftune.train(
        load_model(pipeline_folder), reward, PROMPTS, method=method, output=str(tmp_path / "objects"), **values
    )
    second = trainer(pipeline_folder, tmp_path / "names").train()
    assert [row["reward"] for row in first.metrics] == [row["reward"] for row in second.metrics]
    assert isinstance(method, draftune.Method)
    assert isinstance(reward, draftune.Reward)


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(AttributeError):
        settings.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates(name: str) -> None:
    """Those of diffusers' schedule, one update later: no update has a learning rate of 0."""
    from diffusers.optimization import get_scheduler

    warmup = 0 if name == "constant" else 3
    settings = Settings(learning_rate=0.02, steps=10, lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=2)
    rates = [learning_rates(settings)(step) for step in range(1, 11)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=11, num_cycles=2)
    expected = []
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx(expected, rel=1e-12)
    if name != "cosine_with_restarts":  # which begins a cycle at the learning rate, and ends one near 0
        assert min(rates) > 0


def test_the_constant_schedule() -> None:
    """Bit for bit the linear warmup to a constant learning rate."""
    constant = {"learning_rate": 3e-4, "steps": 9, "lr_scheduler": "constant_with_warmup"}
    rate = learning_rates(Settings(**constant, lr_warmup_steps=7))
    assert [rate(step) for step in range(1, 10)] == [3e-4 * min(1.0, step / 7) for step in range(1, 10)]
    rate = learning_rates(Settings(**constant))
    assert {rate(step) for step in range(1, 10)} == {3e-4}


def test_schedules_that_do_not_fit() -> None:
    with pytest.raises(DraftuneError, match="lr_scheduler=constant has no warmup"):
        Settings(lr_scheduler="constant", lr_warmup_steps=2)
    with pytest.raises(DraftuneError, match="did you mean 'cosine'"):
        Settings(lr_scheduler="cosin")
    with pytest.raises(DraftuneError, match="lr_scheduler=polynomial"):
        learning_rates(Settings(lr_scheduler="polynomial", learning_rate=1e-9))


def test_a_call_that_failed_before_its_first_update_can_be_repeated(pipeline_folder: Path, tmp_path: Path) -> None:
    """The caller's model keeps neither a LoRA nor the pixel clamp of the run."""
    model = load_model(pipeline_folder)
    clamp, ready = model.pixel_clamp, False

    def reward(images: Tensor, prompts: Any) -> Tensor:
        if not ready:
            raise ValueError("not ready")
        return images.mean((1, 2, 3))

    values = SMALL | {"output": str(tmp_path / "run"), "pixel_clamp": "hard", "steps": 1}
    for broken in ({"num_inference_steps": 2}, {"lora_target_modules": "no_such_layer"}):
        with pytest.raises(DraftuneError):
            draftune.train(model, reward, PROMPTS, **values | broken)
        assert model.pixel_clamp == clamp
        assert not getattr(model.denoiser, "peft_config", {})
    ready = True
    run = draftune.train(model, reward, PROMPTS, **values)
    assert len(run.metrics) == 1
    with pytest.raises(DraftuneError, match="already has a LoRA"):
        draftune.train(model, reward, PROMPTS, **values | {"output": str(tmp_path / "second")})
    assert model.denoiser.peft_config  # the trained LoRA stays


class Cut(draftune.Callback):
    """Interrupt the run after an update's checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, step: int) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def rows(run: draftune.Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "train_seconds"} for row in run.metrics]


def test_schedule_and_ema_resume_bit_for_bit(pipeline_folder: Path, tmp_path: Path) -> None:
    values = {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "ema_decay": 0.7}
    whole = trainer(pipeline_folder, tmp_path / "whole", **values).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(pipeline_folder, tmp_path / "cut", Cut(2), **values).train()
    resumed = trainer(pipeline_folder, tmp_path / "cut", **values).train()
    assert rows(resumed) == rows(whole)
    for name, tensor in lora(tmp_path / "whole").items():
        assert torch.equal(tensor, lora(tmp_path / "cut")[name])
    last = "checkpoints/step-000004"
    first, second = (read_tensors(tmp_path / run / last) for run in ("whole", "cut"))
    assert any(name.startswith("ema/") for name in first)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    # A decaying schedule belongs to the number of updates.
    with pytest.raises(DraftuneError, match=r"steps is 4, not 6.*--allow-changes steps"):
        trainer(pipeline_folder, tmp_path / "cut", **(values | {"steps": 6}))
    with pytest.raises(DraftuneError, match="lr_scheduler"):
        trainer(pipeline_folder, tmp_path / "cut", **(values | {"lr_scheduler": "linear", "steps": 6}))


def test_ema(pipeline_folder: Path, tmp_path: Path) -> None:
    """The average is the closed form of diffusers' rule, and what is saved; training itself does not change."""

    class Weights(draftune.Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_train_begin(self, trainer: draftune.Trainer) -> None:
            self.model = trainer.model

        def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
            self.seen.append({name: p.detach().clone() for name, p in lora_parameters(self.model).items()})

    decay, weights, plain = 0.2, Weights(), Weights()
    run = trainer(pipeline_folder, tmp_path / "ema", weights, ema_decay=decay).train()
    other = trainer(pipeline_folder, tmp_path / "plain", plain).train()
    assert rows(run) == rows(other)
    # diffusers: the first step copies, step i + 1 keeps min(decay, (1 + i) / (10 + i)) of the average.
    kept = [0.0] + [min(decay, (1 + i) / (10 + i)) for i in range(1, len(weights.seen))]
    assert max(kept) == decay
    shares = [(1 - kept[i]) * math.prod(kept[i + 1 :]) for i in range(len(kept))]
    assert sum(shares) == pytest.approx(1)
    averaged = lora_parameters(weights.model)
    for name, parameter in averaged.items():
        expected = sum(share * seen[name] for share, seen in zip(shares, weights.seen, strict=True))
        assert torch.allclose(parameter, torch.as_tensor(expected), atol=1e-6)
    saved = sorted(float(tensor.norm()) for tensor in lora(run.folder).values())
    assert saved == pytest.approx(sorted(float(p.norm()) for p in averaged.values()), rel=1e-6)
    assert saved != pytest.approx(sorted(float(t.norm()) for t in lora(other.folder).values()), rel=1e-4)
    raw = read_tensors(run.folder / "checkpoints" / "step-000004")
    assert all(torch.equal(raw[f"lora/{name}"], tensor) for name, tensor in weights.seen[-1].items())


def test_adamw_8bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DraftuneError, match=r"optimizer=adamw_8bit needs bitsandbytes.*draftune\[bitsandbytes\]"):
        make_optimizer("adamw_8bit", [weight], 0.1)
    fake: Any = ModuleType("bitsandbytes")
    fake.optim = SimpleNamespace(AdamW8bit=torch.optim.AdamW)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    defaults = {"adamw_8bit": {"beta1": 0.5, "weight_decay": 0.3}}
    group = make_optimizer("adamw_8bit(weight_decay=0.2)", [weight], 0.1, defaults).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.5, 0.999), 0.2)


def test_optimizer_state_with_numbers() -> None:
    """As 8-bit AdamW has them: a step that must stay an int, and a nested dictionary."""
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    first, second = (torch.optim.SGD(weights, lr=0.1) for _ in range(2))
    first.state[weights[1]] = {"step": 7, "moment": torch.arange(3.0), "packed": {"scale": torch.ones(1)}}
    load_optimizer(second, ["a", "b"], optimizer_tensors(first, ["a", "b"]))
    state = second.state[weights[1]]
    assert type(state["step"]) is int
    assert (state["step"], state["moment"].tolist(), state["packed"]["scale"].tolist()) == (7, [0, 1, 2], [1])


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"method": "draft_k(k=1)", "gradient_checkpointing": "blocks"}, marks=pytest.mark.slow),
        pytest.param({"method": "draft_k(k=2)", "gradient_checkpointing": "denoiser"}, marks=pytest.mark.slow),
        {"method": "kl(draft_k(k=2))", "gradient_checkpointing": "none"},
    ],
)
def test_compile(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """The compiled denoiser has the same gradients, and the LoRA's tensors have the same names."""
    monkeypatch.setattr(placement, "COMPILE_BACKEND", "aot_eager" if "kl" not in values["method"] else "eager")
    values = values | {"max_grad_norm": 0.0}
    plain, compiled = (trainer(pipeline_folder, tmp_path / str(on), compile=on, **values) for on in (False, True))
    # The LoRA's B is 0 at first: with random weights, A has a gradient too.
    gradients: list[dict[str, Tensor]] = []
    for made in (plain, compiled):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in made.train_step.parameters.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made.train_step.run(1)
        gradients.append({name: p.grad.clone() for name, p in made.train_step.parameters.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == plain.train_step.parameters.keys()
    for name, gradient in gradients[0].items():
        assert gradient.any()
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7), name


def test_a_compiled_run(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "COMPILE_BACKEND", "eager")
    made = trainer(pipeline_folder, tmp_path / "compiled", compile=True, steps=2)
    assert made.model.denoiser._compiled_call_impl is not None
    run, plain = made.train(), trainer(pipeline_folder, tmp_path / "plain", steps=2).train()
    assert lora(run.folder).keys() == lora(plain.folder).keys()
    assert [row["reward"] for row in run.metrics] == pytest.approx([row["reward"] for row in plain.metrics], rel=1e-4)
    assert made.model.denoiser._compiled_call_impl is None


class FakeTracker(ModuleType):
    """A module in place of wandb or trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.options: dict[str, Any] = {}
        self.finished = 0
        self.Image = lambda image, caption: (image.size, caption)
        self.Table = lambda columns, data: [columns, *data]

    def init(self, **options: Any) -> FakeTracker:
        self.options = options
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.rows.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1


def test_hosted_trackers(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = {name: FakeTracker(name) for name in ("wandb", "trackio")}
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    (tmp_path / "eval.txt").write_text("a fish\n")
    values = {"report_to": "wandb, trackio", "steps": 1, "eval_prompts": str(tmp_path / "eval.txt"), "eval_rewards": ""}
    trainer(pipeline_folder, tmp_path / "run", **values).train()
    for tracker in trackers.values():
        assert tracker.options["project"] == "draftune"
        assert tracker.options["name"] == "run"
        assert tracker.options["config"]["learning_rate"] == 0.01
        assert [step for step, _ in tracker.rows] == [0, 0, 1, 1, 1]
        shown, before, update, images, after = (row for _, row in tracker.rows)
        assert {"eval/brightness"} <= before.keys() & after.keys()
        assert {"reward", "grad_norm", "learning_rate"} <= update.keys()
        for row in (shown, images):
            header, (prompt, score, image) = row["samples/table"][:2]
            assert header == ["prompt", "reward", "image"]
            assert row["samples/00"] == image == (image[0], f"{prompt} ({score:.3g})")
        assert tracker.finished == 1
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_wandb_offline(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer(pipeline_folder, tmp_path / "run", report_to="wandb", steps=1).train()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert len(list((folder / "files" / "media" / "images" / "samples").glob("00_*.png"))) == 2
    table = json.loads(next((folder / "files" / "media" / "table" / "samples").glob("table_*.json")).read_text())
    assert table["columns"] == ["prompt", "reward", "image"]


def test_tensorboard_shows_the_samples(pipeline_folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = trainer(pipeline_folder, tmp_path / "run", report_to="tensorboard", steps=1)
    made.train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = [f"samples/{i:02d} {prompt}" for i, prompt in enumerate(made.validation.shown)]
    assert events.Tags()["images"] == names
    assert [event.step for event in events.Images(names[0])] == [0, 1]


def test_which_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from draftune.training import trackers as module

    assert module.installed_trackers(Settings()) == ["tensorboard"]
    assert module.installed_trackers(Settings(report_to="none")) == []
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert module.installed_trackers(Settings()) == []
    with pytest.raises(DraftuneError, match="unknown tracker in report_to 'wandbb': did you mean 'wandb'"):
        Settings(report_to="tensorboard,wandbb")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(DraftuneError, match=r"report_to=trackio needs trackio.*draftune\[trackio\]"):
        module.installed_trackers(Settings(report_to="trackio"))


def test_a_resumed_run_discards_later_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        board = TensorBoard(tmp_path, done)
        for step in steps:
            board.log({"reward": 10.0 * done + step}, step)
        board.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 1), (2, 12), (3, 13), (4, 14)]


def test_a_tracker_that_fails_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    class Full(FakeTracker):
        def log(self, metrics: dict[str, float], step: int) -> None:
            raise OSError(28, "No space left on device")

    class Offline(FakeTracker):
        def log(self, metrics: dict[str, float], step: int) -> None:
            raise RuntimeError("no connection")  # as from the client of a service

    trackers, other = Trackers([]), FakeTracker("other")
    trackers.trackers = {"full": Full("full"), "offline": Offline("offline"), "other": other}
    trackers.on_step_end(1, {"reward": 1.0, "best": True, "stderr": {}})
    trackers.on_step_end(2, {"reward": 2.0})
    assert other.rows == [(1, {"reward": 1.0}), (2, {"reward": 2.0})]
    assert caplog.text.count("the tracker full is stopped: No space left on device") == 1
    assert caplog.text.count("the tracker offline is stopped: no connection") == 1


HIDDEN = ("matplotlib", "tensorboard", "ftfy", "wandb", "trackio", "bitsandbytes")


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the optional packages. psutil stays importable for accelerate, which needs it."""
    for name in list(sys.modules):
        if name.partition(".")[0] in HIDDEN:
            monkeypatch.delitem(sys.modules, name)
    for name in HIDDEN:
        monkeypatch.setitem(sys.modules, name, None)
    return


def test_training_without_the_optional_packages(
    pipeline_folder: Path, tmp_path: Path, hidden: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from draftune.training import trackers as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    (tmp_path / "prompts.txt").write_text("a fish\n")
    command = ["train", "--model", str(pipeline_folder), "--reward", "brightness"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "run")]
    names = ("steps", "method", "num_inference_steps", "num_log_prompts", "device")
    command += [word for name in names for word in (f"--{name.replace('_', '-')}", str(SMALL[name]))]
    assert main(command) == 0
    assert lora(tmp_path / "run")
    assert '"memory": "unknown"' in (tmp_path / "run" / "environment.json").read_text()
    assert main(["sweep", str(tmp_path / "run"), "--scales", "0,1", "--eval-rewards", "saturation"]) == 0
    assert (tmp_path / "run" / "sweep" / "sweep.json").exists()
    assert not (tmp_path / "run" / "sweep" / "curve.png").exists()


def test_a_missing_package_is_one_line(hidden: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from draftune.training.memory_check import free_memory
    from draftune.utils.plotting import figure

    with pytest.raises(DraftuneError, match=r"the reward hpsv2 needs ftfy: pip install 'draftune\[hpsv2\]'"):
        draftune.load_reward("hpsv2")
    with pytest.raises(DraftuneError, match=r"needs matplotlib: pip install 'draftune\[plots\]'"):
        figure(1, 1)
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(DraftuneError, match=r"needs psutil: pip install 'draftune\[preflight\]'"):
        free_memory(torch.device("cpu"))
    assert require("math", "counting", "none") is math


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu", "device must be auto, cpu, mps, cuda or cuda:N, not 'tpu'"), ("cuda:7", "device=cuda:7 is not available")],
)
def test_devices_that_are_not_there(pipeline_folder: Path, tmp_path: Path, device: str, message: str) -> None:
    with pytest.raises(DraftuneError, match=message):
        trainer(pipeline_folder, tmp_path / "run", device=device)


def test_the_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    titles = ["model", "reward", "method", "optimization", "LoRA", "sampling", "device and memory"]
    places = [text.index(f"\n{title}:\n") for title in [*titles, "evaluation and logging", "output"]]
    assert places == sorted(places)
    assert "(at least 1; default: 4)" in " ".join(text.split())


def test_public_names() -> None:
    names = {"Batch", "Callback", "Method", "Reward", "Run", "Schedule", "Trainer", "train"}
    assert names <= set(draftune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        draftune.nothing  # type: ignore[attr-defined]  # noqa: B018
