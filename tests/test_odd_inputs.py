"""Odd prompt files and odd rewards: the right result or one clear line, never a third thing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.prompts import Prompt, load_prompts, metadata
from draftune.rewards import load_reward
from helpers.odd_prompts import odd_prompts
from helpers.odd_rewards import FROZEN_ADAPTER, OddReward, odd_rewards


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


IMAGES = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("a cat", {"level": "2"}), "a dog", Prompt("three birds", {"level": "-0.5"})]


def fine(images: Tensor, prompts: Sequence[str]) -> Tensor:
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
    return images.square().mean((1, 2, 3)) + 0.01 * lengths


def of_one(error: BaseException) -> str:
    """What is wrong with an error, which is to be one line of ours."""
    line = str(error)
    wanted = type(error) is DraftuneError and line.isprintable() and 0 < len(line) < 700
    return "" if wanted else f"it raised {error!r}"


def differs(found: Any, wanted: Any, tolerance: float) -> bool:
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    return found.shape != wanted.shape or not np.allclose(found, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


def trouble(odd: OddReward, order: int, size: int, gradient: bool) -> str:
    """What goes wrong with an odd reward beside one that is fine, in a sum whose parts stand in this order."""
    FROZEN_ADAPTER.clear()
    x, wanted = IMAGES.double().numpy().copy(), fine(IMAGES, PROMPTS)
    images, prompts = IMAGES.clone().requires_grad_(gradient), [Prompt(p, metadata(p)) for p in PROMPTS]
    parts = [load_reward(odd.function), load_reward(fine)][:: 1 if order == 0 else -1]
    sum_of_both = parts[0] + parts[1]
    sum_of_both.set_chunk_size(size)
    expected = odd.scores if not gradient else odd.scores and odd.gradients
    before = torch.is_grad_enabled()
    try:
        total, found = sum_of_both.components(images, prompts)
        again = sum_of_both.components(images, prompts)[1]  # which must not change what the first call gave
    except BaseException as error:
        return of_one(error) if expected is None else f"{error!r} was not expected"
    if expected is None:
        return f"it gave {found}"
    assert odd.scores is not None
    scores = odd.scores(x, PROMPTS)
    (label,) = (name for name in found if name != "fine")
    for named in (found, again):
        if differs(named["fine"], wanted, 0) or differs(named[label], scores, odd.tolerance):
            return f"its scores are {named}, not {scores} and {wanted}"
    if differs(total.detach(), scores + wanted.double().numpy(), max(odd.tolerance, 1e-5)):
        return f"the total is {total}"
    if gradient:
        assert odd.gradients is not None
        (slope,) = torch.autograd.grad(total.sum(), images)
        if differs(slope, odd.gradients(x, PROMPTS) + 2 * x / x[0].size, max(odd.tolerance, 1e-5)):
            return "its gradient is wrong"
    if total.requires_grad != gradient or total.dtype not in (torch.float32, torch.float64):
        return f"the total is {total}"
    if (
        not images.detach().equal(IMAGES)
        or prompts != PROMPTS
        or list(map(metadata, prompts)) != list(map(metadata, PROMPTS))
    ):
        return "the images or the prompts were changed"
    return "" if torch.is_grad_enabled() == before else "gradients were switched"


@pytest.mark.parametrize("gradient", [False, True])
def test_odd_rewards(gradient: bool) -> None:
    failures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = odd_rewards()
        assert len(odd) >= 80
        for reward in odd:
            for order, size in ((0, 1), (1, 2), (0, 3), (1, 3)):
                problem = trouble(reward, order, size, gradient)
                if problem:
                    failures.append(f"{reward.name}, place {order}, {size} at once: {problem}")
                    break
    assert not failures, f"{len(failures)} of them:\n" + "\n".join(failures)
