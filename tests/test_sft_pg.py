"""SFT-PG: its policy gradient, its critic and value network, and runs with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_gradients import batch_of, relative
from test_resume import lora, rows
from torch import Tensor, nn

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.evaluation.kid import kid
from draftune.experimental.discriminator import critic_loss
from draftune.experimental.learner import OnlineModule, value_loss
from draftune.experimental.sft_pg import SFTPG
from draftune.methods import Batch
from draftune.models import load_model
from draftune.rewards import Reward, load_reward, parse_reward
from draftune.rewards.online import online_rewards
from draftune.sampling.schedule import Prediction, Schedule, Step
from draftune.training.trainer import Trainer
from draftune.utils.images import save_image, to_pil
from helpers.errors import mentions, raises

T = 5
NOISY = Schedule(tuple(Step(t, 0.0, 1.0, 1.0, 0.5) for t in range(T)), "v_prediction")
"""A grid whose steps have a deviation of 0.5 and lead on average to what the network takes for the clean latent."""


class Chain:
    """x_{t-1} = 0.9 x_t + theta_t + 0.5 z: theta [T], or [N, T] to have each sample's own gradient."""

    def __init__(self, *shape: int) -> None:
        self.theta = torch.zeros(*shape, T, dtype=torch.float64, requires_grad=True)

    def denoise(self, x: Tensor, step: Step) -> Prediction:
        shift = self.theta[..., int(step.timestep)]
        return Prediction(0.9 * x + shift.reshape(-1, 1, 1, 1), torch.zeros_like(x))


class Exact(OnlineModule):
    """The expected end of the chain, which is known, times what the reward of the end is times it; or none."""

    def __init__(self, chain: Chain, slope: Callable[[], float]) -> None:
        super().__init__(nn.Identity, 1e-4)
        self.chain, self.slope = chain, slope

    def forward(self, *inputs: Tensor) -> Tensor:
        kept = 0.9 ** torch.arange(T, -1, -1, dtype=torch.float64)
        coming = (self.chain.theta.detach() * kept[1:]).flip(-1).cumsum(-1).flip(-1)
        return self.slope() * (kept[:-1] * inputs[0].double().flatten(1) + coming)

    def learn(self, *_: Any) -> float:
        return 0.0


def gradient(method: SFTPG, batches: Sequence[Batch], weights: Tensor) -> Tensor:
    """Of all the losses of one update, as the trainer adds them up."""
    weights.grad = None
    for losses in method.losses_per_step(batches):
        for loss in losses:
            (loss / len(batches)).backward()
    assert weights.grad is not None
    return weights.grad


@pytest.mark.parametrize(("none", "first", "last"), [(False, 3.9, 2.0), (True, 5.3, 5.8)])
def test_the_policy_gradient_on_a_linear_chain(none: bool, first: float, last: float) -> None:
    """Its mean with and without a value is -0.9^(T-1-t), where f(x) = -x is made smaller; its variances are known."""
    count = 200_000
    chain, method = Chain(count), SFTPG(generator_steps=1)
    method.learner = Exact(chain, lambda: 0.0 if none else 1.0)
    noise = torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = batch_of(chain.denoise, NOISY, None, noise, lambda x, expected: x.flatten(), 1)
    # One optimiser step of T transitions is their mean.
    each = count * T * gradient(method, [batch], chain.theta)
    expected = -(0.9 ** torch.arange(T - 1, -1, -1, dtype=torch.float64))
    # Three standard errors of 200,000 samples without a value are 0.016.
    assert (each.mean(0) - expected).abs().max() < (0.016 if none else 0.01)
    assert each.var(0)[0] == pytest.approx(first, abs=0.1)
    assert each.var(0)[-1] == pytest.approx(last, abs=0.1)


class Line:
    """The critic w x, |w| <= 1, of pictures that are one number; examples are N(1, 0.25)."""

    def __init__(self, rate: float) -> None:
        self.weight, self.rate, self.generator = torch.zeros(()), rate, torch.Generator().manual_seed(5)
        self.means: list[float] = []

    def __call__(self, clean: Tensor, expected: Tensor) -> Tensor:
        drawn = clean.flatten().detach()
        self.means.append(float(drawn.mean()))
        score = self.weight * drawn
        real = 1 + 0.5 * torch.randn(len(drawn), generator=self.generator)
        with torch.enable_grad():
            weight = self.weight.clone().requires_grad_()
            loss = critic_loss(weight * real, weight * drawn, expected, 0.0)
        self.weight = (self.weight - self.rate * torch.autograd.grad(loss, weight)[0]).clamp(-1, 1)
        return score


