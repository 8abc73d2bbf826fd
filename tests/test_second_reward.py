"""A second reward on top of a first: what is kept, what is saved, what is measured, and two LoRAs made one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_gradients import GRIDS, NOISE, Network, batch_of
from test_resume import PROMPTS, cut_off_after, lora, rows
from test_resume import train as noisily_trained
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.experimental.distill import balanced_weights
from draftune.experimental.retention import Retention
from draftune.lora import (
    FILE_NAME,
    FROZEN_ADAPTER,
    adapted_by,
    add_lora,
    load_lora,
    lora_parameters,
    save_lora,
    set_lora_scale,
)
from draftune.methods import DraftK, Method, load_method
from draftune.models import load_model
from draftune.report import collect
from draftune.runs.load import load_for_sampling, read_deltas
from draftune.sampling.sampler import Denoiser, rollout
from draftune.sampling.schedule import Prediction, Step
from draftune.training import Run
from draftune.training.trainer import Trainer
from helpers.draws import injected
from helpers.errors import mentions, raises
from helpers.foster_toy import outcomes


def test_the_weights_of_groups() -> None:
    """FOSTER's weights (arXiv 2204.04662), by its formula."""
    assert balanced_weights([200] * 10 + [500] * 10, 0.98)[::10] == pytest.approx([1.00885, 0.99115], abs=1e-5)
    assert balanced_weights([22] * 90 + [500] * 10, 0.94)[::90] == pytest.approx([1.02631, 0.76323], abs=1e-5)
    assert balanced_weights([3, 500], 0.0) == [1, 1]
    assert balanced_weights([1, 3], 1 - 1e-9) == pytest.approx([1.5, 0.5])
    for counts, beta in (([3, 0], 0.9), ([], 0.9), ([3], 1.0), ([3], -0.1)):
        with raises(DraftuneError):
            balanced_weights(counts, beta)


def test_the_toy_of_ten_classes() -> None:
    """FOSTER (arXiv 2204.04662) on a toy: accuracies on old and new classes, four seeds each."""
    found = outcomes()
    told = {
        "fine-tuned": (0.63, 0.97),
        "boosted": (0.96, 0.88),
        "compressed": (0.94, 0.79),
        "compressed plainly": (0.92, 0.87),
    }
    # Clusters and initial weights are other random ones: the fine-tuned net keeps most, .68 of the old classes.
    for name, pair in told.items():
        assert found[name] == pytest.approx(pair, abs=0.05 if name == "fine-tuned" else 0.03), name
    mean = {name: sum(pair) / 2 for name, pair in found.items()}
    assert mean["boosted"] >= mean["fine-tuned"] + 0.08
    assert found["boosted"][0] >= 0.9
    assert found["compressed"][0] > found["compressed plainly"][0]
    # Weighing classes by their number keeps more of the old ones, and costs more of the new.
    assert mean["compressed"] < mean["compressed plainly"]


def train(model: Path, output: Path, reward: Any = "brightness", **values: Any) -> Run:
    return prepared(model, output, reward, **values).train()


def prepared(model: Path, output: Path, reward: Any = "brightness", **values: Any) -> Trainer:
    (output.parent / "prompts.txt").write_text("a fish\na tree\n")
    settings = {
        "steps": 3,
        "method": "draft_k(k=1)",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "log_images_steps": 0,
        "num_log_prompts": 1,
        "batch_size": 2,
        "prompts": PROMPTS,
        "eval_prompts": str(output.parent / "prompts.txt"),
        "num_validation_images": 2,
        "learning_rate": 0.02,
        "lora_rank": 2,
    }
    return Trainer(str(model), reward, output=str(output), **(settings | values))


