"""Prompt sets and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftune.errors import DraftuneError
from draftune.prompts import load_prompts, metadata
from helpers.errors import raises


def test_sets() -> None:
    assert len(set(load_prompts("animals"))) == 45
    common, other = load_prompts("emoji-common"), load_prompts("emoji")
    assert len(set(common)) == 64
    assert len(other) > 500
    assert not set(common) & set(other)


def test_a_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa café\r\n\n  a dog \n".encode())
    assert load_prompts(str(path)) == ["a café", "a dog"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\x89PNG\r\n\x1a\n\xff\xfe", b"a\x00b\n"])
def test_empty_and_binary_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with raises(DraftuneError, "prompts.txt"):
        load_prompts(str(path))


@pytest.mark.parametrize("ending", [".txt", ".csv", ".json"])
def test_of_another_encoding_utf_8_is_wanted(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"prompts{ending}"
    path.write_bytes("prompt\ncafé\n".encode("latin-1"))
    with raises(DraftuneError, "UTF-8") as caught:
        load_prompts(str(path))
    assert "line" not in str(caught.value)


def test_what_is_not_there_is_refused() -> None:
    with raises(DraftuneError, "'animal' 'animals'"):
        load_prompts("animal")
    with raises(DraftuneError, "prompts/missing.txt"):
        load_prompts("prompts/missing.txt")
    with raises(DraftuneError, "empty"):
        load_prompts([])


def test_tables_carry_metadata(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,target,query\n"a cat, asleep",281,a cat\na dog,,\n,5,x\n', encoding="utf-8-sig")
    prompts = load_prompts(str(path))
    assert prompts == ["a cat, asleep", "a dog"]
    assert [metadata(prompt) for prompt in prompts] == [{"target": "281", "query": "a cat"}, {}]
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat", "target": 281}\n\n{"prompt": "a dog"}\n')
    prompts = load_prompts(str(path))
    assert prompts == ["a cat", "a dog"]
    assert [metadata(prompt) for prompt in prompts] == [{"target": "281"}, {}]
    assert metadata("plain text") == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "Prompt,target\na cat,281\n"),
        ("a.tsv", "target\tPROMPT\n281\ta cat\n"),
        ("a.jsonl", '{"Prompt": "a cat", "target": 281}\n'),
        ("a.json", '[{"Caption": "a cat", "target": "281"}]'),
        ("a.yaml", "- Text: a cat\n  target: 281\n"),
    ],
)
def test_the_column_of_the_prompt_may_be_in_capitals(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (prompt,) = load_prompts(str(tmp_path / name))
    assert (prompt, metadata(prompt)) == ("a cat", {"target": "281"})


def test_a_list_that_is_told_its_ending_is_read_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Prompt\na cat\n")
    with raises(DraftuneError, "a.txt .csv"):
        load_prompts(str(path))
    assert load_prompts(str(path.rename(path.with_suffix(".csv")))) == ["a cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "title\na cat\n", "a.csv line 2 'prompt'"),
        ("a.csv", "prompt\n", "a.csv"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl line 2 JSON"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "a.jsonl line 2 object"),
        ("a.jsonl", '{"prompt": 3}\n', "a.jsonl line 1 'prompt'"),
        ("a.csv", "Prompt,prompt\na,b\n", "a.csv line 2 'Prompt' 'prompt'"),
        ("a.json", '["a\\u001b b"]', "a.json 1 character"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with raises(DraftuneError, message):
        load_prompts(str(tmp_path / name))
