"""The measured experiments: runner, tables, intervals, declared runs, and one run for real."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from test_resume import rows

from draftune.errors import DraftuneError
from draftune.evaluation.reward_check import check_reward
from draftune.guidance.methods import load_guide
from draftune.guidance.sample import sample_guided
from draftune.models import load_model
from draftune.prompts import load_prompts
from draftune.rewards import load_reward
from draftune.settings import Settings
from draftune.utils.images import save_image, to_pil
from experiments import black_box, few_steps, guidance, lv_samples, optimizers, second_reward, symmetry, taste
from experiments.__main__ import EXPERIMENTS, main, shard_runs
from experiments.budget import FULL, QUICK
from experiments.examples import copy_examples, example_images
from experiments.report import Panel, aggregate, ci95, curves, markdown, plot, read_csv, value_at, write_rows
from experiments.runner import ExperimentRunner, RunResult, RunSpec

RESULTS = Path(__file__).parent.parent / "results"


class FakeRunner(ExperimentRunner):
    """Results from a function of the run and the update, instead of training."""

    def __init__(self, folder: Path, scores: Callable[[RunSpec, int], dict[str, float]]) -> None:
        super().__init__(folder, FULL)
        self.scores = scores

    def run(self, spec: RunSpec) -> RunResult:
        evaluations = []
        for step in range(0, spec.steps + 1, 10):
            row = {"emoji_aesthetic": 4.0, "eval/emoji_style_probability": 0.5, "eval/emoji_name_accuracy": 1.0}
            row |= {"step": float(step), "reward_queries": 4.0 * step, "eval/diversity": 0.4}
            evaluations.append(row | self.scores(spec, step))
        updates = [{"step": float(i + 1), "grad_norm": 1.0, "reward": float(i)} for i in range(spec.steps)]
        return RunResult(updates, evaluations, self.folder)

    def cost(self, method: str, batch_size: int = 4) -> dict[str, float]:
        return {"seconds": 1.5, "peak_mb": 50.0, "peak_mb_without_checkpointing": 100.0}


def test_the_interval_is_students() -> None:
    # t(0.975, 2) = 4.30265; the standard error of 1, 2, 3 is 1 / sqrt(3).
    assert ci95([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5)
    low, high = stats.ttest_1samp([4.0, 5.0, 7.0, 9.0], 0).confidence_interval(0.95)
    assert ci95([4.0, 5.0, 7.0, 9.0]) == pytest.approx((high - low) / 2)
    assert math.isnan(ci95([1.0]))


def test_the_last_evaluations_are_averaged_over_seeds() -> None:
    data = [
        {"method": m, "seed": s, "update": u, "reward": offset + u + s, "kb": None}
        for m, offset in (("a", 0.0), ("b", 10.0))
        for s in (0, 1)
        for u in (0, 5)
    ]
    table = aggregate(data, "method", ("update", "reward", "kb"))
    interval = pytest.approx(stats.t.ppf(0.975, 1) * 0.5)
    assert table == [
        {"method": "a", "update": 5, "reward": 5.5, "reward_ci95": interval, "kb": None},
        {"method": "b", "update": 5, "reward": 15.5, "reward_ci95": interval, "kb": None},
    ]


def test_interpolation_on_a_curve_with_several_branches() -> None:
    points = [{"x": 1.0, "y": 0.8}, {"x": 3.0, "y": 0.4}, {"x": 2.0, "y": 0.7}]
    assert value_at(points, "x", 2.5, "y") == pytest.approx(0.55)  # 0.5 on the first branch, 0.55 on the second
    assert math.isnan(value_at(points, "x", 3.5, "y"))
    curve = [{"update": u, "reward": r} for u, r in ((0, 1.0), (10, 1.0), (20, 3.0), (40, 2.0))]
    assert lv_samples.first_reached(curve, 2.0) == 15
    assert lv_samples.first_reached(curve, 0.5) == 0
    assert math.isnan(lv_samples.first_reached(curve, 3.1))


def test_tables_and_csv(tmp_path: Path) -> None:
    data = [{"a": 1.23456789, "b": "x, y", "empty": None}, {"a": 123.4, "b": 7}, {"a": 0.00057, "b": math.nan}]
    write_rows(tmp_path / "t.csv", data)
    read = read_csv(tmp_path / "t.csv")
    assert [row["a"] for row in read] == [1.2346, 123.4, 0.00057]
    assert [row["b"] for row in read] == ["x, y", 7, None]
    assert markdown(read).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1.235 | x, y |",
        "| 123 | 7 |",
        "| 0.00057 |  |",
    ]


def test_panels_average_over_seeds() -> None:
    data = [{"method": m, "seed": s, "x": x, "y": x * (s + 1.0)} for m in "ab" for s in (0, 1) for x in (0, 2)]
    x, y = curves([*data, {"method": "c", "x": "text", "y": 1.0}], Panel("x", "y"))["b"]
    assert (x.tolist(), y.tolist()) == ([[0, 2], [0, 2]], [[0, 2], [0, 4]])
    figure = plot(
        data, [Panel("x", "y", log=True), Panel("x", "y", by="", kind="scatter"), Panel("x", "y", where={"x": 2})]
    )
    line = figure.axes[0].get_lines()[0]
    assert [list(values) for values in line.get_data()] == [[0, 2], [0, 3]]
    bars = plot([{"name": "a", "y": 2.0}, {"name": "b", "y": 3.0}], [Panel("name", "y", by="name", kind="bar")])
    assert [bar.get_height() for bar in bars.axes[0].patches] == [2, 3]


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("budget", [FULL, QUICK], ids=["full", "quick"])
def test_declared_runs_have_valid_settings_and_own_folders(name: str, budget: Any, tmp_path: Path) -> None:
    for prompt in load_prompts("emoji")[:2]:
        save_image(to_pil(torch.rand(1, 3, 8, 8))[0], tmp_path / "real" / f"{prompt}.png")
    runner, specs = ExperimentRunner(tmp_path / "runs", budget, tmp_path / "real"), EXPERIMENTS[name].runs(budget)
    assert specs
    # With the quick budget two variants can be the same run.
    assert len({spec.name for spec in specs}) == len({repr(spec) for spec in specs})
    assert budget == QUICK or len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        values = runner.settings(spec)
        assert len(spec.name) < 250  # bytes of a folder's name
        assert values["output"] == str(tmp_path / "runs" / spec.name)
        assert Settings.from_mapping({"model": "emoji", **values, "prompts": "emoji"}).steps == spec.steps


def test_shards_are_all_runs_once() -> None:
    everything = list(EXPERIMENTS.values())
    whole = [spec.name for spec in shard_runs(everything, FULL)]
    shards = [spec.name for i in (1, 2, 3) for spec in shard_runs(everything, FULL, i, 3)]
    assert sorted(shards) == sorted(whole)
    assert len(set(whole)) == len(whole)
    assert set(whole) == {spec.name for experiment in everything for spec in experiment.runs(FULL)}
    # A run that two experiments share is as long as the longer one needs.
    longest = {spec.steps for spec in shard_runs(everything, FULL) if spec.method == "draft" and spec.seed == 0}
    assert longest == {FULL.long_steps}


def write_log(folder: Path, steps: int) -> None:
    row = {"reward": 0.0, "reward_queries": 0, "train_seconds": 0.0}
    for name, first in (("metrics.jsonl", 1), ("evaluations.jsonl", 0)):
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"step": step, **row}) for step in range(first, steps + 1)]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "lora").mkdir(exist_ok=True)
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")


def test_finished_runs_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def train(model: str, **values: Any) -> None:
        assert model == "emoji"
        trained.append(values["steps"])
        write_log(Path(values["output"]), values["steps"])

    monkeypatch.setattr("experiments.runner.train", train)
    runner, spec = ExperimentRunner(tmp_path, QUICK), RunSpec("draft", 3)
    assert runner.result(spec) is None
    assert runner.run(spec).final["step"] == 3
    assert [row["step"] for row in runner.run(replace(spec, steps=2)).metrics] == [1, 2]
    assert trained == [3]
    # A longer run continues in the same folder; its LoRA is not that of a shorter one.
    runner.run(replace(spec, steps=4))
    assert trained == [3, 4]
    with pytest.raises(AssertionError, match="longer"):
        runner.lora(spec)
    (tmp_path / spec.name / "lora" / "pytorch_lora_weights.safetensors").unlink()
    assert runner.result(spec) is None
    plain = RunSpec("draft", 2, label="a label", evaluated=False)
    assert runner.settings(plain)["eval_prompts"] == ""
    assert "checkpointing_steps" not in runner.settings(plain)
    assert runner.run(plain).folder == tmp_path / "a-label"


def test_measurements_are_stored(tmp_path: Path) -> None:
    runner, calls = ExperimentRunner(tmp_path, QUICK), []
    for _ in range(2):
        assert runner.cached("a b", lambda: calls.append(1) or {"x": [1]}) == {"x": [1]}
    assert calls == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a-b.json"]
    assert Path(runner.prompt_file("p", ["a", "b"])).read_text() == "a\nb\n"
    assert Path(runner.prompt_file("p", ["c"])).read_text() == "c\n"


def test_lv_samples_compares_with_draft_1(tmp_path: Path) -> None:
    def scores(spec: RunSpec, step: int) -> dict[str, float]:
        gain = 2.0 if spec.method == "draft_lv(n=2)" else 1.0
        return {"emoji_aesthetic": 4 + 0.05 * gain * step}

    runner = FakeRunner(tmp_path, scores)
    moments = [{"variance": 4.0, "signal": signal} for signal in (1.0, 4.0, 9.0, 0.1, 81.0)]
    runner.cached("lv-gradients", lambda: moments)
    table = {row["n"]: row for row in lv_samples.EXPERIMENT.table(lv_samples.measure(runner))}
    assert [table[n]["updates_to_draft_1"] for n in (0, 2)] == [40, 20]
    assert table[2]["relative_variance"] == pytest.approx(4 / 9)
    assert table[2]["variance_of_average"] == pytest.approx(4 / 9)
    assert math.isnan(table[4]["relative_variance"])  # the mean is smaller than its noise


def test_symmetry_has_one_row_of_the_base_model(tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path, lambda spec, step: {"symmetry": 0.9 if step else 0.5})
    assert [(row["method"], row["symmetry"]) for row in symmetry.measure(runner)][:2] == [
        ("base", 0.5),
        ("draft_k(k=1)", 0.9),
    ]


def test_ddpo_has_the_best_rate_that_keeps_the_names(tmp_path: Path) -> None:
    def scores(spec: RunSpec, step: int) -> dict[str, float]:
        rate = spec.settings.get("learning_rate", 0.0)
        size = -1.5 + 10 * rate * step / 40
        named = 0.8 if rate == 0.01 else 1.0
        return {"eval/jpeg_file_size": size, "eval/emoji_name_accuracy": named}

    data = black_box.measure(FakeRunner(tmp_path, scores))
    (line,) = (row for row in black_box.EXPERIMENT.table(data) if row["variant"].startswith("DDPO"))
    assert line["variant"] == "DDPO, learning rate 0.003"
    assert line["kb"] == pytest.approx(1.47)
    rates = [spec.settings["learning_rate"] for spec in black_box.runs(FULL) if spec.method.startswith("ddpo")]
    assert rates == list(black_box.RATES)


def test_a_threshold_without_smoothing_is_refused() -> None:
    with pytest.raises(DraftuneError, match=r"threshold\(emoji_aesthetic\)' has no gradient"):
        check_reward(load_reward(black_box.THRESHOLD), torch.rand(2, 3, 64, 64), ["cat face", "pizza"])


def test_a_search_goes_beyond_its_ends() -> None:
    def near(best: float, ruin: float = math.inf) -> Callable[[float], dict[str, Any]]:
        return lambda rate: {
            "reward": rate if ruin < math.inf else -abs(math.log(rate / best)) if rate else -9.0,
            "name_accuracy": 0.0 if rate > ruin else 1.0,
        }

    own = optimizers.OWN_RATE
    assert list(optimizers.search([1.0, 3.0, 9.0], near(27))) == [1, 3, 9, 27, 81, 47]
    assert list(optimizers.search([9.0, 27.0, 81.0], near(27))) == [9, 27, 81, 47]
    assert list(optimizers.search([own, 81.0, 243.0], near(27))) == [own, 81, 243, 27, 9, 47]
    assert list(optimizers.search([1.0], near(27))) == [1]
    assert list(optimizers.search([own, 3.0], lambda rate: {"reward": -rate, "name_accuracy": 1.0})) == [own, 3]
    assert list(optimizers.search([1.0, 3.0, 9.0], near(0, ruin=4))) == [1, 3, 9, 5.2]


def test_optimizers_are_compared_at_their_best_rate(tmp_path: Path) -> None:
    middle = {spec.optimizer: spec.rates[1] for spec in optimizers.OPTIMIZERS}

    def scores(spec: RunSpec, step: int) -> dict[str, float]:
        best = spec.settings["learning_rate"] == middle[spec.settings["optimizer"]]
        return {"emoji_aesthetic": 5.0 + best + 0.01 * spec.seed}

    class WithAdaMEKA(FakeRunner):
        def cached(self, name: str, measure: Callable[[], Any]) -> Any:
            scores = {"reward": 5.0 if "0.0 " in name else 2.0, "p_3d": 0.5, "name_accuracy": 1.0, "diversity": 0.4}
            return [4.0], scores

    data = optimizers.measure(WithAdaMEKA(tmp_path, scores))
    table = {row["optimizer"]: row for row in optimizers.table(data)}
    assert [row["learning_rate"] for row in table.values()] == [0.001, 0.1, 1.0, 0.001, "its own"]
    assert table["AdamW"]["reward"] == pytest.approx(6.01)
    # 40 updates: the mean of 10 up to the 20th, whose reward is 19. Step-Tuned SGD: 5 up to the 10th of 20.
    assert table["AdamW"]["halfway_reward"] == pytest.approx(14.5)
    assert table["Step-Tuned SGD"]["halfway_reward"] == pytest.approx(7.0)
    assert {row["reward_queries"] for name, row in table.items() if name != "AdaMEKA"} == {160}


def test_shares_of_two_rewards() -> None:
    values = {"base model": (5.0, -0.26), "first reward only": (7.0, -0.26), "continued": (6.0, -0.20)}
    values |= {"continued, half weight": (6.5, -0.23), "two LoRAs merged": (6.0, -0.21)}
    data = [
        {"variant": name, "seed": seed, "faces_reward": first, "things_orange": second}
        for seed in (0, 1)
        for name, (first, second) in values.items()
    ]
    lines = {row["variant"]: row for row in second_reward.table(second_reward.add_shares(data))}
    assert lines["continued, half weight"]["first_retained"] == pytest.approx(0.75)
    assert lines["continued, half weight"]["second_gained"] == pytest.approx(0.5)
    # The second reward gains 5/6. Between half and full weight, `continued` retains 7/12 of the first there.
    assert lines["two LoRAs merged"]["above_scaling"] == pytest.approx(0.5 - 7 / 12)
    names = second_reward.split_names([f"{i} face" for i in range(9)] + ["clock", "facet", "sun"], 3)
    assert names == {"faces": ["0 face", "3 face", "6 face"], "things": ["clock", "facet", "sun"]}


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
    scales = set()
    predict = model.predict

    def counted(x: torch.Tensor, timestep: float, condition: Any, guidance_scale: float) -> torch.Tensor:
        nonlocal made
        made += 1 + torch.is_grad_enabled()
        scales.add((torch.is_grad_enabled() and not x.requires_grad, guidance_scale))
        return predict(x, timestep, condition, guidance_scale)

    monkeypatch.setattr(model, "predict", counted)
    samples = sample_guided(model, "brightness", "a cat", method, num_inference_steps=5, guidance_scale=3)
    assert made == guidance.calls(method, 5)
    # The LoRA is trained on predictions without classifier-free guidance.
    assert scales == ({(False, 3), (True, 1)} if "finetune_from_round" in method else {(False, 3)})
    rounds = load_guide(method).num_samplings - 1
    assert samples.queries == (2 * rounds + 1 if rounds else 5 + 1)


def test_best_of_n_has_the_calls_of_look_ahead() -> None:
    assert guidance.candidate_counts(FULL) == [1, 2, 9, 17]
    assert list(guidance.guided_variants(QUICK))[:2] == ["pgdiff_dynamic(strength=0)", "pgdiff_dynamic(strength=0.05)"]


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
    specs = few_steps.runs(FULL)
    assert len({spec.name for spec in specs}) == 3 * 5
    assert {spec.steps * spec.settings["gradient_accumulation_steps"] for spec in specs} == {200}


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "file").write_text("x")
    for argv, words in (
        (["reward_hackin", *output], "'reward_hacking'"),
        *(
            (["symmetry", "--shard", shard, *output], repr(shard))
            for shard in ("3", "0/2", "3/2", "a/b", "²/3", "1/2/3")
        ),
        (["symmetry", "--seeds", "0", *output], "--seeds"),
        (["few_steps", "--quick", *output], "--examples"),
        (["few_steps", "--quick", "--examples", "none", *output], "none"),
        (["symmetry", "--output", str(tmp_path / "file")], "--output"),
        (["symmetry", "--redraw", *output], "symmetry.md"),
    ):
        assert main(argv) == 2, argv
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_tables_and_figures_are_of_their_csv(name: str, tmp_path: Path) -> None:
    for suffix in ("csv", "md"):
        shutil.copyfile(RESULTS / f"{name}.{suffix}", tmp_path / f"{name}.{suffix}")
    assert main([name, "--redraw", "--output", str(tmp_path)]) == 0
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == text
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert text.strip() in (RESULTS.parent / "RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_quick_experiment_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["symmetry", "--quick", "--output", str(tmp_path)]
    assert main([*argv, "--shard", "1/2"]) == 0
    results = tmp_path / "quick"
    assert not list(results.glob("*.md"))
    specs = shard_runs([EXPERIMENTS["symmetry"]], QUICK, 1, 2)
    interrupted = results / "runs" / specs[0].name
    logged = rows(interrupted, "evaluations.jsonl")
    shutil.rmtree(interrupted / "checkpoints" / f"step-{specs[0].steps:06d}")
    lines = (interrupted / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (interrupted / "evaluations.jsonl").write_text("".join(lines[:-1]))
    assert main(argv) == 0
    assert rows(interrupted, "evaluations.jsonl") == logged
    assert "`python -m experiments symmetry --quick`" in (results / "symmetry.md").read_text(encoding="utf-8")
    with (results / "symmetry.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [
            "base",
            "draft_k(k=1)",
            "draft_k(k=2)",
            "drtune(k=2, m=2)",
        ]
    stamps = {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*") if path.is_file()}
    assert main(argv) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*") if path.is_file()}


def test_the_share_of_the_raters_own_gain(tmp_path: Path) -> None:
    def scores(spec: RunSpec, step: int) -> dict[str, float]:
        return {"eval/emoji_style_probability": 0.1 + step / 40 * (0.8 if "odds" in spec.label else 0.2)}

    runner = FakeRunner(tmp_path, scores)
    for count in FULL.comparisons:
        for seed in range(FULL.seeds):
            refused = count == FULL.comparisons[0]
            row = {
                "accepted": int(not refused),
                "held_out_accuracy": 0.6,
                "p_3d": 0.1 if refused else 0.3 + 0.001 * count,
            }
            runner.cached(f"taste {count} {seed}", lambda row=row: row)
    table = taste.table(taste.measure(runner))
    shares = {(row["variant"], row["comparisons"]): row["share"] for row in table}
    assert shares["base model", None] == 0
    assert shares["rater's log-odds", None] == 1
    assert shares["taste", FULL.comparisons[0]] == pytest.approx(0)
    assert shares["taste", 100] == pytest.approx(0.3 / 0.8)
