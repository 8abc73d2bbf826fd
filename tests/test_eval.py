"""`draftune eval`: the arithmetic of differences and intervals, the leaderboard, what it writes."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

import draftune
from draftune.cli.main import main
from draftune.evaluation.compare import Leaderboard, LeaderboardRow, block, compare
from draftune.evaluation.eval_spec import resolve_eval_spec
from draftune.evaluation.metrics import Comparison, Evaluation, Paired, interval
from draftune.lora import add_lora, lora_parameters, save_lora
from draftune.models import DiffusionModel, load_model
from draftune.rewards import load_reward
from draftune.runs.load import LoRASource, load_for_sampling, resolve_lora, resolve_loras
from draftune.settings import Settings
from draftune.utils.images import open_image
from helpers.errors import mentions
from helpers.pipelines import add_random_lora, build_pipeline

SMALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "timestep_spacing": "trailing"}
SMALL |= {"reward": "brightness", "eval_rewards": "saturation", "device": "cpu"}


def make_run(folder: Path, model: Path, strength: float = 1.0, names: Sequence[str] = (), **values: Any) -> Path:
    """A run's folder as training leaves it, with a random LoRA; its second LoRA, in best/, is half as strong."""
    (folder.parent / "prompts.txt").write_text("a cat\na dog\nfish\n")
    tuned = load_model(model)
    if names:
        add_lora(tuned, 3, targets=names)
        for parameter in lora_parameters(tuned).values():
            parameter.data.fill_(0.1)
    else:
        add_random_lora(tuned)
    with torch.no_grad():
        for name, parameter in lora_parameters(tuned).items():
            parameter.mul_(strength if "lora_B" in name else 1)
    save_lora(tuned, folder / "lora")
    with torch.no_grad():
        for name, parameter in lora_parameters(tuned).items():
            parameter.mul_(0.5 if "lora_B" in name else 1)
    save_lora(tuned, folder / "best")
    settings = Settings(model=str(model), **(SMALL | {"prompts": str(folder.parent / "prompts.txt")} | values))
    (folder / "config.yaml").write_text(settings.to_yaml())
    return folder


@pytest.fixture(scope="module")
def runs(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one model, the second with a LoRA of other layers and another rank."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / "first", pipeline_folder, 30.0),
        make_run(folder / "second", pipeline_folder, 30.0, ["to_v", "to_out.0"]),
    ]


def evaluation(values: Sequence[Sequence[float]]) -> Evaluation:
    count = sum(map(len, values))
    return Evaluation({"score": torch.tensor(values)}, ["x"] * count, torch.zeros(count, 3, 2, 2))


def test_differences_and_wins_by_hand() -> None:
    base, tuned = [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]], [[2.0, 2.0], [3.0, 3.0], [6.0, 3.0]]
    found = Comparison(evaluation(base), evaluation(tuned)).paired()["score"]
    assert (found.base, found.tuned) == pytest.approx((10 / 6, 19 / 6))
    # By prompt 0.5, -0.5 and 4.5.
    assert found.difference == pytest.approx(1.5)
    assert found.win_rate == pytest.approx((1 + 0.5 + 0.5 + 0 + 1 + 1) / 6)
    # 0.975 quantile of Student's t with 2 degrees of freedom: 4.303.
    margin = 4.302653 * statistics.stdev([0.5, -0.5, 4.5]) / 3**0.5
    assert (found.low, found.high) == pytest.approx((1.5 - margin, 1.5 + margin))
    # Seeds are pairs: exchanged within a prompt, the mean stays and the wins do not.
    swapped = Comparison(evaluation(base), evaluation([[2.0, 2.0], [3.0, 3.0], [-1.0, 10.0]])).paired()["score"]
    assert swapped.difference == pytest.approx(1.5)
    assert swapped.win_rate == pytest.approx(3 / 6)


def test_pictures_of_one_prompt_are_no_more_evidence() -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = (torch.randn(10, 2, generator=generator).tolist() for _ in range(2))
    once, twice = (
        Comparison(evaluation([row * n for row in base]), evaluation([row * n for row in tuned])).paired()["score"]
        for n in (1, 2)
    )
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert once.low < once.difference < once.high


