"""The measured experiments: jobs that processes share, reports of every experiment, and real runs."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftune.errors import DraftuneError
from draftune.guidance.sample import sample_guided
from draftune.models import load_model
from draftune.prompts import load_prompts
from draftune.settings import Settings
from draftune.utils.images import save_image, to_pil
from experiments import (
    few_steps,
    guidance,
    lora_merging,
    lv_samples,
    over_optimization,
    sample_efficiency,
    second_reward,
    taste,
    truncation_depth,
)
from experiments.__main__ import EXPERIMENTS, NAMES, main
from experiments.budget import FULL, TINY
from experiments.examples import copy_examples, example_images
from experiments.experiment import Job, Panel, curve_job, estimate, work
from experiments.report import plot, points, read_csv, write_rows
from experiments.runner import DRAFT_1, DRAFT_LV, ExperimentRunner, Row, RunSpec, spaced

RESULTS = Path(__file__).parent.parent / "results"


class FakeRunner(ExperimentRunner):
    """Scores from a function of the run and the update, instead of training; other measurements by their job's name."""

    def __init__(self, folder: Path, scores: Callable[[RunSpec, int], Row], **measured: Callable[[str], Row]) -> None:
        super().__init__(folder, replace(FULL, seeds=3, ddpo_images=6400), folder / "real")
        self.function, self.other = scores, measured

    def metrics(self, spec: RunSpec) -> list[dict[str, Any]]:
        images = spec.settings.get("batch_size", 4) * spec.settings.get("gradient_accumulation_steps", 1)
        terms = 3 if spec.method == DRAFT_LV else 1
        return [{"reward_queries": terms * images * (i + 1), "grad_norm": 1.0 + spec.seed} for i in range(spec.steps)]

    def scores(self, spec: RunSpec, lora: Path | None, update: int = 0) -> Row:
        noise = np.random.default_rng([spec.seed, update, len(spec.name)]).normal(0, 0.01)
        row = {"reward": 4.0 + noise, "p_3d": 0.2, "name_accuracy": 1.0, "diversity": 0.4}
        return row | self.function(spec, update if lora else 0)

    def cost(self, method: str, batch_size: int = 4) -> dict[str, float]:
        return {"seconds": 0.5 if "k=1" in method else 2.0, "peak_mb": 50.0}

    def seconds_per_image(self) -> float:
        return 0.25

    def cached(self, name: str, measure: Callable[[], Any], wait: bool = True) -> Any:
        kind = next((key for key in self.other if name.startswith(f"job {key.replace('_', ' ')}")), None)
        return super().cached(name, (lambda: self.other[kind](name)) if kind else measure, wait)


def rising(spec: RunSpec, update: int) -> Row:
    """Return scores that rise with the updates while the judge's fall; those of DDPO rise slowly."""
    speed = 0.02 if spec.method.startswith("ddpo") else 1.2 if spec.method == DRAFT_LV else 1.0
    gain = speed * update / 20 * (1 + 0.02 * spec.seed)
    return {
        "reward": 4 + gain,
        "p_3d": 0.2 + 0.01 * gain,
        "name_accuracy": 1 - 0.02 * gain**2,
        "diversity": 0.4 - 0.01 * gain,
    }


def seed_of(name: str) -> int:
    return int(name.rpartition("seed=")[2])


def fake_variance(name: str) -> list[Row]:
    grid, _, reward = name.removeprefix("job lv variance ").rpartition(" seed=")[0].rpartition(" ")
    share = (0.3 if grid == "leading" else 0.1) + 0.01 * seed_of(name)
    row = {"grid": grid, "loss": reward, "seed": seed_of(name), "within": share, "between": 1 - share}
    return [row | {"share": share, "variance_ratio": 1 - 2 / 3 * share}]


def fake_scales(name: str) -> list[Row]:
    scores = [{"reward": 4 + 4 * s, "p_3d": 0.2, "name_accuracy": 1 - 0.02 * s, "diversity": 0.4} for s in (0, 0.5, 1)]
    rows = zip((0, 0.5, 1), scores, strict=True)
    return [
        {"remedy": "LoRA scale", "seed": seed_of(name), "update": int(100 * s), "scale": s, **row} for s, row in rows
    ]