@pytest.fixture(scope="module")
def first(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose LoRA does something."""
    return train(pipeline_folder, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def kept(tmp_path: Path) -> str:
    (tmp_path / "kept.txt").write_text("a horse\na house\na cow\n")
    return str(tmp_path / "kept.txt")


def predicted(denoise: Denoiser, x: Tensor, step: Step) -> Tensor:
    with torch.no_grad():
        return denoise(x, step).noise


def test_a_run_goes_on_where_the_first_one_ended(
    first: Run, pipeline_folder: Path, tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = prepared(
        pipeline_folder,
        tmp_path / "second",
        "symmetry",
        init_lora=str(first.folder),
        retain_prompts=kept,
        retain_weight=0.1,
    )
    before = {n: p.clone() for n, p in trainer.model.denoiser.named_parameters() if f".{FROZEN_ADAPTER}." in n}
    second = trainer.train()
    after = dict(trainer.model.denoiser.named_parameters())
    assert before
    assert all(torch.equal(after[name], tensor) and not after[name].requires_grad for name, tensor in before.items())
    assert all(parameter.grad is None for name, parameter in after.items() if name in before)
    # The base is the first run's model, whose reward is measured at every evaluation on the prompts of its own.
    start, end = second.evaluations
    assert start["retained/brightness"] == pytest.approx(first.evaluations[-1]["brightness"], abs=1e-6)
    assert start["denoiser_mse_from_base"] == start["pixel_l1_from_base"] == 0
    assert end["denoiser_mse_from_base"] > 0
    assert abs(end["symmetry"] - start["symmetry"]) > 1e-4
    assert second.comparison is not None
    lost = end["retained/brightness"] - start["retained/brightness"]
    assert f"({lost:+.3f})" in second.comparison.table()
    # What is saved is the sum: of the pipeline itself it makes what was trained.
    saved, _ = load_for_sampling(str(second.folder))
    schedule = trainer.schedule
    ours, theirs = (m.denoisers_for(["a dog"], schedule, 3.0) for m in (trainer.model, saved))
    x = saved.noise(torch.Generator().manual_seed(1), 1)
    for step in schedule.steps:
        torch.testing.assert_close(predicted(ours[0], x, step), predicted(theirs[0], x, step), atol=1e-5, rtol=1e-4)
        difference = (predicted(ours[0], x, step) - predicted(ours[1], x, step)).abs().max()
        assert difference > 1e-3
    assert {layer.rank for layer in read_deltas(second.folder).layers.values()} == {4}
    # And the base of the continued model is, bit for bit, the first one's model.
    alone, _ = load_for_sampling(str(first.folder))
    assert torch.equal(predicted(ours[1], x, step), predicted(alone.denoiser_for(["a dog"], schedule, 3.0), x, step))
    page = collect(second.folder)
    assert ["brightness", "earlier reward"] in [row[:2] for row in page["scores"]["rows"]]
    assert ["Continued from", str(first.folder)] in page["facts"]
    assert ["retained/brightness", "brightness"] in [[chart["key"], chart["title"]] for chart in page["charts"]]


def test_the_base_leaves_no_trace(pipeline_folder: Path) -> None:
    """It is the model that never had a LoRA, bit for bit, and what is trained stays trained."""
    bare, model = load_model(str(pipeline_folder)), load_model(str(pipeline_folder))
    add_lora(model, 2)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter += 0.1
    trained = list(lora_parameters(model))
    schedule = bare.schedule(3)
    x = bare.noise(torch.Generator().manual_seed(1), 1)
    denoise, base = model.denoisers_for(["a dog"], schedule, 3.0)
    plain, step = bare.denoiser_for(["a dog"], schedule, 3.0), schedule.steps[0]
    assert torch.equal(predicted(base, x, step), predicted(plain, x, step))
    assert not torch.equal(predicted(denoise, x, step), predicted(plain, x, step))
    assert list(lora_parameters(model)) == trained
    with pytest.raises(ValueError, match="stop"), adapted_by(model.denoiser, FROZEN_ADAPTER):
        raise ValueError("stop")
    assert not torch.equal(predicted(denoise, x, step), predicted(plain, x, step))


def test_a_scale_leaves_the_kept_one_alone(first: Run, pipeline_folder: Path, tmp_path: Path) -> None:
    trainer = prepared(pipeline_folder, tmp_path / "second", init_lora=str(first.folder))
    model = trainer.model
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter += 0.1
    denoise, base = model.denoisers_for(["a dog"], trainer.schedule, 3.0)
    x, step = model.noise(torch.Generator().manual_seed(1), 1), trainer.schedule.steps[0]
    set_lora_scale(model, 0.0)
    assert torch.equal(predicted(denoise, x, step), predicted(base, x, step))
    assert all(f".{FROZEN_ADAPTER}." not in name for name in lora_parameters(model))


class Drift:
    """A denoiser and its base, on kept prompts that have noise of their own."""

    def __init__(self) -> None:
        self.schedule = GRIDS["clean"]
        self.network, self.before = Network(), Network()
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator(3)))

    def through(self, network: Network) -> Denoiser:
        def call(x: Tensor, step: Step) -> Prediction:
            return self.schedule.to_prediction(network(x, step.timestep), x, step)

        return call

    def batch(self, seed: int = 0) -> Any:
        denoise, base = self.through(self.network), self.through(self.before)
        batch = batch_of(denoise, self.schedule, base, seed=seed)
        batch.retention_batch = batch_of(denoise, self.schedule, base, noise=NOISE.flip(0) + 1)
        return batch

    def gradient(self, method: Method, *batches: Any) -> Tensor:
        self.network.zero_grad()
        for losses in method.losses_per_step(iter(batches)):
            for loss in losses:
                loss.backward()
        return torch.cat([p.grad.flatten() for p in self.network.parameters() if p.grad is not None])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", [DraftK(1), load_method("kl(draft_k(k=2), beta=0.3)")])
def test_what_is_kept_is_added_once_for_each_batch(method: Method) -> None:
    drift = Drift()
    with injected(randint=[[0], [2]]) as ranges:
        ours = drift.gradient(Retention(method, 0.7), drift.batch(0), drift.batch(1))
    assert ranges == [(0, len(drift.schedule))] * 2
    wanted = drift.gradient(method, drift.batch(0), drift.batch(1))
    for made in (0, 2):
        steps = drift.schedule.steps
        with torch.no_grad():
            x = rollout(drift.through(drift.before), steps[:made], NOISE.flip(0) + 1)
            before = drift.before(x, steps[made].timestep)
        drift.network.zero_grad()
        (0.7 * (drift.network(x, steps[made].timestep) - before).square().mean()).backward()
        wanted += torch.cat([p.grad.flatten() for p in drift.network.parameters() if p.grad is not None])
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_keeping_keeps(first: Run, pipeline_folder: Path, tmp_path: Path, kept: str) -> None:
    """On the kept prompts a firm hand leaves the denoiser nearer to where it was, at the cost of the second reward."""
    ends = {}
    for weight in (0.0, 30.0):
        values = {"init_lora": str(first.folder), "retain_prompts": kept, "retain_weight": weight, "steps": 4}
        run = train(pipeline_folder, tmp_path / f"{weight}", num_validation_images=1, **values)
        ends[weight] = run.evaluations[-1]
    assert ends[30.0]["denoiser_mse_from_base"] < 0.5 * ends[0.0]["denoiser_mse_from_base"]
    assert ends[30.0]["brightness"] < ends[0.0]["brightness"]


def test_a_continued_run_goes_on_bit_for_bit(first: Run, pipeline_folder: Path, tmp_path: Path, kept: str) -> None:
    """Cut off between two updates that share the paths of their batches, and of what is kept."""
    values = {
        "init_lora": str(first.folder),
        "retain_prompts": kept,
        "retain_weight": 0.1,
        "steps": 4,
        "checkpointing_steps": 1,
    }
    values |= {"method": "draft_k(k=1)", "lora_rank": 2, "eval_prompts": "", "mixed_precision": "bf16"}
    values |= {"prefix_reuse_steps": 2, "gradient_accumulation_steps": 2, "log_gradient_snr": True}
    whole = noisily_trained(pipeline_folder, tmp_path / "whole", **values)
    with pytest.raises(KeyboardInterrupt):
        noisily_trained(pipeline_folder, tmp_path / "cut", cut_off_after(8), **values)
    assert len(rows(tmp_path / "cut", "metrics.jsonl")) == 3
    resumed = noisily_trained(pipeline_folder, tmp_path / "cut", **values)
    ours, theirs = lora(whole.folder), lora(resumed.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rows(whole.folder, "metrics.jsonl") == rows(resumed.folder, "metrics.jsonl")


def test_a_policy_keeps_too(first: Run, pipeline_folder: Path, tmp_path: Path, kept: str) -> None:
    """What is kept asks for no reward."""
    values = {"init_lora": str(first.folder), "retain_prompts": kept, "retain_weight": 1.0, "eval_prompts": ""}
    run = train(pipeline_folder, tmp_path / "second", "symmetry", method="ddpo(min_count=2)", steps=2, **values)
    assert all(row["grad_norm"] > 0 for row in run.metrics)
    assert [row["reward_queries"] for row in run.metrics] == [2, 4]


def test_another_first_lora_is_another_run(first: Run, pipeline_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(pipeline_folder))
    add_lora(model, 2)
    save_lora(model, tmp_path / "lora")
    train(pipeline_folder, tmp_path / "second", init_lora=str(tmp_path / "lora"), steps=1)
    assert "retained/brightness" not in rows(tmp_path / "second", "evaluations.jsonl")[0]  # no run says what it was for
    load_lora(again := load_model(str(pipeline_folder)), first.folder)
    save_lora(again, tmp_path / "lora")
    with raises(DraftuneError, "init_lora", tmp_path / "lora"):
        train(pipeline_folder, tmp_path / "second", init_lora=str(tmp_path / "lora"), steps=2)


def test_the_command(
    first: Run, pipeline_folder: Path, tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--prompts animals --steps 2 --method draft_k(k=1) --num-inference-steps 3 --log-images-steps 0"
    few += " --num-validation-images 2"
    few += " --reward symmetry --device cpu --guidance-scale 3"
    given = ["--model", str(pipeline_folder), *few.split()]
    folder = tmp_path / "second"
    asked = ["train", "--init-lora", str(first.folder), "--retain-prompts", kept, "--eval-prompts", kept, *given]
    assert main([*asked, "--output", str(folder)]) == 0
    said = capsys.readouterr()
    assert "retained/brightness" in said.out
    assert mentions(said.err, "--retain-weight 3 --reward-normalization-samples 32")
    start = rows(folder, "evaluations.jsonl")[0]["retained/brightness"]
    assert start == pytest.approx(first.evaluations[-1]["brightness"], abs=1e-6)


def test_mistakes_are_named_before_anything_is_loaded(
    first: Run, pipeline_folder: Path, tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--model", str(pipeline_folder), "--output", str(tmp_path / "run")]
    arguments += ["--reward", "brightness", "--prompts", "animals", "--device", "cpu"]
    for more, message in (
        (["--retain-prompts", kept], "retain_prompts --init-lora"),
        (["--init-lora", str(tmp_path / "none")], "LoRA none"),
        (["--init-lora", str(first.folder), "--retain-prompts", "no-set"], "no-set"),
        (["--init-lora", str(first.folder), "--retain-weight", "-1"], "retain_weight -1 0"),
        (["--init-lora", str(first.folder), "--model", "emoji"], f"{pipeline_folder} emoji"),
    ):
        assert main([*arguments, *more]) == 2
        said = capsys.readouterr().err
        assert mentions(said, message), said
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_can_not_be_measured_is_said(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def mine(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))

    made = train(pipeline_folder, tmp_path / "first", mine, steps=1, num_validation_images=1)
    caplog.clear()
    prepared(pipeline_folder, tmp_path / "second", init_lora=str(made.folder), retain_prompts="animals")
    assert mentions(caplog.text, "reward 'mine'")


def test_another_grid_is_said(
    first: Run, pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared(pipeline_folder, tmp_path / "same", init_lora=str(first.folder))
    assert "timestep_spacing" not in caplog.text
    prepared(pipeline_folder, tmp_path / "other", init_lora=str(first.folder), timestep_spacing="linspace")
    assert mentions(caplog.text, "timestep_spacing trailing")


def test_best_by_the_kept_reward(first: Run, pipeline_folder: Path, tmp_path: Path) -> None:
    values = {
        "init_lora": str(first.folder),
        "metric_for_best_model": "retained/brightness",
        "num_validation_images": 1,
        "validation_steps": 1,
    }
    run = train(pipeline_folder, tmp_path / "second", "symmetry", **values)
    column = [row["retained/brightness"] for row in run.evaluations]
    assert [row["best"] for row in run.evaluations][column.index(max(column))]
    with raises(DraftuneError, "'retained/brightnes' 'retained/brightness'"):
        train(
            pipeline_folder,
            tmp_path / "other",
            "symmetry",
            **(values | {"metric_for_best_model": "retained/brightnes"}),
        )


def test_a_normalised_reward_and_its_forgetting_are_found_by_name(pipeline_folder: Path, tmp_path: Path) -> None:
    values = {"reward_normalization_samples": 4, "num_validation_images": 1, "steps": 1}
    one = train(pipeline_folder, tmp_path / "first", "brightness", metric_for_best_model="brightness", **values)
    (weighted,) = [key for key in one.evaluations[0] if key.endswith("*brightness")]
    assert one.evaluations[0]["brightness"] < 1 < one.evaluations[0][weighted]
    values |= {"init_lora": str(one.folder), "metric_for_best_model": "symmetry + 0.1*retained/brightness"}
    two = train(pipeline_folder, tmp_path / "second", "symmetry", **values)
    assert two.evaluations[0]["retained/brightness"] == pytest.approx(one.evaluations[-1]["brightness"])


def test_nothing_is_not_distilled(thick: Path, tmp_path: Path, kept: str) -> None:
    draftune.merge_loras([(thick, 0.0)], tmp_path / "nothing")
    with raises(DraftuneError, "LoRA nothing"):
        draftune.distill_lora(str(tmp_path / "nothing"), [kept], tmp_path / "small", 2, device="cpu")


@pytest.fixture
def thick(first: Run, pipeline_folder: Path, tmp_path: Path) -> Path:
    """A run's LoRA of rank 4 that does much."""
    model = load_model(str(pipeline_folder))
    add_lora(model, 4, alpha=8)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator(len(parameter))))
    save_lora(model, tmp_path / "thick" / "lora")
    shutil.copy(first.folder / "config.yaml", tmp_path / "thick")
    return tmp_path / "thick"


