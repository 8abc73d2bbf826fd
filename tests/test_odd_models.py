"""Model folders that are odd: each draws, or is refused in one line when it is loaded, and nothing else happens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from draftune.errors import DraftuneError
from draftune.models import load_model
from helpers.errors import mentions
from helpers.odd_models import Case, families, odd_cases

CASES = odd_cases()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return families(tmp_path_factory.mktemp("families"))


def test_there_are_enough() -> None:
    assert len(CASES) >= 70
    assert len({case.id for case in CASES}) == len(CASES)
    assert sum(case.draws for case in CASES) >= 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_draws_or_is_refused(case: Case, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[case.family], tmp_path / "model"))
    case.change(folder)
    if not case.draws:
        with pytest.raises(DraftuneError) as caught:
            load_model(folder)
        line = str(caught.value)
        assert "\n" not in line
        assert mentions(line, *case.said), line
        return
    model = load_model(folder)
    if case.family in ("dev", "schnell"):
        model.set_size(16, 16)
    prompt = "1" if case.family == "dit" else "a cat"
    picture = model.sample_tensors([prompt], [0], model.schedule(2), 2.0)
    assert picture.shape[:2] == (1, 3)
    assert picture.isfinite().all()
    assert picture.std() > 0
