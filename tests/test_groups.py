"""Groups of images of one prompt: their order, their advantages, and the second LoRA that methods on them use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradients import GRIDS, Network, batch_of
from test_training import run
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods import DDPO, DiffusionNFT, DraftK, FlowGRPO, Method, MixGRPO, OnlineDPO, load_method
from draftune.methods.groups import gathered, group_advantages, own_parts
from draftune.methods.lora_copy import LoRACopy
from draftune.prompts import load_prompts
from draftune.settings import Settings
from draftune.training.data import PromptSampler
from draftune.training.memory_check import smaller_batches
from draftune.training.setting_checks import check_method
from draftune.utils.processes import Processes
from helpers.errors import raises


def test_each_prompt_follows_itself() -> None:
    """The permutations are those of a group size of 1, and a group may go on in the next batch."""
    plain = PromptSampler(5, torch.Generator().manual_seed(3))
    grouped = PromptSampler(5, torch.Generator().manual_seed(3), repeats=3)
    batches = [grouped.next(4) for _ in range(6)]
    assert [index for batch in batches for index in batch] == [i for i in plain.next(8) for _ in range(3)]


def authors_advantages(prompts: Sequence[str], rewards: Tensor, global_std: bool) -> Tensor:
    """PerPromptStatTracker.update of flow_grpo and DiffusionNFT for one epoch, by prompt text."""
    found = torch.zeros_like(rewards)
    for prompt in set(prompts):
        own = torch.tensor([other == prompt for other in prompts])
        std = (rewards if global_std else rewards[own]).std(unbiased=False) + 1e-4
        found[own] = (rewards[own] - rewards[own].mean()) / std
    return found


@pytest.mark.parametrize("spread", ["update", "group"])
def test_advantages_are_those_of_the_authors(spread: str) -> None:
    rewards = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 7
    rewards[3] += 9
    found = group_advantages(rewards, 3, spread, 1.2)
    expected = authors_advantages([p for p in "abcd" for _ in range(3)], rewards, spread == "update")
    assert torch.allclose(found, expected.clamp(-1.2, 1.2), atol=1e-12)
    assert (expected.abs() > 1.2).any()
    assert torch.allclose(group_advantages(rewards, 3, spread, 9.0).view(4, 3).mean(1), torch.zeros(4).double())


@pytest.mark.parametrize("value", [0.1, 1e6, -7.3])
def test_a_group_of_equal_rewards_has_no_advantage(value: float) -> None:
    """The mean of equal float32 numbers is not always that number."""
    rewards = torch.tensor([value] * 7 + [value, value + 1, value, value, value, value, value])
    for spread in ("update", "group"):
        found = group_advantages(rewards, 7, spread, 5.0)
        assert not found[:7].any()
        assert found[7:].all()


def test_every_process_has_its_share_of_the_advantages() -> None:
    rewards = torch.arange(12.0)
    whole = [batch_of(lambda x, step: None, GRIDS["clean"], noise=torch.zeros(6, 1, 1, 1)) for _ in range(2)]  # type: ignore[arg-type, return-value]
    for index in range(2):
        shares = []
        for batch in whole:
            batch.processes, batch.all_prompts = Processes(index, 2), [""] * 6
            shares.append(batch)
        parts = own_parts(shares, rewards)
        assert [part.tolist() for part in parts] == [[3 * index + 6 * i + j for j in range(3)] for i in range(2)]
    for batch in whole:
        batch.processes = Processes()
    assert gathered(whole, list(rewards.split(6))).tolist() == rewards.tolist()


def test_the_copy_takes_the_place_of_the_trained_weights_and_gives_it_back() -> None:
    network, copy = Network(), LoRACopy()
    parameters = dict(network.named_parameters())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    first = network(x, 1).detach()
    copy.start(parameters)
    with torch.no_grad():
        network.last.weight.mul_(3)
    second = network(x, 1).detach()
    with copy.in_use(parameters):
        inside = network(x, 1)
        assert torch.equal(inside, first)
        assert not inside.requires_grad
    with pytest.raises(ValueError, match="stop"), copy.in_use(parameters):
        raise ValueError("stop")
    assert torch.equal(network(x, 1), second)
    assert all(parameter.requires_grad for parameter in parameters.values())

    before = {name: weight.clone() for name, weight in copy.weights.items()}
    copy.start(parameters)  # there is one already
    copy.move(parameters, 0.75)
    for name, parameter in parameters.items():
        assert torch.allclose(copy.weights[name], 0.75 * before[name] + 0.25 * parameter, atol=1e-14)

    other = LoRACopy()
    other.load_state_dict({"updates": 3, **copy.state_dict()})
    copy.move(parameters, 0.0)
    other.start(parameters)
    assert not torch.equal(other.weights["last.weight"], copy.weights["last.weight"])
    assert torch.equal(copy.weights["last.weight"], network.last.weight)


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        (DraftK(1), {"num_images_per_prompt": 3}, "num_images_per_prompt=3 batch_size gradient_accumulation_steps 4"),
        (DDPO(), {"num_images_per_prompt": 8}, "num_images_per_prompt=8 batch_size gradient_accumulation_steps 4"),
        (FlowGRPO(), {}, "num_images_per_prompt 2 1"),
        (MixGRPO(), {}, "num_images_per_prompt 2 1"),
        (DiffusionNFT(), {}, "num_images_per_prompt 2 1"),
        (OnlineDPO(), {}, "num_images_per_prompt 2 1"),
        (OnlineDPO(pairs=2), {"num_images_per_prompt": 2}, "num_images_per_prompt 4 2"),
        (load_method("kl(diffusion_nft)"), {}, "num_images_per_prompt 2 1"),
        (
            load_method("kl(online_dpo)"),
            {"num_images_per_prompt": 4, "batch_size": 2, "gradient_accumulation_steps": 2},
            "num_images_per_prompt=4 batch_size 2",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(method: Method, values: dict[str, Any], words: str) -> None:
    with raises(DraftuneError, words):
        check_method(Settings(**{"method": "named", "batch_size": 4} | values), method)


def test_groups_that_fit_are_accepted() -> None:
    many = Settings(method="named", batch_size=2, gradient_accumulation_steps=4, num_images_per_prompt=4)
    for method in (DiffusionNFT(), FlowGRPO(), DraftK(1)):
        check_method(many, method)
    check_method(Settings(method="named", batch_size=8, num_images_per_prompt=4), OnlineDPO(pairs=2))


def test_advice_to_halve_the_batch_splits_no_pair() -> None:
    halved = {"batch_size": 2, "gradient_accumulation_steps": 2}
    settings = Settings(method="diffusion_nft", batch_size=4, num_images_per_prompt=4)
    assert smaller_batches(settings) == halved
    assert smaller_batches(Settings(method="online_dpo", batch_size=4, num_images_per_prompt=4)) == {}
    assert smaller_batches(Settings(method="online_dpo", batch_size=4, num_images_per_prompt=2)) == halved


def test_a_run_scores_groups_across_its_batches(pipeline_folder: Path, tmp_path: Path) -> None:
    """Batches of one image: the 4 of a prompt are scored one after the other, then those of the next prompt."""
    seen: list[str] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.extend(map(str, prompts))
        return images.mean((1, 2, 3))

    values = {"batch_size": 1, "gradient_accumulation_steps": 8, "num_images_per_prompt": 4, "steps": 1}
    trained = run(str(pipeline_folder), tmp_path, reward, method="diffusion_nft", num_log_prompts=1, **values)
    first = next(i for i in range(len(seen)) if len(set(seen[i : i + 4])) == 1)
    groups = seen[first : first + 8]
    assert groups[0] != groups[4]
    assert groups == [groups[0]] * 4 + [groups[4]] * 4
    assert trained.metrics[0]["reward_queries"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["diffusion_nft(timestep_fraction=0.5)", "online_dpo(timestep_fraction=0.5, pairs=2)"]
)
def test_the_reward_rises_on_the_embedded_model(method: str, tmp_path: Path) -> None:
    """The same 16 images before and after 10 updates: their files shrink, by scores alone."""
    values = {"batch_size": 8, "num_images_per_prompt": 8, "steps": 10, "learning_rate": 3e-3, "guidance_scale": None}
    values |= {"num_inference_steps": 8, "num_log_prompts": 1, "num_validation_images": 1, "eval_rewards": ""}
    (tmp_path / "prompts.txt").write_text("\n".join(load_prompts("emoji-common")[::4]))
    prompts = {"prompts": "emoji-common", "eval_prompts": str(tmp_path / "prompts.txt")}
    before, after = (
        row["jpeg_compressibility"]
        for row in run("emoji", tmp_path, "jpeg_compressibility", method=method, **values | prompts).evaluations
    )
    assert after > before + 0.5
