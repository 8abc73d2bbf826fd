"""Prompt sets and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftune.errors import DraftuneError
from draftune.prompts import load_prompts


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


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(DraftuneError, match="did you mean 'animals'"):
        load_prompts("animal")
    with pytest.raises(DraftuneError, match="no prompt file"):
        load_prompts("prompts/missing.txt")
    with pytest.raises(DraftuneError, match="empty"):
        load_prompts([])
