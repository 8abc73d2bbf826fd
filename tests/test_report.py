"""The page of a run: what it says, what it holds, and what it leaves alone."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from draftune.cli.main import build_parser, expressions_joined, main
from draftune.cli.train import train_settings
from draftune.errors import DraftuneError
from draftune.evaluation.metrics import Comparison, Evaluation
from draftune.evaluation.verdict import UNDECIDED, moved, number, two_errors
from draftune.report import collect, write_report
from draftune.report.card import over_optimization
from draftune.report.collect import MOST_FRAMES
from draftune.report.images import PIXELS, evenly, fitting
from draftune.report.loopback import is_loopback
from draftune.report.scores import score_table
from draftune.report.serve import Server
from draftune.report.settings_table import changed, command
from draftune.report.summary import held_out_weights, summary, sweep_note
from draftune.rewards import load_reward
from draftune.settings import Settings
from draftune.utils.tables import duration
from helpers.errors import mentions, raises

HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "a 'quoted' \u2028 & plain one"]
REWARD = "aesthetic"


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def written_run(folder: Path, shown: Sequence[int] = (0, 20, 40), size: int = 32, **settings: Any) -> Path:
    """A run of 40 updates as training leaves it, with pictures of a colour of their own for each update and prompt."""
    folder.mkdir(parents=True)
    asked = {"reward": REWARD, "eval_rewards": "judge", "steps": 40, "output": str(folder), **settings}
    (folder / "config.yaml").write_text(Settings.from_mapping(asked).to_yaml(), encoding="utf-8")
    metrics = [
        {
            "step": step,
            "reward": 4 + 0.1 * step,
            "reward_std": 0.5,
            "reward_queries": 12 * step,
            "grad_norm": 10 ** (step / 20),
            "learning_rate": 1e-3,
            "train_seconds": 90.0 * step,
        }
        for step in range(1, 41)
    ]
    lines(folder / "metrics.jsonl", metrics)
    judged = {0: 0.5, 10: 0.7, 20: 0.9, 30: 0.8, 40: 0.6}
    evaluations = [
        {
            "step": step,
            "reward_queries": 12 * step,
            "train_seconds": 90.0 * step,
            REWARD: 4 + 0.1 * step,
            "eval/judge": score,
            "eval/diversity": 0.4 - 0.001 * step,
            "pixel_l1_from_base": 0.01 * step,
            "denoiser_mse_from_base": 1e-4 * step,
            "stderr": {
                REWARD: 0.25,
                "eval/judge": 0.01,
                "eval/diversity": 0.1,
                "pixel_l1_from_base": 0.0,
                "denoiser_mse_from_base": 0.0,
            },
            "best": step <= 20,
        }
        for step, score in judged.items()
    ]
    lines(folder / "evaluations.jsonl", evaluations)
    show(folder, shown, size)
    (folder / "environment.json").write_text(json.dumps({"draftune": "0.1.0", "device": "cpu"}))
    (folder / "reward_check.json").write_text(json.dumps({REWARD: {"score": 4.0, "gradient_norm": 0.12}}))
    sweep = folder / "sweep"
    for i, scale in enumerate(("0.00", "1.00")):
        colored(sweep / scale / "00.png", (i * 100, 50, 0), size)
    found = {"scales": [0, 1], "columns": {REWARD: [4, 8]}, "stderr": {REWARD: [0.1, 0.2]}, "criterion": None}
    found |= {"recommended": 1, "prompts": ["cat"], "images": [["0.00/00.png"], ["1.00/00.png"]]}
    (sweep / "sweep.json").write_text(json.dumps(found))
    return folder


def show(folder: Path, steps: Sequence[int], size: int) -> None:
    """The pictures after these updates, and their scores."""
    for step in steps:
        for i in range(len(HOSTILE)):
            colored(folder / "samples" / f"step-{step:06d}" / f"{i:02d}.png", (step, 80 * i, 200), size)
    rows = [{"step": step, "prompts": HOSTILE, "scores": [step + i for i in range(len(HOSTILE))]} for step in steps]
    lines(folder / "samples.jsonl", rows)


def colored(path: Path, color: tuple[int, int, int], size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), color).save(path)


def opened(uri: str) -> Image.Image:
    kind, _, text = uri.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


class Elements(HTMLParser):
    """The elements of a page by name, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and data.strip():
            self.scripts.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written_run(tmp_path / "run")


