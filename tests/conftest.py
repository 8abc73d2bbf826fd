"""Fixtures that several test files use, and the environment of all tests: no network, no GPU, one thread."""

from __future__ import annotations

import os
import sys
import weakref
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before torch is imported; subprocesses inherit them. Waking a second thread takes longer than the small networks here
# gain by it, and two workers with several threads each would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["DRAFTUNE_PROMPT_CACHE"] = "off"  # the user's cache is not for tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set it to 0 for `-m network`

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

from draftune.methods import METHODS
from draftune.models import FAMILIES
from draftune.rewards import REWARDS
from helpers.browsers import browser, visit
from helpers.pipelines import build_pipeline
from helpers.published_weights import save_clip

__all__ = ["browser", "visit"]  # fixtures of another file

torch.set_num_threads(1)
collect_ignore = (
    [] if find_spec("transformers.models.pp_ocrv5_mobile_det") else ["test_ocr.py"]
)  # not in transformers 4


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those that are asked for by `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow-part", metavar="I/N", help="of the tests marked slow, run part I of N only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one part of the slow tests."""
    if text := config.getoption("--slow-part"):
        part, parts = map(int, text.split("/"))
        if not 1 <= part <= parts:
            raise pytest.UsageError(f"--slow-part must be I/N with I from 1 to N, not {text}")
        left_out = [
            item
            for item in items
            if item.get_closest_marker("slow") and zlib.crc32(item.nodeid.encode()) % parts != part - 1
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def package_modules() -> set[str]:
    """Return the names of the package's imported modules, without those of users' files (`run_file`)."""
    return {name for name in sys.modules if name.startswith("draftune.") and ":" not in name}


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Remove what a test registered: the next test of the same process must not find it.

    What the package itself registers stays: a module that is imported for the first time does so only once.
    """
    tables: list[dict[str, Any]] = [REWARDS, METHODS, FAMILIES]
    before = [dict(table) for table in tables]
    yield
    for table, names in zip(tables, before, strict=True):
        own = {name: made for name, made in table.items() if made.__module__ in package_modules()}
        table.clear()
        table.update(own | names)


@pytest.fixture
def pipeline(tmp_path: Path) -> StableDiffusionPipeline:
    return build_pipeline(tmp_path / "pipeline")


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline, as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("saved")
    build_pipeline(folder / "parts").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved CLIP, small and random."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, generator = tmp_path_factory.mktemp("head") / "head.safetensors", torch.Generator().manual_seed(0)
    tensors = {}
    for i, (a, b) in {0: (12, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        tensors[f"layers.{i}.weight"] = torch.randn(b, a, generator=generator) / a**0.5
        tensors[f"layers.{i}.bias"] = torch.randn(b, generator=generator)
    save_file(tensors, path)
    return path


@pytest.fixture
def prompt_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache of prompt embeddings."""
    monkeypatch.setenv("DRAFTUNE_PROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loaded_encoders(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Each text encoder that is read from files."""
    found: list[weakref.ref[Any]] = []
    read = CLIPTextModel.from_pretrained.__func__

    def counted(cls: Any, *args: Any, **options: Any) -> Any:
        result = read(cls, *args, **options)
        found.append(weakref.ref(result[0]))
        return result

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", classmethod(counted))
    return found
