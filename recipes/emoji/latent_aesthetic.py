"""Distill `emoji_aesthetic` into a reward of the embedded model's clean latents.

    python recipes/emoji/latent_aesthetic.py --output build/emoji/latent-aesthetic

    loss = (f(z) - r(D(z)))^2 + 0.5 |grad f(z) - grad r(D(z))|^2 / mean |grad r(D(z))|^2

with the student f, the image reward r and the decoder D (Sobolev training, Czarnecki et al., 2017, arXiv:1706.04859).
The latents z are sampled by the embedded model, and by the model fine-tuned on r, since training leaves the base
model's latents; mixtures of two with noise double them. Between rounds, latents that gradient ascent on f reaches are
scored by r and added, so that f is not exploited there. Latents and the fine-tuned model are read from --output if it
has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cosine_similarity

import draftune
from common import Progress, cosine
from draftune.lora import load_lora, set_lora_scale
from draftune.models import DiffusionModel, load_model
from draftune.prompts import load_prompts
from draftune.rewards import Reward, load_reward
from draftune.rewards.emoji_latent import LatentNetwork
from draftune.sampling.sampler import rollout

TEACHER = "emoji_aesthetic"
BATCH = 32


@torch.no_grad()
def sample_latents(model: DiffusionModel, prompts: Sequence[str], count: int, guidance: float, seed: int) -> Tensor:
    """Sample clean latents [count, 8, 16, 16] for prompts in random order."""
    generator, latents = torch.Generator().manual_seed(seed), []
    order = torch.randperm(len(prompts), generator=generator).tolist()
    schedule = model.schedule(10)
    for start in range(0, count, BATCH):
        batch = [prompts[order[i % len(order)]] for i in range(start, min(start + BATCH, count))]
        noise = model.noise(generator, len(batch))
        latents.append(rollout(model.denoiser_for(batch, schedule, guidance), schedule.steps, noise))
    return torch.cat(latents)


def mixed(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Interpolate random pairs of latents on a circle, and add noise to half of them."""
    other = latents[torch.randperm(len(latents), generator=generator)]
    angle, level = ((torch.rand(len(latents), 1, 1, 1, generator=generator) - 0.5).clamp(min=0) for _ in range(2))
    angle = angle * torch.pi / 2
    return angle.cos() * latents + angle.sin() * other + 0.6 * level * torch.randn(other.shape, generator=generator)


def labeled(model: DiffusionModel, teacher: Reward, latents: Tensor) -> dict[str, Tensor]:
    """Return latents, the teacher's scores of their images, and the gradients with respect to the latents."""
    scores, gradients = [], []
    for some in latents.split(BATCH):
        x = some.detach().clone().requires_grad_()
        score = teacher(model.decode(x), [""] * len(x))
        gradients.append(torch.autograd.grad(score.sum(), x)[0])
        scores.append(score.detach())
    return {"latents": latents.detach(), "scores": torch.cat(scores), "gradients": torch.cat(gradients)}


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate sets of labeled latents."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def sample_sets(args: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """Sample and label latents: "train", and of other prompts "base" and "tuned" for the evaluation."""
    model, teacher = load_model("emoji"), load_reward(TEACHER)
    teacher.set_chunk_size(BATCH)
    others, common = load_prompts("emoji"), load_prompts("emoji-common")
    train, sets = [], {}
    for i, guidance in enumerate((1.0, 2.0, 3.0, 5.0)):
        train.append(sample_latents(model, others, args.count // 8, guidance, i))
    sets["base"] = labeled(model, teacher, sample_latents(model, common, 192, 3.0, 100))
    run = args.output / "run"
    if not (run / "lora").exists():
        options = {"log_images_steps": 0, "checkpointing_steps": 0, "num_inference_steps": 20, "guidance_scale": 3.0}
        settings = {"method": "draft_lv", "steps": args.run_steps, "learning_rate": 1e-3, "output": str(run)}
        draftune.train("emoji", TEACHER, **settings, **options)
    load_lora(model, run / "lora")
    for i, scale in enumerate((0.3, 0.6, 0.85, 1.0)):
        set_lora_scale(model, scale)
        train.append(sample_latents(model, others, args.count // 8, 3.0, 10 + i))
    sets["tuned"] = labeled(model, teacher, sample_latents(model, common, 192, 3.0, 101))
    sampled = torch.cat(train)
    wider = torch.cat([sampled, mixed(sampled, torch.Generator().manual_seed(0))])
    return {"train": labeled(model, teacher, wider), **sets}


def exploited(student: LatentNetwork, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Move latents by 8 steps of gradient ascent on the student, by at most 0.6 times their norm."""
    x = latents.clone()
    lengths = 0.6 * torch.rand(len(x), 1, 1, 1, generator=generator) * x.flatten(1).norm(dim=1)[:, None, None, None]
    for _ in range(8):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(student(x).sum(), x)
        x = x.detach() + lengths / 8 * slope / slope.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
    return x