@pytest.mark.parametrize(
    ("steps", "rate", "count", "updates", "converges"), [(5, 0.5, 1000, 1500, True), (1, 0.05, 64, 1000, False)]
)
def test_a_game_of_two_players_wants_several_critic_steps(
    steps: int, rate: float, count: int, updates: int, converges: bool
) -> None:
    chain, method, critic = Chain(), SFTPG(generator_steps=1, value_width=4), Line(rate)
    method.learner = Exact(chain, lambda: float(critic.weight))
    generator = torch.Generator().manual_seed(0)
    for i in range(updates):
        noises = [torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(steps)]
        batches = [batch_of(chain.denoise, NOISY, None, n, critic, steps * i + j) for j, n in enumerate(noises)]
        slope = T * gradient(method, batches, chain.theta)
        with torch.no_grad():
            chain.theta -= 0.01 * slope
    last = torch.tensor(critic.means[-500 * steps :]).view(-1, steps).mean(1)
    if converges:
        assert critic.means[0] == pytest.approx(0.04, abs=0.1)
        assert float(last.mean()) == pytest.approx(1.00, abs=0.02)
        assert [float(last.min()), float(last.max())] == pytest.approx([0.84, 1.18], abs=0.03)
    else:
        assert last.max() - last.min() > 1.5  # round and round


