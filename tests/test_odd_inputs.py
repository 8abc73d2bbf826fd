"""Odd prompt files and odd rewards: the right result or one clear line, never a third thing."""

from __future__ import annotations

from pathlib import Path

from odd_prompts import odd_prompts

from draftune.errors import DraftuneError
from draftune.prompts import load_prompts, metadata


def test_odd_prompt_files(tmp_path: Path) -> None:
    failures = []
    for number, odd in enumerate(odd_prompts()):
        path = tmp_path / f"{number}-prompts{odd.ending}"
        path.write_bytes(odd.content)
        try:
            found = load_prompts(str(path))
            answer = found, [dict(metadata(prompt)) for prompt in found]
            problem = "" if not odd.refused and answer == (odd.prompts, odd.metadata) else f"it gave {answer}"
            problem += "" if odd.refused else f", not {(odd.prompts, odd.metadata)}" if problem else ""
        except DraftuneError as error:
            line = str(error)
            named = path.name in line and odd.refused in line
            problem = "" if odd.refused and named and line.isprintable() and len(line) < 600 else f"it said {line}"
        except Exception as error:
            problem = f"it raised {error!r}"
        if problem:
            failures.append(f"{number}, {odd.kind}, {odd.content[:200]!r}: {problem}")
    assert not failures, f"{len(failures)} of them:\n" + "\n".join(failures)
