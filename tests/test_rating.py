"""Comparing images: the pairs, the server, the command, and restored images."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.evaluation.rating import Pair, pair_settings, pairs, read_settings, restore_images, sampler, stored
from draftune.models import load_model
from draftune.report.rating import RatingServer, RatingSession, png
from draftune.rewards.comparisons import comparison, image_path, placed, read_comparisons, write_comparisons
from draftune.settings import Settings
from draftune.utils.images import open_image
from helpers.errors import mentions, raises


def test_pairs_go_round_the_prompts_and_share_no_image() -> None:
    asked = pairs(["a", "b", "c", "a"], 8, seed=5)
    order = [pair.prompt for pair in asked]
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert order == [*order[:3], *order[:3], *order[:2]]
    assert pairs(["a", "b", "c"], 5, seed=5) == asked[:5]
    names = [f"{i:03d}" for i in range(100)]
    assert max(pair.prompt for pair in pairs(names, 20)) > "050"  # not the first of a sorted file
    assert asked[0].seeds == asked[1].seeds == (5, 6)
    assert len({(pair.prompt, seed) for pair in asked for seed in pair.seeds}) == 16


def row_of(pair: Pair, choice: str) -> Any:
    return comparison(pair.prompt, choice, "m", None, pair.seeds, {})


def gray(prompt: str, seeds: Any) -> Tensor:
    return torch.stack([torch.full((3, 4, 4), seed / 255) for seed in seeds])


def test_answers_in_the_file_are_not_asked_again(tmp_path: Path) -> None:
    path, asked = tmp_path / "taste.csv", pairs(["a", "b"], 4)
    other = comparison("a", "left", "another model", None, (0, 1), {})
    write_comparisons(path, [placed(other, path), placed(row_of(asked[2], "skip"), path)])
    session = RatingSession(path, asked, row_of, gray)
    assert [row.prompt for row in session.open_rows] == [asked[i].prompt for i in (0, 1, 3)]
    state = session.state()
    assert (state["done"], state["total"], state["images"]) == (1, 4, None)
    # Each pair is answered as soon as it has images, in order.
    thread = Thread(target=session.run)
    thread.start()
    for expected in ("left", "right", "skip"):
        while (state := session.state())["images"] is None:
            time.sleep(0.01)
        session.answer(state["images"][::-1], expected)  # not the present pair
        session.answer(state["images"], expected)
    session.finished_seen.set()
    thread.join()
    rows = read_comparisons(path)
    assert [row.choice for row in rows] == ["left", "skip", "left", "right", "skip"]
    assert open_image(image_path(path, rows[2].right_image))[0, 0, 0, 0] * 255 == 1
    assert not image_path(path, rows[4].left_image).exists()


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    """Answers of both stay, also of threads that write at once, and each takes back its own only."""
    path, asked = tmp_path / "taste.csv", pairs(["a", "b"], 24)
    first, second = (RatingSession(path, part, row_of, gray) for part in (asked[:12], asked[12:]))

    def answer(session: RatingSession, choice: str) -> None:
        row = session.open_rows[0]
        session.images = dict.fromkeys(row.images, png(torch.zeros(3, 4, 4)))
        session.answer(row.images, choice)

    def answer_some(session: RatingSession, choice: str) -> None:
        for _ in range(10):
            answer(session, choice)

    threads = [Thread(target=answer_some, args=pair) for pair in ((first, "left"), (second, "right"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_comparisons(path)
    assert len({row.pair for row in rows}) == 20
    first.undo()
    assert read_comparisons(path) == [row for row in rows if row != last_of(rows, "left")]
    assert (first.done, second.done) == (9, 10)
    # A pair that the other process has asked too keeps both answers.
    third = RatingSession(path, asked[:12], row_of, gray)
    answer(first, "left")
    answer(third, "right")
    assert [row.choice for row in read_comparisons(path)[-2:]] == ["left", "right"]
    assert third.done == 10


def last_of(rows: list[Any], choice: str) -> Any:
    return [row for row in rows if row.choice == choice][-1]


def test_a_failing_disk_ends_the_command(tmp_path: Path) -> None:
    session = RatingSession(tmp_path / "taste.csv", pairs(["a"], 1), row_of, gray)
    with RatingServer(0, "later") as server:
        server.session = session
        ran: list[BaseException] = []

        def run() -> None:
            try:
                session.run()
            except DraftuneError as error:
                ran.append(error)

        thread = Thread(target=run)
        thread.start()
        while (state := session.state())["images"] is None:
            time.sleep(0.01)
        (tmp_path / "taste-images").write_text("a file is in the way of the folder")
        assert post(server, {"images": state["images"], "choice": "left"})[0] == 500
        thread.join(10)
        assert mentions(str(ran[0]), "taste.csv")


def post(server: RatingServer, body: Any, path: str = "/answer", **headers: str) -> tuple[int, str]:
    own = {"Origin": f"http://127.0.0.1:{server.server_port}"} | headers
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)) as connection:
        connection.request("POST", path, json.dumps(body), own)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_only_the_own_page_may_answer(tmp_path: Path) -> None:
    path = tmp_path / "taste.csv"
    session = RatingSession(path, pairs(["a"], 2), row_of, gray)
    with RatingServer(0, "later") as server:
        assert json.loads(post(server, {"images": [], "choice": "left"})[1]) == {"idle": "later"}
        server.session = session
        stopped = Event()
        thread = Thread(target=session.run, args=(stopped.is_set,))
        thread.start()
        while (images := session.state()["images"]) is None:
            time.sleep(0.01)
        good = {"images": images, "choice": "left"}
        for origin in ("http://evil.example", "null", "https://127.0.0.1", f"http://localhost:{server.server_port}"):
            assert post(server, good, Origin=origin)[0] == 403, origin
        assert post(server, good, Origin="http://evil.example", Host="evil.example")[0] == 403
        assert post(server, good | {"more": "x" * 2000})[0] == 413
        for bad in ([], {"images": 3, "choice": "left"}, {"choice": "left"}, "x"):
            assert post(server, bad)[0] == 400, bad
        post(server, {"images": images, "choice": "both"})
        assert not path.exists()
        assert json.loads(post(server, good)[1])["done"] == 1
        assert json.loads(post(server, good, "/undo")[1])["done"] == 0
        assert not path.exists()
        stopped.set()
        thread.join()
        for wrong in ("/images/", "/images/../taste.csv", "/taste.csv", "/state/"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(server.address + wrong.removeprefix("/"), timeout=10)


@pytest.mark.slow
def test_the_command_asks_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("pizza\nsun\n")
    command = [sys.executable, "-m", "draftune", "rate", "emoji", "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--output", str(tmp_path / "my.csv"), "--num-comparisons", "2", "--num-inference-steps", "1"]
    for done in (0, 1):
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
        )
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        state: dict[str, Any] = {}
        while state.get("images") is None:
            with urllib.request.urlopen(address + "state", timeout=20) as answer:
                state = json.load(answer)
            time.sleep(0.05)
        assert (state["done"], state["total"]) == (done, 2)
        body = json.dumps({"images": state["images"], "choice": "left"}).encode()
        request = urllib.request.Request(address + "answer", body, {"Origin": address.rstrip("/")})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert json.load(answer)["finished"] == bool(done)
        if not done:
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
        assert mentions(output, "my.csv", done + 1, "of 2")
    rows = read_comparisons(tmp_path / "my.csv")
    assert sorted(row.prompt for row in rows) == ["pizza", "sun"]
    assert json.loads(rows[0].settings) == {"guidance_scale": 1.0, "num_inference_steps": 1}
    # The images are those that the row describes: they are sampled again, bit for bit.
    folder = tmp_path / "my-images"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    assert main(["rate", "--restore-images", str(tmp_path / "my.csv")]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["emoji"], "--prompts"),
        (["--prompts", "emoji"], "RUN_OR_MODEL"),
        (["emoji", "--prompts", "emoji", "--num-comparisons", "0"], "--num-comparisons 1 0"),
        (["emoji", "--prompts", "emoji", "--port", "65536"], "--port 65536"),
        (["emoji", "--prompts", "emoji", "--output", "a.json"], "--output .csv 'a.json'"),
        (["emoji", "--prompts", "emojis"], "emojis"),
        (["nowhere/at-all", "--prompts", "emoji", "--port", "0"], "nowhere"),
        (["--restore-images", "none.csv"], "none.csv"),
    ],
)
def test_wrong_arguments(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rate", *flags]) == 2
    assert mentions(capsys.readouterr().err, words)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_sampled_again_is_named(tmp_path: Path) -> None:
    path = tmp_path / "taste.csv"
    rows = [comparison("a", "left", "run", 40, (0, 1), {}), comparison("b", "skip", "emoji", None, (0, 1), {})]
    write_comparisons(path, [placed(row, path) for row in rows])
    assert mentions(restore_images(path), "2 cannot", placed(rows[0], path).left_image)
    for text in ("[", "3", '{"size": 3}'):
        with raises(DraftuneError, path):
            read_settings(path, text)
    assert pair_settings(Settings(), lora_scale=0.5, precision=None) == {
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "lora_scale": 0.5,
    }


def test_images_of_a_pair_do_not_depend_on_each_other() -> None:
    model = load_model("emoji", text_encoders=False)
    sample = sampler(model, Settings(num_inference_steps=2), ["pizza", "rocket", "pizza"])
    both = sample("pizza", (3, 4))
    assert torch.equal(both, torch.cat([sample("pizza", (3,)), sample("pizza", (4,))]))
    # The text encoder is read once for all prompts.
    sample("rocket", (0,))
    assert model.embeddings is not None
    assert model.embeddings.rounds == 1


def test_a_stored_image_is_not_written_twice(tmp_path: Path) -> None:
    path = stored(torch.zeros(3, 4, 4), tmp_path / "a.png")
    stored(torch.ones(3, 4, 4), path)
    assert open_image(path).max() == 0
