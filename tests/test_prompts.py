"""Prompt sets and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftune.errors import DraftuneError
from draftune.prompts import load_prompts, metadata


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
    with pytest.raises(DraftuneError, match=r"empty|text file|binary"):
        load_prompts(str(path))


@pytest.mark.parametrize("ending", [".txt", ".csv", ".json"])
def test_of_another_encoding_utf_8_is_wanted(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"prompts{ending}"
    path.write_bytes("prompt\ncafé\n".encode("latin-1"))
    with pytest.raises(DraftuneError, match="UTF-8") as caught:
        load_prompts(str(path))
    assert "line" not in str(caught.value)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(DraftuneError, match="did you mean 'animals'"):
        load_prompts("animal")
    with pytest.raises(DraftuneError, match="no prompt file"):
        load_prompts("prompts/missing.txt")
    with pytest.raises(DraftuneError, match="empty"):
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
    with pytest.raises(DraftuneError, match=r"\.csv"):
        load_prompts(str(path))
    assert load_prompts(str(path.rename(path.with_suffix(".csv")))) == ["a cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "title\na cat\n", "line 2 has no column 'prompt'"),
        ("a.csv", "prompt\n", "is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2 must be an object"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1 has no key 'prompt'"),
        ("a.csv", "Prompt,prompt\na,b\n", "line 2.*'Prompt' and 'prompt'"),
        ("a.json", '["a\\u001b b"]', "entry 1.*control character"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DraftuneError, match=message):
        load_prompts(str(tmp_path / name))