def test_the_joint_gradient_is_that_of_two_losses() -> None:
    """mean f(fake) - mean f(real) + sum_t mean (v - f(fake))^2, backwards once by the weights of both networks."""
    torch.manual_seed(0)
    critic, value = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    real, fake, paths = (torch.randn(*shape, 3, dtype=torch.float64) for shape in ((6,), (6,), (6, 4)))

    def f(x: Tensor) -> Tensor:
        return torch.sin(critic(x)).squeeze(-1)

    def v(x: Tensor) -> Tensor:
        return torch.tanh(value(x)).squeeze(-1)

    joint = f(fake).mean() - f(real).mean()
    for t in range(4):
        joint = joint + 0.7 * (v(paths[:, t]) - f(fake)).square().mean()
    together = torch.autograd.grad(joint, [*critic.parameters(), *value.parameters()])
    ours = torch.autograd.grad(critic_loss(f(real), f(fake), v(paths).detach(), 0.7), [*critic.parameters()])
    theirs = torch.autograd.grad(0.7 * value_loss(v(paths), f(fake).detach()), [*value.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(together, [*ours, *theirs], strict=True))
    assert min(float(gradient.abs().max()) for gradient in together) > 1e-3


def test_a_learner_makes_the_steps_of_adam() -> None:
    learner = OnlineModule(lambda: nn.Linear(3, 2), 0.01, seed=4)
    plain = nn.Linear(3, 2)
    plain.load_state_dict(learner.network.state_dict())
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    before = torch.random.get_rng_state()
    other = OnlineModule(lambda: nn.Linear(3, 2), 0.01, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)  # training's own numbers are left alone
    for i in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(i))
        loss = plain(x).square().sum() * 10**i
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert learner.learn(lambda f, x=x, i=i: f(x).square().sum() * 10**i) == pytest.approx(loss.item())
        if i == 1:
            # From here on another goes on from what it carries.
            other.load_state_dict(learner.state_dict())
            learner = other
    for ours, theirs in zip(learner.network.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert not ours.requires_grad
    # A step of Adam does not tell the gradient's size, its moments do.
    for moments, name in ((learner.first, "exp_avg"), (learner.second, "exp_avg_sq")):
        for ours, theirs in zip(moments.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours, adam.state[theirs][name], rtol=1e-4)


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of reddish pictures of two sizes, one of them in a folder inside it."""
    folder = tmp_path_factory.mktemp("examples")
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        picture = 0.3 * torch.rand(1, 3, 16, 16 + 4 * (i % 2), generator=generator)
        picture[:, 0] += 0.6
        save_image(to_pil(picture)[0], folder / ("inner" if i == 5 else ".") / f"{i}.png")
    return folder


def critic_of(red: Path, **settings: Any) -> Any:
    values = {"width": 4, "size": 16, "learning_rate": 0.01, **settings}
    return load_reward(f"discriminator(folder='{red}', {', '.join(f'{k}={v}' for k, v in values.items())})")


def test_the_critic_learns_what_examples_have_and_drawn_pictures_lack(red: Path) -> None:
    critic, generator = critic_of(red), torch.Generator().manual_seed(1)
    blue = torch.rand(4, 3, 16, 16, generator=generator) * torch.tensor([0.3, 0.3, 1.0])[:, None, None]
    redder = blue.flip(1)
    before = critic(redder, [""] * 4) - critic(blue, [""] * 4)
    assert not any(parameter.requires_grad for parameter in critic.parameters())
    for _ in range(20):
        critic.learn(blue, [""] * 4, None)
    after = critic(redder, [""] * 4) - critic(blue, [""] * 4)
    assert after.min() > before.abs().max() + 0.3
    # The same pictures in the same order whenever it goes on from there.
    other = critic_of(red)
    for name, tensor in other.carried().items():
        tensor.copy_(critic.carried()[name])
    for one in (critic, other):
        one.learn(blue, [""] * 4, None)
    assert all(torch.equal(critic.carried()[name], tensor) for name, tensor in other.carried().items())
    # What was expected holds the scores of drawn pictures where it was.
    held = critic_of(red, baseline=100.0)
    for _ in range(40):
        held.learn(blue, [""] * 4, torch.full((4, 3), 2.0))
    assert held(blue, [""] * 4).mean() == pytest.approx(2.0, abs=0.3)


SETTINGS: dict[str, Any] = {
    "steps": 2,
    "checkpointing_steps": 1,
    "validation_steps": 1,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "log_images_steps": 0,
    "num_log_prompts": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "prompts": ["a cat", "a dog", "a bird"],
    "num_validation_images": 1,
    "learning_rate": 0.01,
    "max_grad_norm": 0.1,
    "method": "sft_pg(generator_steps=3)",
}


def test_a_run_with_critic_and_value_goes_on_bit_for_bit(
    pipeline_folder: Path, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a fish\na tree\n")

    def train(name: str, **values: Any) -> draftune.Run:
        given = SETTINGS | {"eval_prompts": str(tmp_path / "prompts.txt"), "output": str(tmp_path / name)} | values
        return draftune.train(str(pipeline_folder), critic_of(red), **given)

    whole = train("whole")
    learned: list[int] = []
    learn = type(critic_of(red)).learn

    def cut_off(self: Reward, *given: Any) -> None:
        learned.append(len(given[0]))
        if len(learned) > 3:
            raise KeyboardInterrupt  # in the second update
        learn(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(type(critic_of(red)), "learn", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train("cut")
    assert [row["step"] for row in rows(tmp_path / "cut", "metrics.jsonl")] == [1]
    resumed = train("cut")
    first, second = lora(whole.folder), lora(resumed.folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(whole.folder, "metrics.jsonl") == rows(resumed.folder, "metrics.jsonl")
    assert rows(whole.folder, "evaluations.jsonl") == rows(resumed.folder, "evaluations.jsonl")
    ends = [load_file(run.folder / "checkpoints" / "step-000002" / "tensors.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    # Two batches for each of two updates, and nothing of evaluations.
    assert {name: float(ends[0][name]) for name in ends[0] if name.endswith("count")} == {
        "reward//count": 4,
        "method/count": 4,
    }
    assert [row["reward_queries"] for row in whole.metrics] == [4, 8]

    # The critic that a run left is a reward for other commands.
    taken = critic_of(red, critic=f"'{whole.folder}'")
    fresh, pictures = critic_of(red), torch.rand(2, 3, 16, 16)
    assert torch.equal(taken.carried()["network.0.weight"], ends[0]["reward//network.0.weight"])
    assert not torch.equal(taken(pictures, ["", ""]), fresh(pictures, ["", ""]))
    with raises(DraftuneError, "width"):
        critic_of(red, critic=f"'{whole.folder}'", width=5)
    plain = draftune.train(
        str(pipeline_folder), "brightness", **{**SETTINGS, "output": str(tmp_path / "plain"), "steps": 1}
    )
    with raises(DraftuneError, "discriminator", plain.folder):
        critic_of(red, critic=f"'{plain.folder}'")
    with raises(DraftuneError, "checkpoint", red):
        critic_of(red, critic=f"'{red}'")


@pytest.mark.parametrize("wrapped", ["{}", "sharpness_aware({}, rho=0.1)", "2*{} + brightness"])
def test_draft_climbs_the_critic_which_learns_afterwards(pipeline_folder: Path, red: Path, wrapped: str) -> None:
    painter = load_model(StableDiffusionPipeline.from_pretrained(pipeline_folder))
    reward = load_reward(wrapped.format(f"discriminator(folder='{red}', width=4, size=16, learning_rate=0.01)"))
    (critic,) = online_rewards(reward)
    values = {**SETTINGS, "method": "draft_k(k=1)", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    trainer = Trainer(painter, reward, **values, output="unused")
    made = trainer.train_step
    made.sample_inputs()
    (start,) = made.pending
    prompts = [trainer.prompts[i] for i in start.prompt_indices]
    denoise, _ = painter.denoisers_for(prompts, trainer.schedule, 3.0, "")
    x, steps = start.noise, trainer.schedule.steps
    with torch.no_grad():
        for step in steps[:-1]:
            prediction = denoise(x, step)
            x = step.alpha_next * prediction.clean + step.sigma_next * prediction.noise
    prediction = denoise(x, steps[-1])
    clean = steps[-1].alpha_next * prediction.clean + steps[-1].sigma_next * prediction.noise
    scores = reward(painter.decode(clean), prompts)
    expected = torch.autograd.grad(-scores.mean(), list(made.parameters.values()), allow_unused=True)
    fresh = {name: tensor.clone() for name, tensor in critic.carried().items()}
    row = made.run(1)
    assert row["reward"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert row["reward_queries"] == 2
    found = torch.cat([p.grad.flatten() for p in made.parameters.values() if p.grad is not None])
    wanted = torch.cat([gradient.flatten() for gradient in expected if gradient is not None])
    # The critic computes in float32.
    assert relative(found, wanted) < 1e-4
    assert wanted.norm() > 1e-7
    changed = [name for name, tensor in critic.carried().items() if not torch.equal(tensor, fresh[name])]
    # All but the last bias, which moves examples and drawn pictures alike.
    weights = [name for name in fresh if name.startswith("network.") and name != "network.6.bias"]
    assert len(weights) == 7
    assert set(weights) <= set(changed)
    assert critic.carried()["count"] == 1


def test_each_random_step_serves_once() -> None:
    """Two batches of four random steps for three steps of the optimiser, whose losses average to the mean of all."""
    chain, calls = Chain(), []
    schedule = Schedule((*NOISY.steps[:-1], Step(4, 0.0, 1.0, 1.0, 0.0)), "v_prediction")

    def denoise(x: Tensor, step: Step) -> Prediction:
        if torch.is_grad_enabled():
            calls.append((step.timestep, float(x.sum())))
        return chain.denoise(x, step)

    method, sizes = SFTPG(generator_steps=3), []
    noises = [torch.randn(3, 1, 1, 1, generator=torch.Generator().manual_seed(i)).double() for i in range(2)]
    batches = [batch_of(denoise, schedule, None, noise, lambda x, _: x.flatten(), 7) for noise in noises]
    for losses in method.losses_per_step(batches):
        chain.theta.grad = None
        before = len(calls)
        for loss in losses:
            (loss / 2).backward()
        sizes.append(len(calls) - before)
    assert sizes == [3, 3, 2]
    assert len(set(calls)) == 8
    assert {timestep for timestep, _ in calls} == {0, 1, 2, 3}
    # A step of all of them, by the expected values of the moment at which each batch was scored.
    whole, again = SFTPG(generator_steps=1), SFTPG(generator_steps=1)
    slope = gradient(whole, batches, chain.theta).clone()
    wanted = torch.zeros_like(slope)
    for batch in batches:
        batch.generator.manual_seed(7)
    for batch in batches:
        for i, (_, step, x, following, advantages) in enumerate(again.rollout(batch)):
            wanted[i] -= (
                advantages * (following - 0.9 * x - chain.theta[i].detach()).flatten() / step.ancestral_std**2
            ).mean() / 8
    batches = [batch_of(denoise, schedule, None, noise, lambda x, _: x.flatten(), 7) for noise in noises]
    assert torch.allclose(gradient(SFTPG(generator_steps=1), batches, chain.theta), wanted, atol=1e-9)


def test_the_value_network_learns_what_a_step_is_worth() -> None:
    """The end of the chain is 0.9 x + noise before the last step, and 0.59 x before the first."""
    method = SFTPG(value_width=16, value_learning_rate=0.01)
    for i in range(100):
        noise = 2 * torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(i)).double()
        method.rollout(batch_of(Chain().denoise, NOISY, None, noise, lambda x, _: x.flatten(), 1000 + i))
    assert method.learner is not None
    seen = torch.tensor([-1.5, 1.5])[:, None, None, None, None].expand(2, T, 1, 1, 1)
    low, high = method.learner(seen)
    slopes = (high - low) / 3
    assert torch.allclose(slopes, 0.9 ** torch.arange(T, 0, -1.0), atol=0.12)
    assert slopes[-1] > slopes[0] + 0.15


def test_what_is_wrong_is_said_before_anything_is_loaded(
    red: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, one, broken = (tmp_path / name for name in ("empty", "one", "broken"))
    for folder in (empty, one, broken):
        folder.mkdir()
    save_image(to_pil(torch.rand(1, 3, 16, 16))[0], one / "a.png")
    for name in "ab":
        (broken / f"{name}.png").write_bytes(b"no picture")
    for reward, words in (
        ("discriminator", "folder"),
        (f"discriminator(folder='{tmp_path}/none')", f"{tmp_path}/none"),
        (f"discriminator(folder='{one}/a.png')", "a.png folder"),
        ("discriminator(folder='')", "folder ''"),
        (f"discriminator(folder='{empty}')", str(empty)),
        (f"discriminator(folder='{one}')", "1 2"),
        (f"discriminator(folder='{broken}')", str(broken)),
        (f"discriminator(folder='{red}', width=0)", "width discriminator 1 0"),
        (f"discriminator(folder='{red}', size=8)", "size discriminator 16 8"),
        (f"discriminator(folder='{red}', baseline=-1)", "baseline discriminator -1 0"),
        (f"discriminator(folder='{red}', learning_rate=0)", "learning_rate discriminator 0 1"),
    ):
        with raises(DraftuneError, words):
            parse_reward(reward)
        assert main(["train", "--reward", reward, "--output", str(tmp_path / "run")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    for setting in (
        "generator_steps=0",
        "value_width=0",
        "value_learning_rate=0",
        "seed=-1",
        "seed=9223372036854775808",
    ):
        assert main(["train", "--method", f"sft_pg({setting})", "--output", str(tmp_path / "run")]) == 2
        assert mentions(capsys.readouterr().err, setting.replace("=", " "))
    assert not (tmp_path / "run").exists()


def test_a_critic_that_knows_nothing_is_not_asked(
    red: Path, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside of training it would be random numbers with an interval."""
    reward = f"2*discriminator(folder='{red}', width=2, size=16)"
    model, out = str(pipeline_folder), ["--device", "cpu", "--output", str(tmp_path / "out")]
    tune = ["experimental", "tune-weights", "--prompts", "animals", "--guidance-bounds", "1,9", "--model"]
    for argv in (
        ["score", str(red), "--reward", reward],
        ["optimize-noise", model, "--prompt", "a cat", "--reward", reward, *out],
        [*tune, model, "--reward", reward, *out],
        [
            "sample",
            model,
            "--prompt",
            "a cat",
            "--guidance-reward",
            reward,
            "--device",
            "cpu",
            "--output",
            f"{tmp_path}/a.png",
        ],
        [
            "train",
            "--model",
            model,
            "--reward",
            reward,
            "--reward-normalization-samples",
            "4",
            "--output",
            str(tmp_path / "run"),
        ],
    ):
        assert main(argv) == 2, argv
        said = capsys.readouterr().err.strip().splitlines()
        assert mentions(said[-1], "discriminator critic")


def test_kid_equals_the_formula() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 2 + 1) ** 3)

    within = sum(k(a[i], a[j]) for i in range(3) for j in range(3) if i != j) / 6 + k(b[0], b[1])
    across = sum(k(x, y) for x in a for y in b) / 6
    assert kid(a, b) == pytest.approx(within - 2 * across)
    generator = torch.Generator().manual_seed(0)
    alike = [kid(*torch.randn(2, 20, 3, generator=generator)) for _ in range(300)]
    # Without bias: its mean is 0 where the sets are of one distribution.
    assert abs(sum(alike) / 300) < 3 * float(torch.tensor(alike).std()) / 300**0.5
    assert kid(torch.zeros(20, 3), torch.ones(20, 3)) == pytest.approx(1 + 8 - 2)
