"""Gradients with a LoRA on a range of the steps, in float64, against plain autograd that switches it by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_gradients import GRIDS, NOISE, Network, T, batch_of, clean_and_noise, gradient_of_method, relative, reward
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.experimental.retention import Retention
from draftune.methods import (
    DDPO,
    KL,
    AdjointMatching,
    AlignProp,
    DirectAlign,
    Draft,
    DraftK,
    DraftLV,
    DRTune,
    FlowBPSparse,
    LeapAlign,
    Method,
    ReFL,
    load_method,
)
from draftune.models import StableDiffusion
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Prediction, Schedule, Step
from draftune.sampling.step_range import StepRange
from draftune.settings import Settings
from draftune.training.setup import check_trained_steps
from helpers.draws import injected
from helpers.errors import raises
from helpers.pipelines import add_random_lora, build_pipeline

FIRST_STEPS = {"0.0-0.4": [0, 1], "0.2-0.8": [1, 2, 3], "0.6-1.0": [3, 4]}


def marked(lora_steps: str, grid: str = "clean") -> Schedule:
    return StepRange.parse(lora_steps).mark(GRIDS[grid])


class Switched:
    """A trainable network for the tuned steps, and a frozen one for the others."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.network = schedule, Network()
        torch.manual_seed(2)
        self.base = copy.deepcopy(self.network).requires_grad_(False)
        for parameter in self.base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        self.trained: list[float] = []
        self.base_calls = 0

    def output(self, x: Tensor, step: Step) -> Tensor:
        result: Tensor = (self.network if step.tuned else self.base)(x, step.timestep)
        return result

    def denoise(self, x: Tensor, step: Step) -> Prediction:
        if torch.is_grad_enabled() and step.tuned:
            self.trained.append(step.timestep)
        return self.schedule.to_prediction(self.output(x, step), x, step)

    def base_denoise(self, x: Tensor, step: Step) -> Prediction:
        self.base_calls += 1
        return self.schedule.to_prediction(self.base(x, step.timestep), x, step)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.network.parameters() if p.grad is not None])

    def of_method(self, method: Method) -> Tensor:
        """Return the gradient of the method's loss, downhill."""
        self.network.zero_grad()
        batch = batch_of(self.denoise, self.schedule, self.base_denoise, reward=lambda x, *_: reward(x))
        for losses in method.losses_per_step([batch]):
            for loss in losses:
                loss.backward()
        return self.gradient()

    def by_hand(self, detached: int, stop: int = T) -> Tensor:
        """Autograd through a sampler that detaches its state up to a step, and jumps to x_0 at step `stop` - 1."""
        self.network.zero_grad()
        x, kind = NOISE, self.schedule.prediction_type
        for i, step in enumerate(self.schedule.steps[:stop]):
            x = x.detach() if i <= detached else x
            clean, noise = clean_and_noise(self.output(x, step), x, step, kind)
            x = step.alpha_next * clean + step.sigma_next * noise
        (-reward(x if stop == T else clean).mean()).backward()
        return self.gradient()


@pytest.mark.parametrize("lora_steps", FIRST_STEPS)
@pytest.mark.parametrize("grid", ["leading", "v"])
def test_draft_backpropagates_through_the_steps_of_the_base_model(lora_steps: str, grid: str) -> None:
    switched = Switched(marked(lora_steps, grid))
    ours = switched.of_method(Draft())
    assert relative(ours, switched.by_hand(0)) < 1e-12
    everywhere = gradient_of_method(Draft(), GRIDS[grid], switched.network)
    assert relative(ours, -everywhere) > 1e-2


@pytest.mark.parametrize(("lora_steps", "k"), [("0.0-0.4", 4), ("0.2-0.8", 2), ("0.2-0.8", 5), ("0.6-1.0", 4)])
def test_draft_k_trains_the_steps_of_the_range_among_the_last_k(lora_steps: str, k: int) -> None:
    switched = Switched(marked(lora_steps))
    ours = switched.of_method(DraftK(k))
    assert relative(ours, switched.by_hand(T - k)) < 1e-12
    trained = [switched.schedule.steps[i].timestep for i in FIRST_STEPS[lora_steps] if i >= T - k]
    assert switched.trained == trained


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_refl_stops_at_a_step_of_the_range(stop: int) -> None:
    """Of the last 4 steps, the range holds 1, 2 and 3; the reward scores the x_0 predicted there."""
    switched = Switched(marked("0.2-0.8"))
    with injected(randint=[5 - stop]) as ranges:
        ours = switched.of_method(ReFL(4))
    assert ranges == [(1, 4)]
    assert relative(ours, switched.by_hand(stop - 1, stop)) < 1e-12


def test_alignprop_raises_a_k_that_does_not_reach_the_range() -> None:
    """The range ends after step 1 of 5, which the last 4 steps reach."""
    switched = Switched(marked("0.0-0.4"))
    with injected(randint=[[2, 1]]):
        ours = switched.of_method(AlignProp("uniform"))
    assert relative(ours, switched.by_hand(T - 4)) < 1e-12


