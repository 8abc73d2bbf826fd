"""The documentation: links lead to a target, commands parse and run, generated references are complete.

A comment `<!-- needs: gpu hub -->` before a block says what the block needs; the block is then parsed and not run. A
block with `title="file.py"` is a file that other blocks of its page use.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import draftune
from draftune.cli import COMMANDS, Command, train
from draftune.cli.main import build_parser, expressions_joined
from draftune.errors import DraftuneError
from draftune.evaluation.criterion import parse_criterion
from draftune.methods import METHODS, load_method
from draftune.models import load_model
from draftune.models.base import DiffusionModel
from draftune.registry.expression import parse
from draftune.rewards import REWARDS
from draftune.sampling.step_range import StepRange
from draftune.settings import Settings
from draftune.training.setup import check_trained_steps

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
PARSER = build_parser()
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[\w ]+) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LAUNCHERS = ("accelerate", "torchrun")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, file name or "", what it needs, and its text."""

    language: str
    title: str
    needs: frozenset[str]
    text: str


def blocks(document: Path) -> list[Block]:
    found = BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [Block(m["language"], m["title"] or "", frozenset((m["needs"] or "").split()), m["text"]) for m in found]


def calls(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every `draftune …` in lines of a shell, also behind a launcher."""
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
            elif words[:1] and words[0] in LAUNCHERS and "draftune" in words:
                yield words[words.index("draftune") + 1 :]
            words = []


def check(argv: list[str]) -> str:
    """Parse a call as the command line does. Return the command's name."""
    args, extra = PARSER.parse_known_args(expressions_joined(argv))
    assert not extra, argv
    if args.command in ("train", "preflight"):
        args.config = None  # of a run that only the reader has
        check_method(train.train_settings(args))
    for name, read in {
        "reward": parse,
        "eval_rewards": parse,
        "method": parse,
        "metric_for_best_model": parse_criterion,
    }.items():
        if getattr(args, name, None):
            read(getattr(args, name))  # type: ignore[operator]
    return str(args.command)


@cache
def embedded_model() -> DiffusionModel:
    return load_model("emoji")


def check_method(settings: Settings) -> None:
    """Let a method refuse the embedded model's sampling steps, which have few steps by default."""
    if settings.model == "emoji" and ".py" not in settings.method:
        model, method = embedded_model(), load_method(settings.method)
        model.lora_steps = StepRange.parse(settings.lora_steps)
        schedule = model.schedule(settings.num_inference_steps)
        method.check(schedule)
        check_trained_steps(settings, method, schedule)


def shell(document: Path) -> str:
    return "\n".join(block.text for block in blocks(document) if block.language == "bash")


def prose(document: Path) -> str:
    """Return the text outside code."""
    return re.sub(r"`[^`]*`", "", BLOCK.sub("", document.read_text(encoding="utf-8")))


def anchors(document: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_has_a_help_text_and_an_example(command: Command) -> None:
    assert command.help
    assert command.description.endswith(".")
    assert {check(argv) for argv in calls(command.example)} == {command.name}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_parse_and_links_lead_somewhere(document: Path) -> None:
    for block in blocks(document):
        assert block.needs <= set(hooks().NEEDS), block.needs
    for argv in calls(shell(document)):
        check(argv)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_references_list_everything() -> None:
    generated = hooks().GENERATED
    cli, settings = generated["cli"](), generated["settings"]()
    assert all(f"## `{command.name}`" in cli for command in COMMANDS)
    assert all(f"| `{f.name}` |" in settings for f in fields(Settings))
    for page, table in (("methods", METHODS), ("rewards", REWARDS)):
        text = generated[page]()
        assert all(f"### `{name}`" in text for name in table)
    assert all(f".{name}\n" in generated["api"]() + "\n" for name in draftune.__all__)
    assert "## Presets" in generated["names"]()
    used = {name for path in DOCUMENTS for name in re.findall(r"generated: (\w+)", path.read_text(encoding="utf-8"))}
    assert used - {"NAME"} == set(generated)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", text.partition("\nnav:")[2]))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert listed == pages | set(hooks().ROOT_DOCUMENTS.values())


def test_links_out_of_the_documentation_lead_to_its_pages() -> None:
    relinked: Callable[..., str] = hooks().relinked
    page = "methods/draft.md"
    text = "[a](../../RESULTS.md#k) [b](kl.md) [c](../../src/draftune) [d](https://x.y/z.md) ![e](../guard.png)"
    expected = "[a](../project/results.md#k) [b](kl.md) c [d](https://x.y/z.md) ![e](../guard.png)"
    assert relinked(text, (DOCS / page).parent, page) == expected


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    html = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("index.html"))
    assert "<!-- generated" not in html
    assert re.findall(r"<(?:script|link)[^>]+(?:src|href)=.?https?://", html) == []


def test_the_names_of_the_package_are_there_and_are_those_that_are_shown() -> None:
    assert {name: getattr(draftune, name).__name__ for name in draftune.__all__} == {n: n for n in draftune.__all__}
    shown = {name for document in DOCUMENTS for name in re.findall(r"\bdraftune\.(\w+)\(", document.read_text())}
    assert {"train", "merge_loras", "write_report"} <= shown <= set(draftune.__all__)


def test_these_tests_see_what_is_wrong() -> None:
    text = "draftune list a & draftune merge 'b; c@1' ''; wait  # draftune d\npip install draftune\n"
    text += "torchrun --x 2 -m draftune train --device cpu"
    assert list(calls(text)) == [["list", "a"], ["merge", "b; c@1", ""], ["train", "--device", "cpu"]]
    for wrong in (
        "draftune trian",
        "draftune train --stepz 3",
        "draftune train --steps 0",
        "draftune train --reward 'clip +'",
        "draftune train --method 'draft_k(k=3)'",
        "draftune train --method 'draft_k(k=1)' --lora-steps 0.0-0.5",
        "draftune list a b",
    ):
        with pytest.raises((DraftuneError, AssertionError)):
            check(*calls(wrong))