def changes(source: Path) -> Iterator[tuple[str, Tensor]]:
    for name, layer in read_deltas(source).layers.items():
        yield name, layer.change


def test_a_truncated_lora_is_the_nearest(thick: Path) -> None:
    whole = read_deltas(thick)
    short = whole.truncate_rank(2)
    for name, layer in short.layers.items():
        assert layer.rank == 2
        values = torch.linalg.svdvals(whole.layers[name].change.double())
        left = (whole.layers[name].change - layer.change).double().norm()
        assert float(left) == pytest.approx(float(values[2:].norm()), rel=1e-4)
    same = whole.truncate_rank(4)
    for name, layer in same.layers.items():
        torch.testing.assert_close(layer.change, whole.layers[name].change, atol=1e-5, rtol=1e-4)


def test_a_distilled_lora(
    thick: Path, pipeline_folder: Path, tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "small"
    made = draftune.distill_lora(
        str(thick),
        [kept, ["a fish"]],
        output,
        2,
        num_trajectories=10,
        steps_per_trajectory=3,
        batch_size=2,
        learning_rate=0.01,
        device="cpu",
    )
    left = made.differences
    assert left["distilled"] < 0.7 * left["truncated"]
    assert left["truncated"] < left["no LoRA"]
    assert {layer.rank for layer in read_deltas(output).layers.values()} == {2}
    with safe_open(output / FILE_NAME, "pt") as file:
        assert file.metadata()["distilled_from"] == f"{thick}, rank 2"
    # What the file holds is what was measured: the truncated one, found again.
    load_lora(load_model(str(pipeline_folder)), output)
    arguments = ["experimental", "distill", str(thick), "--rank", "2", "--prompts", kept, "--device", "cpu"]
    arguments += ["--num-trajectories", "1", "--steps-per-trajectory", "1"]
    assert main([*arguments, "--learning-rate", "0", "--output", str(tmp_path / "cut")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert mentions(said[0], thick)
    assert said[2].split()[1:] == said[3].split()[1:]
    short = read_deltas(thick).truncate_rank(2).layers
    for name, change in changes(tmp_path / "cut"):
        torch.testing.assert_close(change, short[name].change, atol=1e-5, rtol=1e-4)
    # Into its own folder it may be written again, into no other.
    assert main([*arguments, "--output", str(tmp_path / "cut")]) == 0
    for more, message in (
        (["--output", str(thick)], f"{thick} --output"),
        (["--output", str(tmp_path / "new"), "--rank", "4"], "rank 4"),
        (["--output", str(tmp_path / "new"), "--mixed-precision", "fp16"], "fp16"),
        (["--output", str(tmp_path / "new"), "--group-balance", "1"], "group_balance 0 1"),
        (["--output", str(tmp_path / "new"), "--prompts", "no-set"], "no-set"),
        (["--output", str(tmp_path / "new"), "--num-trajectories", "0"], "--num-trajectories 0"),
    ):
        capsys.readouterr()
        assert main([*arguments, *more]) == 2
        assert mentions(capsys.readouterr().err, message)
    assert not (tmp_path / "new").exists()


def test_the_sum_of_different_layers_and_alphas(first: Run, pipeline_folder: Path, tmp_path: Path) -> None:
    """Layers that only one of the two changes, and an alpha that is not the rank."""
    values = {"init_lora": str(first.folder), "lora_target_modules": "to_q,conv_in", "lora_alpha": 3.0, "lora_rank": 3}
    second = train(pipeline_folder, tmp_path / "second", **values, steps=2)
    both, one = read_deltas(second.folder).layers, read_deltas(first.folder).layers
    assert "unet.conv_in" in both
    assert "unet.conv_in" not in one
    assert both["unet.conv_in"].change.abs().max() > 0
    untouched = next(name for name in one if name.endswith("to_v"))
    torch.testing.assert_close(both[untouched].change, one[untouched].change)
    assert set(load_file(tmp_path / "second" / "lora" / FILE_NAME)) == set(
        load_file(tmp_path / "second" / "best" / FILE_NAME)
    )