def fake_grid(name: str) -> list[Row]:
    return [
        {
            "seed": seed_of(name),
            "style_weight": a,
            "orange_weight": b,
            "reward": 4 + 2 * a - b,
            "color": 0.1 * b - 0.02 * a,
        }
        | {"p_3d": 0.5, "name_accuracy": 0.9, "diversity": 0.3}
        for a in lora_merging.WEIGHTS
        for b in lora_merging.WEIGHTS
    ]


def fake_guidance(name: str) -> list[Row]:
    seed, variant = seed_of(name), name.removeprefix("job guidance ").rpartition(" seed=")[0]
    variants = {"best of N": ["best of 1", "best of 9"], "LoRA": [guidance.LORA]}.get(variant, [variant])
    variants += [guidance.TRAINED_LORA] if variant == guidance.TRAINED else []
    return [
        {"variant": v, "calls": 180 if "9" in v else 20, "seed": seed, "reward": 4 + i + 0.1 * seed, "p_3d": 0.5}
        | {"name_accuracy": 1.0, "diversity": 0.3}
        for i, v in enumerate(variants)
    ]


def fake_second(name: str) -> list[Row]:
    variant, index = name.removeprefix("job second reward ").rpartition(" seed=")[0], seed_of(name)
    values = {"base model": (5.0, -0.26), "first reward only": (7.0, -0.26), "continued": (6.0, -0.20)}
    first, second = values.get(variant, (6.5, -0.23))
    row = {"variant": variant, "seed": index, "faces_reward": first + 0.1 * index, "things_orange": second}
    return [row | {"faces_orange": -0.2, "things_reward": 6.0, "faces_name_accuracy": 1.0, "things_name_accuracy": 1.0}]


def fake_steps(name: str) -> list[Row]:
    words, seed = name.removeprefix("job few steps ").rpartition(" seed=")[0], seed_of(name)
    if words == "base":
        pairs = [*((n, "deterministic") for n in few_steps.BASE_STEPS), *((n, "ancestral") for n in few_steps.STEPS)]
        rows = [{"variant": "base", "steps": n, "sampler": s} for n, s in pairs]
    else:
        variant, _, steps = words.rpartition(" ")
        rows = [{"variant": variant, "steps": int(steps), "sampler": few_steps.SAMPLERS[variant]}]
    return [row | {"seed": seed, "kid_classifier": 30.0 / row["steps"] + seed, "kid_clip": 20.0} for row in rows]


def fake_taste(name: str) -> list[Row]:
    count = int(name.split()[2])
    row = {"variant": "taste", "comparisons": count, "accepted": int(count > 50), "held_out_accuracy": 0.6}
    row |= {"seed": seed_of(name), "update": 40, "reward_queries": 160, "reward": 5.0}
    return [row | {"p_3d": 0.2 + 0.0001 * count, "name_accuracy": 1.0, "diversity": 0.3}]


FAKES: dict[str, Any] = {
    "lv_variance": fake_variance,
    "frontier_LoRA": fake_scales,
    "merging": fake_grid,
    "guidance": fake_guidance,
    "second": fake_second,
    "few_steps": fake_steps,
    "taste_25": fake_taste,
    "taste_50": fake_taste,
    "taste_100": fake_taste,
    "taste_200": fake_taste,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Row]], FakeRunner]:
    """Return a folder with the csv files of all experiments of invented scores, their rows, and the runner."""
    folder = tmp_path_factory.mktemp("experiments")
    runner = FakeRunner(folder / "runs", rising, **FAKES)
    for name, experiment in EXPERIMENTS.items():
        jobs = experiment.jobs(runner.budget)
        work(jobs, runner)
        write_rows(folder / "results" / f"{name}.csv", [row for job in jobs for row in job.rows(runner)])
    return folder, {name: read_csv(folder / "results" / f"{name}.csv") for name in NAMES}, runner