def test_the_page_holds_everything_and_asks_for_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Elements(text)
    names = [name for name, _ in page.found]
    assert (names.count("script"), names.count("h1"), names.count("title")) == (2, 1, 1)
    assert ("html", {"lang": "en"}) in page.found
    assert not re.search(r"(src|href)=[\"'](?!data:,)", text.partition("<script")[0])
    policy = next(attributes["content"] for name, attributes in page.found if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "connect-src" not in policy
    assert "unsafe" not in policy
    data = json.loads(page.scripts[0])
    assert "<" not in page.scripts[0]
    assert data["samples"]["prompts"] == data["pairs"]["prompts"] == HOSTILE


def test_the_verdict_is_made_of_the_numbers(run: Path) -> None:
    data = collect(run)
    assert data["summary"] == (
        "In 40 updates the reward rose from 4 to 8 (+3.29 to +4.71). The LoRA in best/ is from update 20. "
        "Changes have their 95 % intervals in parentheses."
    )
    assert data["scores"] == {
        "head": ["score", "role", "base model", "update 40", "change", "best/, update 20"],
        "rows": [
            ["aesthetic", "trained on", "4 ± 0.5", "8 ± 0.5", "rose (+3.29 to +4.71)", "6 ± 0.5"],
            ["judge", "not trained on", "0.5 ± 0.02", "0.6 ± 0.02", "rose (+0.0717 to +0.128)", "0.9 ± 0.02"],
            [
                "diversity",
                "not trained on",
                "0.4 ± 0.2",
                "0.36 ± 0.2",
                "no measurable difference (-0.323 to +0.243)",
                "0.38 ± 0.2",
            ],
        ],
        "note": "Means over the evaluation images ± two standard errors; changes with their 95 % intervals.",
    }
    assert data["warning"] == (
        "Over-optimization: eval/judge fell from 0.900 at update 20 to 0.600, and the reward went from 6.000 to 8.000. "
        "This was first seen at update 40."
    )
    facts = dict(data["facts"])
    assert (facts["Updates"], facts["Scored images"], facts["Training time"]) == ("40 of 40", "480", "1 h")
    (run / "evaluations.jsonl").unlink()
    data = collect(run)
    # The means of updates 1 to 10 and of 31 to 40.
    assert data["summary"] == (
        "In 40 updates the reward of the training images rose from 4.55 to 7.55 (+2.73 to +3.27), as means of 10 "
        "updates. Changes have their 95 % intervals in parentheses."
    )
    assert data["warning"] is data["best"] is None


def test_words_for_numbers() -> None:
    unknown = two_errors(0.0, None)
    assert moved(1.0, 1.1, (0.02, 0.18)) == "rose from 1 to 1.1 (+0.02 to +0.18)"
    assert moved(1.0, 0.9, (-0.22, 0.02)) == "went from 1 to 0.9, no measurable difference (-0.22 to +0.02)"
    assert moved(1.0, 0.9, unknown) == "went from 1 to 0.9, no measurable difference (its error is not known)"
    assert moved(2.0, 2.0, unknown) == "stayed at 2"
    assert moved(None, 2.0, unknown) == "is unknown"
    assert [number(value) for value in (0.12345, 12345.6, -3.0)] == ["0.1235", "12,346", "-3"]
    assert [duration(seconds) for seconds in (0, 59.6, 200, 7500, 277_000)] == [
        "0 s", "1 min", "3 min 20 s", "2 h 5 min", "3 d 4 h"
    ]  # fmt: skip
    rows = [{"step": 1, "reward": None}, {"step": 2, "reward": None, "nonfinite_steps": 2}]
    said = summary(Settings(steps=9), rows, [], None)
    assert said == (
        "In 2 of 9 updates the reward of the training images is unknown. "
        "2 updates were skipped, since a reward or a gradient was not finite."
    )


def test_the_parts_of_a_reward_are_in_its_table() -> None:
    row = {"step": 0, "reward_queries": 0, "train_seconds": 0.0, "a - 2*b": 0.5, "a": 1.5, "b": 0.5, "eval/judge": 1.0}
    row |= {"pixel_l1_from_base": 0.0, "denoiser_mse_from_base": 0.0, "stderr": {}, "best": True}
    assert [cells[:2] for cells in score_table([row], "a - 2*b", "").rows] == [
        ["a - 2*b", "trained on"],
        ["a", "a part of it"],
        ["b", "a part of it"],
        ["judge", "not trained on"],
    ]


def test_nothing_is_said_before_an_interval_excludes_0(run: Path) -> None:
    """The rule is one: of the page, the card, the warning, a sweep's scale and the table after training."""
    first, last = ({"reward_queries": 0, "train_seconds": 0.0, "step": step} for step in (0, 2))
    first |= {REWARD: 4.0, "eval/judge": 0.5, "stderr": {REWARD: 0.3, "eval/judge": 0.1}}
    settings = Settings(steps=2, reward=REWARD, eval_rewards="judge")
    metrics = [{"step": i, "reward": value} for i, value in ((1, 4.0), (2, 5.0))]
    for value, errors, decided in ((4.8, {REWARD: 0.3}, False), (4.9, {REWARD: 0.3}, True), (9.0, {}, False)):
        row = last | {REWARD: value, "eval/judge": 0.6, "stderr": errors | {"eval/judge": 0.1}}
        text = summary(settings, metrics, [first, row], REWARD)
        assert ("reward rose" in text) == decided, text
        assert text.startswith("Nothing can be said of the reward yet") != decided
        assert score_table([first, row], REWARD, "").rows[1][-1] == "no measurable difference (-0.183 to +0.383)"
        assert "highest" not in text
        # The interval of the change that is paired by prompt, which the run stored, is narrower.
        paired = row | {"change": {REWARD: [-0.1, 1.7], "eval/judge": [0.02, 0.18]}}
        text = summary(settings, metrics, [first, paired], REWARD)
        assert "Nothing can be said" in text
        assert score_table([first, paired], REWARD, "").rows[1][-1] == "rose (+0.02 to +0.18)"
    # Two updates, each with one mean, have no error; a column that was measured once has not moved.
    assert "Nothing can be said" in summary(settings, metrics, [], None)
    row |= {"eval/judge": None}
    assert score_table([first, row], REWARD, "").rows[1][2:] == ["0.5 ± 0.2", "not finite", ""]
    assert "measured once only" in summary(settings, metrics, [first, row | {REWARD: None}], REWARD)
    assert mentions(over_optimization(settings, [first, row], REWARD), "too few")
    for low, words in ((0.01, "is better"), (-0.01, "no measurable difference")):
        sweep = {"recommended": 0.5, "criterion": "eval/judge", "improvement": [0.1, low, 0.21]}
        assert words in sweep_note(sweep)
    base, tuned = (
        Evaluation({REWARD: torch.tensor(values)[:, None]}, ["cat", "dog"], torch.zeros(2, 3, 2, 2))
        for values in ([1.0, 2.0], [1.5, 4.0])
    )
    assert UNDECIDED in Comparison(base, tuned).table()
    assert UNDECIDED not in Comparison(base, replace(base, values={REWARD: base.values[REWARD] + 1})).table()
    assert math.isnan(replace(base, values={REWARD: torch.zeros(1, 3)}).stderr[REWARD])
    # A log whose evaluations have no score.
    lines(run / "evaluations.jsonl", [{key: row[key] for key in ("step", "reward_queries", "train_seconds", "stderr")}])
    assert collect(run)["summary"].startswith("In 40 updates the reward of the training images rose")


def test_the_curves(run: Path) -> None:
    charts = {chart["key"]: chart for chart in collect(run)["charts"]}
    keys = [
        "reward",
        REWARD,
        "eval/judge",
        "eval/diversity",
        "pixel_l1_from_base",
        "denoiser_mse_from_base",
        "grad_norm",
    ]
    assert list(charts) == keys
    judge = charts["eval/judge"]
    assert judge["values"] == [0.5, 0.7, 0.9, 0.8, 0.6]
    assert judge["spread"] == [0.02] * 5
    assert judge["x"] == {
        "step": [0, 10, 20, 30, 40],
        "reward_queries": [0, 120, 240, 360, 480],
        "train_seconds": [0.0, 900.0, 1800.0, 2700.0, 3600.0],
    }
    assert charts["reward"]["spread"] == [0.5] * 40
    assert charts["pixel_l1_from_base"]["spread"] is None
    assert [key for key in keys if charts[key]["log"]] == ["grad_norm"]
    assert charts["grad_norm"]["values"][19] == 10.0
    scale = collect(run)["sweep"]["charts"][0]
    assert (scale["x"], scale["values"], scale["spread"]) == ({"scale": [0, 1]}, [4, 8], [0.2, 0.4])


def test_parts_and_numbers_that_are_none(run: Path) -> None:
    (run / "evaluations.jsonl").unlink()
    row = {"reward_queries": 1, "train_seconds": 1, "reward/clip": 1.0, "reward": 2.0, "grad_norm": float("inf")}
    lines(run / "metrics.jsonl", [{"step": 1, **row}, {"step": 2, **row, "reward/clip": None}])
    charts = {chart["key"]: chart["values"] for chart in collect(run)["charts"]}
    assert charts == {"reward": [2, 2], "reward/clip": [1, None], "grad_norm": [None, None]}
    write_report(run)


def test_the_pictures_are_those_of_the_run(run: Path) -> None:
    data = collect(run)
    frames = data["samples"]["frames"]
    assert [(frame["at"], frame["scores"]) for frame in frames] == [
        (0, [0, 1, 2]),
        (20, [20, 21, 22]),
        (40, [40, 41, 42]),
    ]
    for frame in frames:
        for i, digest in enumerate(frame["images"]):
            # As small as they are they are kept exactly.
            assert opened(data["images"][digest]).getcolors() == [(32 * 32, (frame["at"], 80 * i, 200))]
    assert [frame["at"] for frame in data["pairs"]["frames"]] == [0, 40]
    swept = [opened(data["images"][frame["images"][0]]).getpixel((0, 0)) for frame in data["sweep"]["frames"]]
    assert swept == [(0, 50, 0), (100, 50, 0)]
    used = {key for part in ("samples", "pairs", "sweep") for frame in data[part]["frames"] for key in frame["images"]}
    assert set(data["images"]) == used
    assert len(used) == 3 * 3 + 2


def test_large_pictures_become_smaller(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", shown=[0, 40], size=600)
    noise = np.random.default_rng(0).integers(0, 256, (600, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "samples" / "step-000040" / "01.png")
    data = collect(run)
    first, last = data["pairs"]["frames"]
    assert opened(data["images"][first["images"][0]]).size == (384, 384)
    assert opened(data["images"][last["images"][1]]).size == (192, 384)


def test_a_long_run_is_thinned_out(tmp_path: Path) -> None:
    steps = list(range(41))
    run = written_run(tmp_path / "run", shown=steps, size=8)
    best = [{**json.loads(line), "best": False} for line in (run / "evaluations.jsonl").read_text().splitlines()]
    best[1] |= {"best": True, "step": 11}
    lines(run / "evaluations.jsonl", best)
    shown = [frame["at"] for frame in collect(run)["samples"]["frames"]]
    assert len(shown) == MOST_FRAMES
    assert {0, 11, 40} <= set(shown)
    assert max(b - a for a, b in pairwise(shown)) <= 3
    for count, most, always in ((100, 10, [1]), (100, 10, [98]), (25, 24, [24]), (10, 10, [3]), (1000, 3, [500])):
        chosen = evenly(count, most, always)
        assert len(chosen) == len(set(chosen)) == min(count, most)
        assert {0, count - 1, *always} <= set(chosen)
    # 24 updates of 8 prompts, and 10 of 2.
    assert (fitting(192), fitting(20), fitting(10_000)) == (192, 384, 128)
    assert 192 * 256**2 > PIXELS >= 192 * 192**2


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 7\n")
    data = collect(tmp_path)
    assert data["summary"] == "No update has been made yet."
    assert dict(data["facts"])["Updates"] == "0 of 7"
    assert data["charts"] == data["samples"]["frames"] == data["sweep"]["frames"] == data["reward_check"] == []
    write_report(tmp_path, tmp_path / "page" / "new.html")
    assert (tmp_path / "page" / "new.html").stat().st_size > 10_000


def test_nothing_outside_the_sweep_is_shown(run: Path, tmp_path: Path) -> None:
    colored(tmp_path / "private.png", (1, 2, 3), 8)
    found = json.loads((run / "sweep" / "sweep.json").read_text())
    for name in ("../../private.png", str(tmp_path / "private.png")):
        found["images"][1] = [name]
        (run / "sweep" / "sweep.json").write_text(json.dumps(found))
        assert [frame["at"] for frame in collect(run)["sweep"]["frames"]] == [0]
    for text in ("[1", "[]", '{"columns": {"a": [1]}}'):
        (run / "sweep" / "sweep.json").write_text(text)
        assert collect(run)["sweep"] == {
            "prompts": [],
            "frames": [],
            "charts": [],
            "note": "",
            "recommended": None,
        }


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model": "some/model", "steps": 10, "lora_alpha": 4.0, "height": 64, "learning_rate": 1e-5},
        {"reward": "-2*brightness + 'a b.py:f'(k=\"it's\")", "eval_rewards": "-1*clip", "method": "draft_lv(n=3)"},
        {
            "negative_prompt": "--blurry 'x'\n$HOME",
            "eval_prompts": "",
            "device": "cpu",
            "gradient_checkpointing": "both",
        },
        {"method": "draft_lv", "prefix_reuse_steps": 4},
        {"set_alpha_to_one": False, "timestep_spacing": "leading", "output": "runs/a b", "seed": 2**32 - 1},
    ],
)
def test_the_command_gives_the_same_settings(values: dict[str, Any]) -> None:
    settings = Settings(**values)
    assert set(changed(settings)) == set(values)
    program, *words = shlex.split(command(settings))
    assert program == "draftune"
    assert train_settings(build_parser().parse_args(expressions_joined(words))) == settings


def test_mistakes_get_one_line_and_code_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(written_run(tmp_path / "broken") / "metrics.jsonl", [{"reward": 1}])
    (tmp_path / "file").write_text("")
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = {
            f"run {tmp_path}": ["report", str(tmp_path)],
            "nowhere config.yaml": ["watch", str(tmp_path / "nowhere")],
            f"{tmp_path} folder file": ["report", str(run), "--output", str(tmp_path)],
            "page.html": ["report", str(run), "--output", str(tmp_path / "file" / "page.html")],
            "metrics.jsonl": ["report", str(tmp_path / "broken")],
            "--port 0 65535": ["watch", str(run), "--port", "70000"],
            f"port {taken.getsockname()[1]}": ["watch", str(run), "--port", str(taken.getsockname()[1])],
        }
        for message, argv in cases.items():
            code = main(argv)
            said = capsys.readouterr().err.strip().splitlines()
            assert (code, len(said)) == (2, 1), (argv, said)
            assert mentions(said[0], message), (message, said[0])


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    with Server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str, **headers: str) -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_the_live_page_follows_the_run(server: Server, run: Path) -> None:
    status, text = ask(server, "/")
    assert status == 200
    assert "connect-src 'self'" in text
    before = json.loads(Elements(text).scripts[0])
    assert ask(server, "/data", **{"If-None-Match": before["stamp"]}) == (304, "")
    show(run, [0, 20, 40, 60], 32)
    status, text = ask(server, "/data", **{"If-None-Match": before["stamp"]})
    after = json.loads(text)
    assert status == 200
    assert after["stamp"] != before["stamp"]
    assert [frame["at"] for frame in after["samples"]["frames"]] == [0, 20, 40, 60]
    new = set(after["images"]) - set(before["images"])
    assert new == set(after["samples"]["frames"][-1]["images"])
    colors = [opened(ask(server, f"/images/{d}")[1]).getpixel((0, 0)) for d in after["samples"]["frames"][-1]["images"]]
    assert colors == [(60, 80 * i, 200) for i in range(3)]
    # While a file is half written, the page shows what was there.
    (run / "config.yaml").write_text("steps: [")
    assert json.loads(ask(server, "/data")[1]) == after