def test_drtune_spreads_its_calls_over_the_range() -> None:
    """Of the 4 calls that are made, 1, 2 and 3 are in the range, and it trains 1 and 2 or 2 and 3."""
    switched = Switched(marked("0.2-0.8"))
    with injected(randint=[2, 1]) as ranges:
        ours = switched.of_method(DRTune(2, 2))
    assert ranges == [(1, 3), (0, 2)]
    switched.network.zero_grad()
    x = NOISE
    for i, step in enumerate(switched.schedule.steps[:4]):
        output = switched.output(x.detach(), step)
        clean, noise = clean_and_noise(output if i in (2, 3) else output.detach(), x, step, "epsilon")
        x = step.alpha_next * clean + step.sigma_next * noise
    (-reward(clean).mean()).backward()
    assert relative(ours, switched.gradient()) < 1e-12


def test_leapalign_leaps_between_steps_of_the_range() -> None:
    switched = Switched(marked("0.2-0.8"))
    steps, kind = switched.schedule.steps, "epsilon"
    with injected(randperm=[[2, 0, 1]]):
        ours = switched.of_method(LeapAlign(0.2))
    k, j = 1, 3
    path = [NOISE]
    with torch.no_grad():
        for step in steps:
            clean, noise = clean_and_noise(switched.output(path[-1], step), path[-1], step, kind)
            path.append(step.alpha_next * clean + step.sigma_next * noise)
    switched.network.zero_grad()
    clean, noise = clean_and_noise(switched.output(path[k], steps[k]), path[k], steps[k], kind)
    x = steps[j].alpha * clean + steps[j].sigma * noise
    x = x + (path[j] - x).detach()
    clean, noise = clean_and_noise(switched.output(0.2 * x + 0.8 * x.detach(), steps[j]), x, steps[j], kind)
    x = steps[-1].alpha_next * clean + steps[-1].sigma_next * noise
    (-reward(x + (path[T] - x).detach()).mean()).backward()
    assert relative(ours, switched.gradient()) < 1e-12


def test_flowbp_and_direct_align_train_steps_of_the_range_only() -> None:
    """Active steps 1 to 3 by the linear path; and the re-noised image, sampled with the base model outside of it."""
    switched = Switched(marked("0.2-0.8"))
    steps, kind = switched.schedule.steps, "epsilon"
    ours = switched.of_method(FlowBPSparse(3))
    switched.network.zero_grad()
    x = NOISE
    for i, step in enumerate(steps):
        output = switched.output(x.detach(), step)
        clean, noise = clean_and_noise(output if i in (1, 2, 3) else output.detach(), x, step, kind)
        x = step.alpha_next * clean + step.sigma_next * noise
    (-reward(x).mean()).backward()
    assert relative(ours, switched.gradient()) < 1e-12
    with injected(randint=[2]) as ranges:
        ours = switched.of_method(DirectAlign(0.0, 1.0, inversion=False))
    assert ranges == [(0, 3)]
    switched.network.zero_grad()
    step, image = steps[3], x.detach()
    noisy = step.alpha * image + step.sigma * NOISE
    clean, noise = clean_and_noise(switched.output(noisy, step), noisy, step, kind)
    (-reward(clean + step.sigma_next / step.alpha_next * (noise - NOISE)).mean()).backward()
    assert relative(ours, switched.gradient()) < 1e-12


def test_kl_penalizes_no_step_of_the_base_model() -> None:
    """The penalty of DRaFT over 5 steps is that of the two steps in the range, where alone it calls the base model."""
    switched = Switched(marked("0.0-0.4"))
    ours = switched.of_method(KL(Draft(), 0.3)) - switched.of_method(Draft())
    assert switched.base_calls == 2
    switched.network.zero_grad()
    x, penalty = NOISE, torch.zeros(())
    for step in switched.schedule.steps[:2]:
        output = switched.output(x, step)
        penalty = penalty + (output - switched.base(x, step.timestep)).square().mean()
        clean, noise = clean_and_noise(output, x, step, "epsilon")
        x = step.alpha_next * clean + step.sigma_next * noise
    (0.3 * penalty).backward()
    assert relative(ours, switched.gradient()) < 1e-9


@pytest.mark.parametrize("method", ["adjoint_matching(k=9)", "ddpo", "dpok", "flow_grpo", "sft_pg(generator_steps=1)"])
@pytest.mark.parametrize(("lora_steps", "trained"), [("0.2-0.8", [1, 2, 3]), ("0.6-1.0", [3])])
def test_methods_with_stochastic_steps_train_those_of_the_range(
    method: str, lora_steps: str, trained: list[int]
) -> None:
    """The last step is deterministic."""
    switched = Switched(marked(lora_steps))
    assert switched.of_method(load_method(method)).norm() > 0
    assert set(switched.trained) == {switched.schedule.steps[i].timestep for i in trained}