def train(student: LatentNetwork, data: dict[str, Tensor], steps: int, peak: float, generator: torch.Generator) -> None:
    """Fit scores and gradients of the labeled latents."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=peak, weight_decay=1e-2)
    scale = data["gradients"].square().flatten(1).sum(1).mean()
    progress = Progress(0, steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak)
        rows = torch.randint(len(data["scores"]), (48,), generator=generator)
        x = data["latents"][rows].clone().requires_grad_()
        scores = student(x)
        (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        fit = (scores - data["scores"][rows]).square().mean()
        slopes = (slope - data["gradients"][rows]).square().flatten(1).sum(1).mean() / scale
        optimizer.zero_grad()
        (fit + 0.5 * slopes).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        progress.show(mse=fit.item(), slopes=slopes.item())


def evaluate(student: LatentNetwork, name: str, data: dict[str, Tensor]) -> None:
    """Print rank correlation, error and the cosine of the gradients."""
    x = data["latents"].clone().requires_grad_()
    scores = student(x)
    (slope,) = torch.autograd.grad(scores.sum(), x)
    rank = spearmanr(scores.detach(), data["scores"]).statistic
    error = (scores.detach() - data["scores"]).square().mean().sqrt()
    cosines = cosine_similarity(slope.flatten(1), data["gradients"].flatten(1))
    print(
        f"{name}, {len(x)} latents: Spearman {rank:.3f}, root mean squared error {error:.2f}, teacher "
        f"{data['scores'].mean():.2f} ± {data['scores'].std():.2f}, cosine of the gradients {cosines.mean():.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/emoji/latent-aesthetic"))
    parser.add_argument("--assets", type=Path, default=Path("src/draftune/assets"))
    parser.add_argument("--count", type=int, default=1280, help="sampled latents (default: 1280)")
    parser.add_argument("--run-steps", type=int, default=45, help="updates of the fine-tuned model (default: 45)")
    parser.add_argument("--steps", type=int, default=600, help="updates of each round (default: 600)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the weights in --assets")
    args = parser.parse_args()

    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    cache = args.output / "latents.pt"
    if not cache.exists():
        torch.save(sample_sets(args), cache)
    sets = torch.load(cache)
    file = args.assets / "emoji-latent-aesthetic" / "model.safetensors"
    model, teacher = load_model("emoji"), load_reward(TEACHER)
    teacher.set_chunk_size(BATCH)
    student, generator = LatentNetwork(), torch.Generator().manual_seed(0)
    if not args.evaluate:
        data = sets["train"]
        for i in range(args.rounds):
            train(student, data, args.steps, 2e-3 if i == 0 else 1e-3, generator)
            for name in ("base", "tuned"):
                evaluate(student, name, sets[name])
            if i + 1 < args.rounds:
                rows = torch.randperm(len(sets["train"]["scores"]), generator=generator)[: args.count // 2]
                moved = labeled(model, teacher, exploited(student, sets["train"]["latents"][rows], generator))
                evaluate(student, "after ascent on the student", moved)
                data = joined([data, moved])
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half() for key, value in student.state_dict().items()}, file)
    student.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    for name in ("base", "tuned"):
        evaluate(student, name, sets[name])
    moved = exploited(student, sets["base"]["latents"], torch.Generator().manual_seed(1))
    evaluate(student, "base, after ascent on the student", labeled(model, teacher, moved))


if __name__ == "__main__":
    main()