def test_one_prompt_has_no_interval() -> None:
    found = Comparison(evaluation([[1.0, 2.0]]), evaluation([[2.0, 5.0]])).paired()["score"]
    assert (found.difference, found.low, found.high) == (2.0, -math.inf, math.inf)
    assert "unknown" in block("score", [("score", found)])[1]


@pytest.mark.parametrize("count", [4, 8, 64])
def test_the_interval_is_scipys(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).double()
    theirs = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_the_interval_covers_the_mean_in_95_percent_of_samples() -> None:
    values = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)).double()
    covered = sum(low <= 0 <= high for low, high in map(interval, values))
    # Three standard errors of a fraction of 0.95 in 1000 trials are 0.02.
    assert 930 <= covered <= 970


def test_an_interval_of_scores_that_are_not_finite() -> None:
    assert all(math.isnan(bound) for bound in interval(torch.tensor([1.0, math.nan, 2.0])))


def test_base_and_tuned_are_what_sample_draws(runs: list[Path], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    assert main(["eval", str(runs[0]), "--image-dir", str(pictures), "--output", str(tmp_path / "a.json")]) == 0
    assert len(list((pictures / "base").iterdir())) == len(list((pictures / "tuned").iterdir())) == 6
    prompts = ["a cat", "a dog", "fish"]
    command = ["sample", str(runs[0]), "--prompt", *prompts, "--num-images", "2"]
    for scale, name in (("0", "base"), ("1", "tuned")):
        assert main([*command, "--lora-scale", scale, "--output", str(tmp_path / name)]) == 0
        ours, theirs = sorted((pictures / name).iterdir()), sorted((tmp_path / name).iterdir())
        for a, b in zip(ours, theirs, strict=True):
            with Image.open(a) as first, Image.open(b) as second:
                assert first.tobytes() == second.tobytes()
    reward, means = load_reward("brightness"), {}
    for name in ("base", "tuned"):
        means[name] = np.mean([float(reward(open_image(path), [""])) for path in (pictures / name).iterdir()])
    row = json.loads((tmp_path / "a.json").read_text())["scores"][0]
    assert row["score"] == "brightness"
    # Files have 8 bits.
    assert (row["base"], row["tuned"]) == pytest.approx((means["base"], means["tuned"]), abs=1e-3)
    assert row["difference"] == pytest.approx(row["tuned"] - row["base"])
    assert abs(row["difference"]) > 0.001
    with Image.open(pictures / "before_after.png") as grid:
        assert grid.width > 3 * 128


def test_several_share_their_base_and_do_not_disturb_each_other(runs: list[Path], tmp_path: Path) -> None:
    loras = resolve_loras([*map(str, runs), str(runs[0] / "best"), str(runs[0])])
    assert [tuned.source for tuned in loras] == [str(runs[0]), str(runs[1]), str(runs[0] / "best")]
    assert loras[2].in_run
    yardstick = resolve_eval_spec(loras)
    kept: dict[str, Comparison] = {}
    board = compare(loras, yardstick, on_comparison=lambda tuned, comparison: kept.update({tuned.source: comparison}))
    assert len({id(comparison.base) for comparison in kept.values()}) == 1
    assert {entry.base for entry in board.entries} == {0}
    for entry in board.entries:
        alone = compare([entry.tuned], yardstick).entries[0]
        assert alone.scores == entry.scores
    assert len({entry.scores["brightness"].tuned for entry in board.entries}) == 3
    model = load_model(loras[0].base)
    model.set_sampler_options("trailing")
    plain = model.sample_tensors(["a cat"] * 2, [0, 1], model.schedule(2), 2.0)
    six = ["a cat"] * 2 + ["a dog"] * 2 + ["fish"] * 2
    together = model.sample_tensors(six, [0, 1] * 3, model.schedule(2), 2.0, batch_size=loras[0].settings.batch_size)
    assert torch.equal(kept[str(runs[1])].base.images, together)
    assert (plain - together[:2]).abs().max() < 1e-5
    text = board.table().splitlines()
    assert mentions(text[0], 6, 3, "prompts seeds")
    assert [line.split()[0] for line in text if mentions(line, 95, "interval")] == ["brightness", "eval/saturation"]
    assert max(map(len, text)) <= 105


def test_the_numbers_are_those_of_the_runs_own_evaluations(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, since as many images are sampled at once: what fits in training, fits here."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nfish\n")
    values = SMALL | {"steps": 1, "batch_size": 2, "learning_rate": 0.1, "num_validation_images": 2}
    values |= {"eval_prompts": str(tmp_path / "prompts.txt"), "output": str(tmp_path / "run")}
    run = draftune.train(str(pipeline_folder), prompts=["bird"], **values)
    sizes: list[int] = []
    start = DiffusionModel.start
    monkeypatch.setattr(DiffusionModel, "start", lambda *args: (sizes.append(args[2]), start(*args))[1])
    tuned, found = resolve_lora(str(run.folder)), []
    compare([tuned], resolve_eval_spec([tuned]), device="cpu", on_comparison=lambda _, both: found.append(both))
    for row, evaluation in zip(run.evaluations, (found[0].base, found[0].tuned), strict=True):
        for name in ("brightness", "eval/saturation"):
            assert row[name] == evaluation.scores[name]
    assert sizes == [2, 2, 2] * 2


def test_the_highest_score_is_first() -> None:
    def entry(name: str, brightness: float, judge: float) -> LeaderboardRow:
        tuned = LoRASource(name, Path(name), "emoji", Settings(), True)
        return LeaderboardRow(tuned, {"a": Paired(0, brightness, 0, 0, 0, 0), "b": Paired(0, judge, 0, 0, 0, 0)}, 0)

    lora = LoRASource("x", Path("x"), "emoji", Settings(), False)
    yardstick = resolve_eval_spec([lora], ["cat"], "brightness")
    board = Leaderboard([entry("one", 3, 1), entry("two", 2, 2)], yardstick, 1.0, "b")
    lines = board.table().splitlines()
    assert [line.split()[0] for line in lines if line] == ["base", "b", "one", "two", "a", "one", "two"]


def test_ranked_by_the_reward_or_as_asked(runs: list[Path], tmp_path: Path) -> None:
    command = ["eval", *map(str, runs), str(runs[0] / "best"), "--num-images", "1"]
    orders = {}
    for sort in ("brightness", "eval/saturation"):
        path = tmp_path / "scores.csv"
        assert main([*command, "--sort", sort, "--output", str(path)]) == 0
        rows = list(csv.DictReader(path.open()))
        ranked = [row for row in rows if row["score"] == sort]
        values = [float(row["tuned"]) for row in ranked]
        assert values == sorted(values, reverse=True)
        orders[sort] = [row["source"] for row in ranked]
    header = "source,score,base,tuned,difference,low,high,win_rate,images,prompts"
    assert path.read_text().splitlines()[0] == header
    assert [(row["images"], row["prompts"]) for row in rows] == [("3", "3")] * 6
    assert main([*command, "--output", str(tmp_path / "scores.json")]) == 0
    said = json.loads((tmp_path / "scores.json").read_text())
    by_key = {(row["source"], row["score"]): row for row in said["scores"]}
    for row in rows:
        twin = by_key[row["source"], row["score"]]
        assert {key: str(value) for key, value in twin.items()} == row
    assert [row["source"] for row in said["scores"]][::2] == orders["brightness"]
    assert said["settings"]["prompts"] == ["a cat", "a dog", "fish"]
    assert (said["settings"]["reward"], said["settings"]["eval_rewards"]) == ("brightness", "saturation")
    assert said["settings"]["sources"][str(runs[1])]["guidance_scale"] == 2.0


def test_other_ways_of_drawing_have_their_own_base(
    runs: list[Path], pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_pipeline(tmp_path / "parts", beta_end=0.02).save_pretrained(tmp_path / "model")
    other = make_run(tmp_path / "other", tmp_path / "model")
    finer = make_run(tmp_path / "finer", pipeline_folder, num_inference_steps=3)
    path = tmp_path / "a.json"
    assert main(["eval", *map(str, [*runs, other, finer]), "--num-images", "1", "--output", str(path)]) == 0
    said = json.loads(path.read_text())
    sets = {source: how["base_images"] for source, how in said["settings"]["sources"].items()}
    assert sets == {str(runs[0]): 0, str(runs[1]): 0, str(other): 1, str(finer): 2}
    base = {row["source"]: row["base"] for row in said["scores"] if row["score"] == "brightness"}
    assert base[str(runs[0])] == base[str(runs[1])]
    assert len(set(base.values())) == 3
    # One number of steps for all: runs of one model share again.
    command = ["eval", str(runs[0]), str(finer), "--num-inference-steps", "2", "--num-images", "1"]
    assert main([*command, "--output", str(path)]) == 0
    assert {row["base"] for row in json.loads(path.read_text())["scores"]} == {
        row["base"] for row in said["scores"] if row["source"] == str(runs[0])
    }


def test_weights_are_stored_as_in_the_run(runs: list[Path], pipeline_folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "bf16", pipeline_folder, mixed_precision="bf16")

    def weights(source: Path, **values: str) -> torch.dtype:
        return load_for_sampling(str(source), device="cpu", **values)[0].denoiser.dtype  # type: ignore[arg-type]

    assert weights(run) == weights(run / "best") == torch.bfloat16
    assert weights(run, precision="no") == weights(runs[0]) == weights(pipeline_folder) == torch.float32
    assert weights(runs[0], precision="bf16") == torch.bfloat16
    # A leaderboard of both has two base models.
    board = compare(resolve_loras([str(run), str(runs[0])]), resolve_eval_spec(resolve_loras([str(run)]), num_images=1))
    assert {entry.tuned.source: entry.base for entry in board.entries} == {str(run): 0, str(runs[0]): 1}


def test_a_lora_outside_a_run_draws_like_the_runs_beside_it(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes((runs[1] / "lora" / "pytorch_lora_weights.safetensors").read_bytes())
    alone = resolve_lora(str(plain))
    assert not alone.in_run
    # Not what is recommended for its model, but what its file says: make_run's model was on its own grid.
    assert alone.settings.timestep_spacing == "trailing"
    assert alone.drawing["timestep_spacing"] == "leading"
    monkeypatch.chdir(runs[1] / "lora")
    assert resolve_lora(".").settings == resolve_lora(str(runs[1])).settings
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(plain), foreign, {"base_model": alone.base})
    assert "timestep_spacing" not in resolve_lora(str(foreign)).drawing
    first, second = resolve_loras([str(plain), str(runs[0])])
    assert first.drawing == second.drawing
    board = compare(resolve_loras([str(plain), str(runs[1])]), resolve_eval_spec([second], num_images=1))
    assert board.entries[0].scores == board.entries[1].scores


def test_mistakes_get_one_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs[0])
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes((runs[0] / "lora" / "pytorch_lora_weights.safetensors").read_bytes())
    gone = tmp_path / "gone"
    (gone / "lora").mkdir(parents=True)
    (gone / "lora" / "pytorch_lora_weights.safetensors").write_bytes(plain.read_bytes())
    settings = Settings(model=resolve_lora(run).base, prompts="3 prompts given in Python", reward="my_function")
    (gone / "config.yaml").write_text(settings.to_yaml())
    cases = {
        "LoRA missing": ["eval", str(tmp_path / "missing")],
        "missing.txt": ["eval", run, "--prompts", str(tmp_path / "missing.txt")],
        "'brightnes' 'brightness'": ["eval", run, "--reward", "brightnes"],
        "'eval/saturatio' 'eval/saturation'": [
            "eval",
            run,
            "--sort",
            "eval/saturatio",
        ],
        "x.txt .csv .json": ["eval", run, "--output", "x.txt"],
        "--image-dir folder": ["eval", run, "--image-dir", str(plain)],
        "plain.safetensors --prompts --reward": ["eval", str(plain)],
        "--prompts": ["eval", str(gone)],
        "--reward": ["eval", str(gone), "--prompts", "animals"],
        "--num-images 0": ["eval", run, "--num-images", "0"],
        "RUN": ["eval"],
    }
    for message, argv in cases.items():
        code = main(argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draftune: ")]
        assert (code, len(lines)) == (2, 1), (argv, lines)
        assert mentions(lines[0], message), (message, lines[0])