def test_the_retention_loss_is_taken_at_a_step_of_the_range() -> None:
    switched = Switched(marked("0.2-0.8"))
    batch = batch_of(switched.denoise, switched.schedule, switched.base_denoise)
    batch.retention_batch = batch_of(switched.denoise, switched.schedule, switched.base_denoise)
    with injected(randint=[2]) as ranges:
        (losses,) = Retention(DraftK(2), 1.0).losses_per_step([batch])
        _, loss = losses
    assert ranges == [(0, 3)]
    assert switched.trained[-1] == switched.schedule.steps[3].timestep
    assert loss > 0


def switched_unet(model: StableDiffusion, base: torch.nn.Module, prompts: list[str], scale: float) -> Denoiser:
    """The guided denoiser by diffusers' networks alone: the UNet with the LoRA at tuned steps, else a copy without."""
    positive, negative = (c.double() for c in model.pipeline.encode_prompt(prompts, "cpu", 1, True))

    def denoise(x: Tensor, step: Step) -> Prediction:
        unet = model.pipeline.unet if step.tuned else base
        low, high = unet(x, step.timestep, negative).sample, unet(x, step.timestep, positive).sample
        return Prediction(*clean_and_noise(low + scale * (high - low), x, step, "epsilon"))

    return denoise


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "denoiser", "both"])
@pytest.mark.parametrize(
    ("method", "lora_steps"),
    [("draft_k(k=4)", "0.0-0.5"), ("draft_k(k=3)", "0.25-0.75"), ("draft", "0.5-1"), ("kl(draft, beta=9)", "0.0-0.5")],
)
def test_on_a_pipeline_it_equals_plain_autograd(
    tmp_path: Path, method: str, lora_steps: str, checkpointing: str
) -> None:
    """LoRA, UNet, guidance and recomputation: the backward pass repeats the calls of base steps without the LoRA."""
    pipeline = build_pipeline(tmp_path)
    pipeline.unet.double()
    base = copy.deepcopy(pipeline.unet).requires_grad_(False)
    model = StableDiffusion(pipeline, "tiny")
    parameters = add_random_lora(model)
    model.lora_steps = StepRange.parse(lora_steps)
    prompts, schedule = ["a cat", "dogs"], model.schedule(4)
    noise = model.noise(torch.Generator().manual_seed(0), 2)

    def gradient(denoise: Denoiser, base_denoise: Denoiser) -> Tensor:
        model.denoiser.zero_grad()
        (losses,) = load_method(method).losses_per_step([batch_of(denoise, schedule, base_denoise, noise)])
        for loss in losses:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])

    model.set_checkpointing("none")
    by_hand = switched_unet(model, base, prompts, 3.0)
    expected = gradient(by_hand, lambda x, step: by_hand(x, step._replace(tuned=False)))
    model.set_checkpointing(checkpointing)
    ours = gradient(*model.denoisers_for(prompts, schedule, 3.0))
    assert relative(ours, expected) < 1e-9
    schedule = model._schedule(4)
    assert relative(gradient(*model.denoisers_for(prompts, schedule, 3.0)), expected) > 1e-2


@pytest.mark.parametrize(
    ("method", "lora_steps", "words"),
    [
        (DraftK(1), "0.0-0.4", "draft_k(k=4)"),
        (DraftK(3), "0.0-0.4", "draft_k(k=4)"),
        (KL(DraftLV(), 0.1), "0.2-0.8", "draft_k(k=2)"),
        (ReFL(2), "0.0-0.4", "draft_k(k=4)"),
        (AlignProp("uniform", 3), "0.0-0.4", "draft_k(k=4)"),
        (DDPO(), "0.8-1.0", "draft_k(k=1)"),
        (AdjointMatching(), "0.8-1.0", "draft_k(k=1)"),
    ],
)
def test_a_method_that_reaches_no_step_of_the_range_is_refused(method: Method, lora_steps: str, words: str) -> None:
    settings = Settings(method="named", lora_steps=lora_steps, num_inference_steps=T)
    with raises(DraftuneError, "lora_steps", lora_steps, "'named'", words):
        check_trained_steps(settings, method, marked(lora_steps))


@pytest.mark.parametrize(
    "method", [Draft(), DraftK(4), ReFL(4), AlignProp(), DRTune(2, 1), LeapAlign(), DirectAlign(), DDPO()]
)
def test_a_method_that_reaches_the_range_is_accepted(method: Method) -> None:
    schedule = marked("0.0-0.4")
    method.check(schedule)
    check_trained_steps(Settings(lora_steps="0.0-0.4", num_inference_steps=T), method, schedule)


@pytest.mark.parametrize(
    ("method", "lora_steps"), [(DRTune(3, 1), "0.0-0.4"), (DRTune(1, 3), "0.6-1"), (LeapAlign(), "0-0.2")]
)
def test_methods_of_several_trained_steps_need_them_in_the_range(method: Method, lora_steps: str) -> None:
    with raises(DraftuneError, "lora_steps"):
        method.check(marked(lora_steps))