def test_nothing_but_the_page_is_served_and_only_to_this_machine(server: Server, run: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    paths = ["/config.yaml", "/images/", "/images/../config.yaml", "/../run/config.yaml", "/%2e%2e/config.yaml"]
    for path in [*paths, f"/{run}/config.yaml", "/data/", "/report.html"]:
        status, text = ask(server, path)
        assert status == 404, path
        assert "eval_rewards" not in text
    for host, status in {"evil.example": 403, "127.0.0.1.evil.example:80": 403, "localhost:99": 200}.items():
        assert ask(server, "/", Host=host)[0] == status
    assert [is_loopback(host) for host in ("[::1]:8642", "127.0.0.1", "", "[", "user@evil")] == [
        True, True, False, False, False
    ]  # fmt: skip
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)) as connection:
        connection.request("POST", "/data", body="x")
        assert connection.getresponse().status == 501


def test_watch_says_its_address_and_ends_with_the_user(run: Path) -> None:
    command = [sys.executable, "-m", "draftune", "watch", str(run), "--port", "0"]
    # Whoever starts the tests in the background of a shell has signals of the keyboard ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stdout is not None
    address = process.stdout.readline().split()[0]
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert "<h1>run</h1>" in answer.read().decode()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)


def test_a_real_run_has_its_page(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\ndog\nbird\n")
    folder = tmp_path / "run"
    command = ["train", "--model", str(pipeline_folder), "--output", str(folder), "--num-inference-steps", "2"]
    command += ["--reward", "brightness - 0.5*saturation", "--eval-rewards", "saturation", "--steps", "2"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--eval-prompts", str(tmp_path / "prompts.txt")]
    assert main([*command, "--batch-size", "1", "--validation-steps", "1", "--log-images-steps", "1"]) == 0
    data = collect(folder)
    charts = {chart["key"]: chart["values"] for chart in data["charts"]}
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert charts["eval/saturation"] == pytest.approx([row["eval/saturation"] for row in rows], rel=1e-4)
    assert {"brightness", "saturation", "pixel_l1_from_base", "denoiser_mse_from_base", "grad_norm"} <= set(charts)
    assert data["best"] in (0, 1, 2)
    assert [frame["at"] for frame in data["samples"]["frames"]] == [0, 1, 2]
    assert data["samples"]["prompts"] == ["cat", "dog", "bird"]
    with Image.open(folder / "samples" / "step-000002" / "01.png") as picture:
        shown = opened(data["images"][data["samples"]["frames"][2]["images"][1]])
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(shown))
    assert [part for part, _ in data["reward_check"]] == ["brightness", "saturation"]
    assert dict(data["environment"])["draftune"]
    assert write_report(folder).stat().st_size > 10_000


def test_a_run_is_wanted() -> None:
    with raises(DraftuneError, "run nowhere"):
        write_report("nowhere")


def test_a_long_name_of_a_score_is_cut_in_the_terminal() -> None:
    name = " + ".join(["emoji_clip(template='a photo of {prompt}')"] * 3)
    evaluation = Evaluation({name: torch.zeros(2, 1), "b": torch.zeros(2, 1)}, ["a", "b"], torch.rand(2, 3, 8, 8))
    lines = Comparison(evaluation, evaluation).table().splitlines()
    assert lines[0].startswith(f"{name[:39]}…  ")
    assert len({line.index("→") for line in lines}) == 1


def test_weights_of_evaluation_rewards_have_the_names_of_their_columns(tmp_path: Path) -> None:
    """The report only has the expression; training names the columns by the rewards' labels."""
    (tmp_path / "mine.py").write_text("def bad(images, prompts):\n    return images.mean((1, 2, 3))\n")
    parts = ["saturation", "0.5*relative(emoji_clip, good='a', bad='b')", f"2*'{tmp_path}/mine.py:bad'"]
    parts += ["sharpness_aware(saturation + 0.25*brightness, rho=0.1)", "jpeg_compressibility(quality=10)"]
    text = " - ".join([*parts, "jpeg_compressibility(quality=90)"])
    weights = held_out_weights(Settings(eval_rewards=text))
    for name, (weight, _) in load_reward(text).named_terms.items():
        assert weights[f"eval/{name}"] == weight
