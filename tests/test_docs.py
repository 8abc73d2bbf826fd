"""The documentation: each command has its page, its examples parse as its own parser wants, its links lead on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import draftune
from draftune.cli import COMMANDS, Command, train
from draftune.cli.main import build_parser, expressions_joined
from draftune.errors import DraftuneError
from draftune.registry.expression import parse
from draftune.training.early_stopping import weights_of

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "commands"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PARSER = build_parser()
NAMES = {command.name for command in COMMANDS}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def calls(text: str) -> Iterator[list[str]]:
    """The arguments of every `draftune …` in lines of a shell."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not word or word.strip(";&|"):
                words.append(word)
                continue
            if words[:1] == ["draftune"]:
                yield words[1:]
            words = []


def check(argv: list[str]) -> str:
    """Parses a call as the command line does; the command's name."""
    args, extra = PARSER.parse_known_args(expressions_joined(argv))
    assert not extra, argv
    if args.command in ("train", "preflight"):
        args.config = None  # of a run that only the reader has
        train.train_settings(args)
    for name, read in {"reward": parse, "held_out": parse, "method": parse, "best_by": weights_of}.items():
        if getattr(args, name, None):
            read(getattr(args, name))  # type: ignore[operator]
    return str(args.command)


def blocks(document: Path) -> str:
    return "\n".join(text for language, text in BLOCK.findall(document.read_text()) if language == "bash")


def prose(document: Path) -> str:
    """What is no code."""
    return re.sub(r"`[^`]*`", "", BLOCK.sub("", document.read_text()))


def anchors(document: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_has_a_help_text_a_page_and_examples(command: Command) -> None:
    assert command.help
    assert command.description.endswith(".")
    assert {check(argv) for argv in calls(command.example)} == {command.name}
    page = PAGES / f"{command.name.replace(' ', '-')}.md"
    assert page.read_text().startswith(f"# `draftune {command.name}`: ")
    assert command.name in {check(argv) for argv in calls(blocks(page))}


def test_the_index_shows_each_command() -> None:
    rows = re.findall(r"^\| \[(.+)\]\((.+)\.md\) \| .+ \| `(draftune .+)` \|$", (PAGES / "README.md").read_text(), re.M)
    assert sorted(title for title, _, _ in rows) == sorted(NAMES)
    assert all(title == page.replace("experimental-", "experimental ") == check(*calls(e)) for title, page, e in rows)
    assert {page.stem for page in PAGES.glob("*.md")} == {name.replace(" ", "-") for name in NAMES} | {"README"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_examples_are_read_and_links_lead_somewhere(document: Path) -> None:
    for argv in calls(blocks(document)):
        check(argv)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_names_of_the_package_are_there_and_are_those_that_are_shown() -> None:
    assert {name: getattr(draftune, name).__name__ for name in draftune.__all__} == {n: n for n in draftune.__all__}
    shown = {name for document in DOCUMENTS for name in re.findall(r"\bdraftune\.(\w+)\(", document.read_text())}
    assert {"train", "merge_loras", "write_report"} <= shown <= set(draftune.__all__)


def test_these_tests_see_what_is_wrong() -> None:
    text = "draftune list a & draftune merge 'b; c@1' ''; wait  # draftune d\npip install draftune"
    assert list(calls(text)) == [["list", "a"], ["merge", "b; c@1", ""]]
    for wrong in (
        "draftune trian",
        "draftune train --stepz 3",
        "draftune train --steps 0",
        "draftune train --reward 'clip +'",
        "draftune list a b",
    ):
        with pytest.raises((DraftuneError, AssertionError)):
            check(*calls(wrong))
