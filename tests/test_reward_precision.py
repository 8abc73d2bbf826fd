"""Rewards whose linear layers are stored in bfloat16: memory, scores and gradients against float32."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_eval import make_run
from torch import Tensor, nn

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.models import load_model
from draftune.rewards import Reward, load_reward, precision
from draftune.rewards.online import OnlineReward
from draftune.rewards.precision import Bf16Linear
from draftune.settings import Settings
from draftune.training.memory_count import network_bytes
from draftune.training.trainer import Trainer
from draftune.utils.images import save_image, to_pil
from helpers.errors import mentions, raises
from helpers.quantized import dequantized

PROMPTS = ["cat face", "pizza", "rocket", "red heart", "house", "red apple"]


class Scorer(Reward):
    """A network of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Tanh(), nn.Linear(64, 1))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.network(images)[:, 0]


class Learner(OnlineReward, Scorer):
    """The same as a reward that learns."""

    def learn(self, images: Tensor, prompts: Sequence[str], expected: Tensor | None) -> None: ...

    def carried(self) -> dict[str, Tensor]:
        return {}


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    scores = reward(images, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert scores.dtype == gradient.dtype == torch.float32
    return scores.detach(), gradient


def test_only_weights_are_rounded() -> None:
    """Scores and gradients are those of float32 with rounded weights, to the last digits."""
    reward, images = Scorer(), torch.rand(3, 3, 8, 8)
    rounded: Any = copy.deepcopy(reward)
    for layer in rounded.network:
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.bfloat16().float()
    load_reward(reward, "bf16")
    load_reward(rounded, "no")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = score(reward, images, [""] * 3), score(rounded, images, [""] * 3)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-6
    assert reward.network[1].weight.dtype == torch.bfloat16
    assert reward.network[1].bias.dtype == torch.float32


def test_outputs_may_be_changed_in_place() -> None:
    layer, x = nn.Linear(4, 3).requires_grad_(False), torch.rand(2, 5, 4, requires_grad=True)
    expected = torch.autograd.grad((2 * layer(x)).sum(), x)[0]
    reward = Reward()
    reward.layer = layer
    load_reward(reward, "bf16")
    output = layer(x)
    output *= 2
    assert torch.autograd.grad(output.sum(), x)[0] == pytest.approx(expected, rel=0.01)


def test_the_graph_holds_no_converted_weight() -> None:
    reward: Any = load_reward(Scorer(), "bf16")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        reward.network(torch.rand(3, 3, 8, 8, requires_grad=True))
    assert not any(t.dtype == torch.float32 and t.numel() >= 64 * 192 for t in saved)
    assert any(t.dtype == torch.bfloat16 for t in saved)


def test_rewards_that_learn_and_subclasses_keep_their_weights() -> None:
    reward = Scorer() + Learner()
    reward.attention = nn.MultiheadAttention(8, 2)
    load_reward(reward, "bf16")
    layers = [module for module in reward.modules() if isinstance(module, Bf16Linear)]
    assert len(layers) == 2
    assert all(p.dtype == torch.float32 for p in reward.terms[1][1].parameters())
    assert all(p.dtype == torch.float32 for p in reward.attention.parameters())


@pytest.mark.parametrize("name", ["emoji_clip", "emoji_aesthetic"])
def test_trained_rewards(name: str) -> None:
    images = load_model("emoji").sample_tensors(PROMPTS, range(6), load_model("emoji").schedule(5), 3.0)
    plain = score(load_reward(name), images, PROMPTS)
    rounded = score(load_reward(name, "bf16"), images, PROMPTS)
    assert 0 < (plain[0] - rounded[0]).abs().max() < 0.05 * plain[0].std()
    assert torch.cosine_similarity(plain[1].flatten(1), rounded[1].flatten(1)).min() > 0.98


def test_training(tmp_path: Path) -> None:
    """The setting reaches both rewards of a run, and the memory check counts the smaller weights."""
    held = {}
    for chosen in ("no", "bf16"):
        trainer = Trainer(
            "emoji",
            "emoji_clip",
            eval_rewards="emoji_aesthetic",
            prompts=PROMPTS,
            reward_precision=chosen,
            steps=1,
            num_inference_steps=2,
            output=str(tmp_path / chosen),
        )
        held[chosen] = network_bytes(trainer)
        context = trainer.context
        assert context.eval_rewards is not None
        for reward in (context.reward, context.eval_rewards):
            linear = [m.weight for m in reward.modules() if type(m) in (nn.Linear, Bf16Linear)]
            assert {weight.dtype for weight in linear} == {torch.bfloat16 if chosen == "bf16" else torch.float32}
    rewards = (trainer.context.reward, trainer.context.eval_rewards)
    saved = {p.data_ptr(): p.nbytes for r in rewards if r for p in r.parameters() if p.dtype == torch.bfloat16}
    assert held["no"] - held["bf16"] == sum(saved.values()) > 0
    trainer.train_step.run(1)


FAST = ("--num-inference-steps", "2", "--guidance-scale", "1", "--device", "cpu")


def test_every_command_that_loads_rewards(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag reaches the rewards of all commands, and those of evaluations have the run's precision without it."""
    run = str(make_run(tmp_path / "run", pipeline_folder, reward="emoji_clip", reward_precision="bf16"))
    save_image(to_pil(torch.rand(1, 3, 8, 8))[0], tmp_path / "image.png")
    model, sampled = str(pipeline_folder), ("--output", str(tmp_path / "new.png"), *FAST)
    of_run: list[tuple[str, ...]] = [("eval", run, "--num-images", "1", *FAST), ("sweep", run, *FAST)]
    others: list[tuple[str, ...]] = [
        ("score", str(tmp_path / "image.png"), "--reward", "emoji_clip", "--prompt", "cat", "--device", "cpu"),
        ("sample", model, "--prompt", "cat", "--guidance-reward", "emoji_clip", *sampled),
        ("optimize-noise", model, "--prompt", "cat", "--reward", "emoji_clip", *sampled),
        ("experimental", "tune-weights", run, "--reward", "emoji_clip", "--output", str(tmp_path / "weights"), *FAST),
    ]

    def stop(*args: Any) -> None:
        raise DraftuneError("weights are rounded")

    monkeypatch.setattr(precision, "store_in_bf16", stop)
    for command in (*of_run, *((*command, "--reward-precision", "bf16") for command in (*of_run, *others))):
        assert main(list(command)) == 2, command
        assert "rounded" in capsys.readouterr().err
    assert main([*of_run[0], "--reward-precision", "no"]) == 0
    assert main(["sample", model, "--prompt", "cat", "--reward-precision", "bf16", *sampled]) == 2
    assert mentions(capsys.readouterr().err, "--reward-precision", "--guidance-reward")


def test_quantized_weights() -> None:
    """Scores and gradients are those of float32 with the numbers that the 4-bit weights stand for."""
    reward, images = Scorer(), torch.rand(3, 3, 8, 8)
    plain, exact = copy.deepcopy(reward), copy.deepcopy(reward)
    load_reward(reward, "bnb_4bit")
    for i in (1, 3):
        assert reward.network[i].weight.dtype == torch.uint8
        exact.network[i].weight.data = dequantized(reward.network[i])
    ours, theirs = score(reward, images, [""] * 3), score(load_reward(exact), images, [""] * 3)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    cosine = torch.cosine_similarity(ours[1].flatten(), score(load_reward(plain), images, [""] * 3)[1].flatten(), dim=0)
    assert 0.9 < cosine < 1


def test_quantization_of_other_layers_is_refused() -> None:
    class Convolution(Reward):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))

        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return self.network(images)[:, 0]

    with raises(DraftuneError, "reward_precision=bnb_4bit", 3):
        load_reward(Convolution(), "bnb_4bit")
    with raises(DraftuneError, "reward_precision", "bnb_8bit"):
        Settings(reward_precision="bnb_8bit")
