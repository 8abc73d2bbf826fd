"""The built wheel in an empty folder: commands, page, examples and notebook run, and nothing is sent anywhere."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest

import draftune

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
DIST_INFO = f"draftune-{draftune.__version__}.dist-info"
MOST_MEGABYTES = 60
TESTS_OF_THE_WHEEL = (
    "test_examples.py",
    "test_notebook.py",
    # It watches the sockets of its server and its runs itself, and is skipped without a browser.
    "test_browser_ui.py::test_from_the_form_to_a_lora_by_keyboard",
)
SMALL = ["--num-inference-steps", "2", "--batch-size", "1", "--eval-prompts", "", "--num-log-prompts", "1"]
# In one process, because importing torch and diffusers takes longer than most of the commands.
RUN = """
import ast, sys, draftune
from draftune.cli.main import main
_, site, commands, *tests = sys.argv
assert draftune.__file__.startswith(site), draftune.__file__
for argv in ast.literal_eval(commands):
    assert main(argv) == 0, argv
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "--basetemp", "tests", *tests]))
"""
# Python imports this file at its start. It writes the address or name in each call that reaches for another process.
SITECUSTOMIZE = """
import os, sys

def write(event, arguments):
    if event in ("socket.bind", "socket.connect", "socket.sendmsg", "socket.sendto"):
        place = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname"):
        place = tuple(arguments[:2])
    else:
        return
    with open(os.environ["SOCKETS"], "a") as file:
        file.write(repr((event, place)) + chr(10))

sys.addaudithook(write)
"""


def run(*command: object, folder: Path, **environment: str) -> str:
    """Run a command in a folder, and return what it prints."""
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=ROOT)
    return folder


@pytest.fixture(scope="module")
def site(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    (wheel,) = distributions.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", *options, "--target", folder, wheel, folder=folder)
    return folder


@pytest.fixture
def watched(site: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that uses the wheel and writes its calls of sockets.

    A request to the hub is one to HF_ENDPOINT, a closed port of this machine.
    """
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {
        "PYTHONPATH": f"{site}{os.pathsep}{tmp_path / 'watch'}",
        "SOCKETS": str(tmp_path / "watch" / "sockets"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"),
        "PYTHONUNBUFFERED": "1",
    }


def calls(watched: dict[str, str]) -> set[tuple[str, str]]:
    """Return event and host of each call since the last time. urllib3 binds ::1 to learn whether IPv6 works."""
    path = Path(watched["SOCKETS"])
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return {(event, place[0]) for event, place in map(ast.literal_eval, lines)} - {("socket.bind", "::1")}


def package_files() -> set[str]:
    files = (path for path in (ROOT / "src" / "draftune").rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT / "src")) for path in files if "__pycache__" not in path.parts}


def test_the_distributions_are_complete_and_the_same_when_built_again(distributions: Path, tmp_path: Path) -> None:
    # The wheel directly from the repository, not from the sdist.
    run("sh", "-c", f"umask 077; exec {sys.executable} -m hatchling build -d {tmp_path}", folder=ROOT)
    sdist, wheel = sorted(distributions.iterdir(), key=lambda path: path.suffix)
    for path in (sdist, wheel):
        assert path.stat().st_size < MOST_MEGABYTES * 1e6
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if not name.startswith(f"{DIST_INFO}/")} == package_files()
        metadata = file.read(f"{DIST_INFO}/METADATA").decode()
    assert re.findall(r"\]\((?!https?:)[^)]*\)", metadata) == []  # a package index has no other files
    assert "](https://arxiv.org/" in metadata
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    more = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "NOTICE", "README.md", "pyproject.toml"}
    assert names - {".gitignore", "PKG-INFO"} == {f"src/{name}" for name in package_files()} | more
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, folder=tmp_path)


def test_it_runs_outside_the_repository_and_sends_nothing(site: Path, watched: dict[str, str], tmp_path: Path) -> None:
    call = "import socket; socket.create_connection(('127.0.0.1', 9))"
    with pytest.raises(AssertionError, match="ConnectionRefusedError"):
        run(sys.executable, "-c", call, folder=tmp_path, **watched)
    assert calls(watched) == {("socket.getaddrinfo", "127.0.0.1"), ("socket.connect", "127.0.0.1")}

    folder = str(site / "draftune" / "assets" / "emoji")
    commands = [
        ["train", "--steps", "2", *SMALL, "--output", "run"],
        ["train", "--model", folder, "--reward", "brightness", "--steps", "1", *SMALL, "--output", "by-folder"],
        ["sample", "run", "--prompt", "pizza", "--output", "pizza.png"],
        ["report", "run"],
        ["card", "run", "--output", "card"],
        ["push", "run", "me/it", "--dry-run"],
        ["env"],
    ]
    tests = [ROOT / "tests" / name for name in TESTS_OF_THE_WHEEL]
    run(sys.executable, "-c", RUN, site, commands, *tests, folder=tmp_path, **watched)
    assert calls(watched) == set()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    for name in ("pizza.png", "run/report.html", "card/README.md", "by-folder/lora"):
        assert (tmp_path / name).exists()

    with subprocess.Popen(
        [sys.executable, site / "bin" / "draftune", "watch", "run", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, **watched},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        for path in ("", "data"):
            assert urlopen(f"{address}{path}").status == 200
        server.terminate()
    assert calls(watched) == {("socket.bind", "127.0.0.1")}