def test_every_experiment_has_claims_answers_and_figures(
    measured: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows, _ = measured
    # Rendering takes a second for each figure.
    monkeypatch.setattr(
        "experiments.report.save", lambda canvas, path: Path(path).write_text(canvas.axes[0].get_ylabel())
    )

    assert main(["--report", "--output", str(folder)]) == 0
    text = (folder / "RESULTS.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 245
    for name, experiment in EXPERIMENTS.items():
        assert f"## {experiment.title}\n" in text
        assert (folder / "results" / f"{name}.png").read_text()
        claims = experiment.claims(rows[name])
        assert claims
        assert len({claim.text for claim in claims}) == len(claims)
        for claim in claims:
            assert f"| {claim.text} |" in text
        assert {"commit", "device", "date", "seed"} <= set(rows[name][0])
    assert "nan" not in text
    assert max(map(len, (line for line in text.splitlines() if "|" not in line))) <= 120
    capsys.readouterr()


def test_declared_jobs_have_own_names_and_valid_runs(measured: Any, tmp_path: Path) -> None:
    for prompt in load_prompts("emoji")[:2]:
        save_image(to_pil(torch.rand(1, 3, 8, 8))[0], tmp_path / "real" / f"{prompt}.png")
    for budget in (FULL, TINY):
        runner, folders = ExperimentRunner(tmp_path / "runs", budget, tmp_path / "real"), dict[str, str]()
        jobs = [job for experiment in EXPERIMENTS.values() for job in experiment.jobs(budget)]
        assert len({job.name for job in jobs}) == len(jobs)
        for spec in [*(spec for job in jobs for spec in job.specs), *few_step_specs(budget)]:
            values = runner.settings(spec)
            assert len(spec.name) < 200  # bytes of a folder's name
            written = Settings.from_mapping({"model": "emoji", **values, "prompts": "emoji"})
            assert written.steps == spec.steps
            # Two runs share a folder only if they are the same run, maybe of other lengths.
            own = repr(replace(written, steps=1))
            assert folders.setdefault(spec.name, own) == own


def few_step_specs(budget: Any) -> list[RunSpec]:
    return [few_steps.spec(name, steps, 0, budget) for name, steps in few_steps.variants()]


def test_ddpo_runs_until_it_reaches_the_target_of_draft_lv(measured: Any) -> None:
    _, rows, runner = measured
    ddpo = [row for row in rows["sample_efficiency"] if row["variant"] == "DDPO"]
    # DRaFT-LV's gain after 10 updates, 0.6, takes DDPO 600 updates; the limit of 6,400 images are 100.
    assert sorted({row["update"] for row in ddpo}) == [0, 5, 10, 15, 20, 25, 30, 36, 43, 51, 61, 73, 87, 100]
    effect = sample_efficiency.factor(rows["sample_efficiency"], "style")
    assert (effect.value, effect.censored) == (pytest.approx(6400 / 120), 3)
    quick = FakeRunner(runner.folder.parent / "quick", lambda spec, u: {"reward": float(u)} if u else {"reward": 0.0})
    target, task = sample_efficiency.TASKS[0], sample_efficiency.TASKS[0]
    first = curve_job("efficiency", sample_efficiency.draft_spec(task, DRAFT_LV, 0, FULL), variant="x")
    curve = sample_efficiency.chase(target, 0, first, sample_efficiency.search_jobs(task, FULL), quick)
    assert [row["update"] for row in curve] == [0, 5, 10]


def test_the_learning_rate_is_the_best_that_keeps_the_names() -> None:
    values = [(3e-4, 5.0, 1.0), (1e-3, 6.0, 0.95), (3e-3, 9.0, 0.5)]
    rows = [
        {
            "learning_rate": rate,
            "update": update,
            "reward": reward if update else 4.0,
            "name_accuracy": names if update else 1.0,
        }
        for rate, reward, names in values
        for update in (0, 20)
    ]
    assert sample_efficiency.best_rate(rows) == 1e-3
    assert (
        sample_efficiency.best_rate([{**row, "name_accuracy": 1 - 0.9 * bool(row["update"])} for row in rows]) == 3e-3
    )


def test_effects_of_the_experiments(measured: Any) -> None:
    rows = measured[1]
    # At equal updates all K are alike; in the time of 40 updates of K = 20, K = 1 makes 160.
    assert truncation_depth.at_equal_updates(rows["truncation_depth"], 1, 40).value == pytest.approx(0, abs=0.05)
    later = truncation_depth.at_equal_time(rows["truncation_depth"], 1, 40)
    assert later.value == pytest.approx(3, abs=0.1)
    # The curves of DRaFT-LV rise 1.2 times as fast.
    assert lv_samples.factor(rows["lv_samples"], "leading", "aesthetic", 1).value == pytest.approx(1.2, abs=0.02)
    assert lv_samples.variance(rows["lv_samples"], "leading", "CLIP").value == pytest.approx(1 - 2 / 3 * 0.31, abs=0.01)
    # The most reward with 97 % of the names: the LoRA scale of 1 has 8 and 98 %.
    best = over_optimization.default(rows["over_optimization"])
    assert (best["remedy"], best["update"]) == ("LoRA scale", 100)
    style, color = lora_merging.shares(rows["lora_merging"]).values()
    assert (style.value, color.value) == pytest.approx((0.5, 0.8))
    assert second_reward.retained(rows["second_reward"], "continued, half weight") == pytest.approx([0.75] * 3)
    assert second_reward.gained(rows["second_reward"], "continued, half weight") == pytest.approx([0.5] * 3)
    assert taste.shares(rows["taste"], 200)[0] == pytest.approx(0.02 / 0.02)
    assert second_reward.split_names([f"{i} face" for i in range(9)] + ["clock", "facet", "sun"], 3) == {
        "faces": ["0 face", "3 face", "6 face"],
        "things": ["clock", "facet", "sun"],
    }


def test_figures_have_medians_over_seeds() -> None:
    data = [{"method": m, "seed": s, "x": x, "y": x * (s + 1.0)} for m in "ab" for s in (0, 1, 2) for x in (0, 2)]
    data.append({"method": "b", "seed": 0, "x": 4, "y": 9.0})  # the other seeds ended before
    assert points(data, Panel("x", "y"))["b"] == [(0, (0, (0, 0, 0))), (2, (2, (4, 2, 6)))]
    figure = plot(
        data, [Panel("x", "y", log=True), Panel("x", "y", kind="points"), Panel("method", "y", "", kind="names")]
    )
    assert [list(values) for values in figure.axes[0].get_lines()[0].get_data()] == [[0, 2], [0, 4]]
    assert [text.get_text() for text in figure.axes[2].get_xticklabels()] == ["a", "b"]


def test_csv_files_keep_numbers_and_commits(tmp_path: Path) -> None:
    data = [{"commit": "1234567", "a": 1.23456789, "b": "x, y", "none": None}, {"a": 0.00057, "b": math.nan}]
    write_rows(tmp_path / "t.csv", data)
    assert (tmp_path / "t.csv").read_text().splitlines()[0] == "a,b,none,commit"
    assert read_csv(tmp_path / "t.csv") == [
        {"a": 1.2346, "b": "x, y", "none": None, "commit": "1234567"},
        {"a": 0.00057, "b": None, "none": None, "commit": ""},
    ]


def measure_slowly(folder: Path, names: list[str]) -> None:
    """Do jobs that append a line to a file each."""

    def measure(name: str, runner: ExperimentRunner) -> list[Row]:
        import time

        time.sleep(0.2)
        with (folder / "log").open("a") as file:
            file.write(f"{name}\n")
        return [{"name": name}]

    work([Job(name, partial(measure, name)) for name in names], ExperimentRunner(folder, TINY), pause=0.05)


def test_two_processes_share_the_jobs(tmp_path: Path) -> None:
    names = [f"job-{i}" for i in range(6)]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=measure_slowly, args=(tmp_path, names)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == names
    assert json.loads((tmp_path / "measured" / "job-job-0.json").read_text())[0]["commit"]


def test_finished_runs_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def train(model: str, **values: Any) -> None:
        assert model == "emoji"
        trained.append(values["steps"])
        folder = Path(values["output"])
        (folder / "snapshots" / f"{values['steps']:06d}").mkdir(parents=True)
        lines = [{"step": i + 1, "reward_queries": 4 * (i + 1), "train_seconds": 0.0} for i in range(values["steps"])]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "snapshots" / f"{values['steps']:06d}" / "pytorch_lora_weights.safetensors").touch()

    monkeypatch.setattr("experiments.runner.train", train)
    runner = ExperimentRunner(tmp_path, TINY)
    spec = RunSpec("draft", (2, 3))
    assert len(runner.metrics(spec)) == 3
    assert len(runner.metrics(spec)) == 3
    # A longer run continues in the same folder.
    assert len(runner.metrics(replace(spec, updates=(4,)))) == 4
    assert len(runner.metrics(spec)) == 3
    assert trained == [3, 4]


def test_estimates_count_a_shared_run_once(tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path, rising)
    jobs = [curve_job(name, RunSpec(DRAFT_1, (10, 20)), variant=name) for name in "ab"]
    evaluation = 0.25 * 256
    assert estimate(jobs[:1], runner, set()) == pytest.approx(20 * 0.5 + 2 * evaluation)
    assert estimate(jobs, runner, set()) == pytest.approx(20 * 0.5 + 2 * evaluation)
    longer = curve_job("c", RunSpec(DRAFT_1, (20, 50)), variant="c")
    assert estimate([jobs[0], longer], runner, set()) == pytest.approx(50 * 0.5 + 3 * evaluation)
    jobs[0].rows(runner)
    assert estimate(jobs[:1], runner, set()) == 0


@pytest.mark.parametrize(
    "method",
    [
        "pgdiff_dynamic(strength=0.1)",
        "gradient_guidance(rounds=2)",
        "gradient_guidance(rounds=3, finetune_from_round=2)",
    ],
)
def test_counted_denoiser_calls_are_made(method: str, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(pipeline_folder)
    model.set_checkpointing("none")
    made = 0
    predict = model.predict

    def counted(x: torch.Tensor, timestep: float, condition: Any, guidance_scale: float) -> torch.Tensor:
        nonlocal made
        made += 1 + torch.is_grad_enabled()
        return predict(x, timestep, condition, guidance_scale)

    monkeypatch.setattr(model, "predict", counted)
    sample_guided(model, "brightness", "a cat", method, num_inference_steps=5, guidance_scale=3)
    assert made == guidance.calls(method, 5)
    assert guidance.best_of(20) == 9


def test_examples_are_real_images_of_training_names(tmp_path: Path) -> None:
    for name in ("cat face", "accordion", "tomato"):
        for style in ("a", "b"):
            save_image(to_pil(torch.rand(1, 3, 8, 8))[0], tmp_path / "real" / style / f"{name}.png")
    copy_examples(tmp_path / "real", tmp_path / "copy", load_prompts("emoji"))
    copied = sorted(str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*.png"))
    assert copied == ["a/accordion.png", "a/tomato.png", "b/accordion.png", "b/tomato.png"]
    assert len(example_images(tmp_path / "real", ["cat face", "dog face"])) == 2
    with pytest.raises(DraftuneError, match="too few images"):
        example_images(tmp_path / "real", ["dog face"])
    save_image(to_pil(torch.rand(1, 3, 8, 9))[0], tmp_path / "real" / "cat face.png")
    with pytest.raises(DraftuneError, match="one size"):
        example_images(tmp_path / "real", ["cat face"])


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "file").write_text("x")
    (tmp_path / "other" / "runs").mkdir(parents=True)
    (tmp_path / "other" / "runs" / "identity.json").write_text("{}")
    for argv, words in (
        (["symetry", *output], "'symmetry'"),
        (["symmetry", "--seeds", "1", *output], "--seeds"),
        (["symmetry", "--images", "1", *output], "--images"),
        (["few_steps", "--quick", *output], "--examples"),
        (["few_steps", "--quick", "--examples", "none", *output], "none"),
        (["symmetry", "--output", str(tmp_path / "file")], "--output"),
        (["symmetry", "--report", *output], "symmetry.csv"),
        (["symmetry", "--dry-run", "--output", str(tmp_path / "other")], "weights"),
    ):
        assert main(argv) == 2, argv
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.md")), ids=lambda file: file.stem)
def test_tables_of_earlier_weights_are_in_the_results(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.strip() in (RESULTS.parent / "RESULTS.md").read_text(encoding="utf-8")


def test_published_results_are_those_of_their_csv_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [file for name in NAMES if (file := RESULTS / f"{name}.csv").is_file()]
    files = [file for file in files if "commit" in file.read_text(encoding="utf-8").partition("\n")[0].split(",")]
    if not files:
        pytest.skip("the published results are of an earlier version of the experiments")
    for file in files:
        (tmp_path / "results").mkdir(exist_ok=True)
        shutil.copyfile(file, tmp_path / "results" / file.name)
    monkeypatch.setattr("experiments.report.save", lambda canvas, path: Path(path).touch())
    assert main(["--report", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "RESULTS.md").read_text("utf-8") == (RESULTS.parent / "RESULTS.md").read_text("utf-8")


@pytest.mark.slow
def test_a_quick_experiment_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["symmetry", "--quick", "--output", str(tmp_path)]
    budget, folder = TINY, tmp_path / "quick"
    first = EXPERIMENTS["symmetry"].jobs(budget)[0]
    assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--dry-run"]) == 0
    assert "0 of    6 jobs left, at most 0 s" in capsys.readouterr().out
    csv_file = folder / "results" / "symmetry.csv"
    text, spec = csv_file.read_text(), first.specs[0]
    # A job and the end of its run are lost: the run resumes from its checkpoint to the same scores.
    interrupted = folder / "runs" / spec.name
    shutil.rmtree(interrupted / "checkpoints" / f"step-{spec.steps:06d}")
    shutil.rmtree(interrupted / "snapshots" / f"{spec.steps:06d}")
    for path in (folder / "runs" / "measured").glob(f"*{spec.name}*"):
        path.unlink()
    ExperimentRunner(folder / "runs", budget).measured(f"job {first.name}").unlink()
    assert main(argv) == 0
    assert csv_file.read_text() == text
    assert spaced(range(10), 3) == [0, 3, 6]


@pytest.mark.slow
def test_measurements_on_the_embedded_model(tmp_path: Path) -> None:
    """One job of each kind that does more than evaluate a run, all with the same runs."""
    runner = ExperimentRunner(tmp_path, replace(TINY, eval_prompts=1, num_inference_steps=2))
    (variance,) = lv_samples.gradient_variance("trailing", "aesthetic", 0, runner)
    assert 0 < variance["share"] < 1
    assert variance["variance_ratio"] == pytest.approx(1 - 2 / 3 * variance["share"])
    spec = over_optimization.REMEDIES[0].spec(0, runner.budget)
    scaled = {row["scale"]: row for row in over_optimization.scales(spec, runner)}
    curve = runner.curve(spec)
    assert scaled[0.0]["reward"] == pytest.approx(curve[0]["reward"])
    assert scaled[1.0]["reward"] == pytest.approx(curve[-1]["reward"], abs=1e-4)
    best = guidance.best_of_n(0, runner)
    assert best[1]["reward"] >= best[0]["reward"]
    trained = guidance.guided(guidance.TRAINED, 0, runner)
    assert [row["variant"] for row in trained] == [guidance.TRAINED, guidance.TRAINED_LORA]
    (kept,) = second_reward.evaluate_variant(second_reward.RETAINED[0], 0, runner)
    assert set(kept) >= {"faces_reward", "things_orange", "things_name_accuracy"}
    (row,) = taste.run_comparisons(12, 0, runner)
    assert row["accepted"] in (0, 1)
