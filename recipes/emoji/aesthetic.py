"""Train the two networks of `emoji_aesthetic`: a head on the embeddings of `emoji_clip`, and a ResNet of the pixels.

    python recipes/emoji/aesthetic.py --data build/emoji

Both regress 10 sigmoid(logit) to a target: 8 for the style 3d and 3 for the flat styles, less with the strength of
damage that was done to the image, down to 1 for images of over-optimized models (exploit.py). So the score is bounded,
and its maximum is not where a linear function of embeddings has it. The networks see different features, and what fools
one need not fool the other. Half of the real images went through the embedded model's autoencoder: its texture must not
be what tells an over-optimized model.

The networks are written into --assets in half precision and evaluated on every tenth name, which they are not trained
on. With --evaluate they are only evaluated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import CLIPModel, ResNetConfig, ResNetForImageClassification

from augment import augmented, damaged
from common import Progress, autocast, cosine, export_resnet, percent, pick_device, to_float
from data import STYLES, Emoji, held_out_names, table
from draftune.rewards.aesthetic import Head
from emoji_clip import DIM, SIZE, embed_images
from exploit import DAMAGING, load_exploited, sample_exploited
from measure import reconstructed

GLOSSY, FLAT, WORST = 8.0, 3.0, 1.0
TOP = 10.0
Scorer = Callable[[Tensor], Tensor]
"""Returns the scores [N] of images [N, 3, H, W] in [-1, 1]."""


def resnet_config() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=24,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        downsample_in_first_stage=True,
        out_features=["stage3"],
        num_labels=1,
    )


def pick(images: Tensor, targets: Tensor, exploited: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sample a batch: intact images, damaged ones, and images of over-optimized models, with their targets.

    Args:
        images: Real images [names, styles, 3, H, W] in [-1, 1].
        targets: Target of each style.
        exploited: Images of over-optimized models, uint8 [N, H, W, 3]; N may be 0.
        size: Images of the batch.
    """
    # Up to a fifth of the batch is of over-optimized models. These images are augmented too, so that no network learns
    # the autoencoder's texture instead.
    worst = sample_exploited(exploited, size // 5)
    count = size - len(worst)
    weights = (targets == GLOSSY).float() + 0.5
    style = torch.multinomial(weights, count, replacement=True)
    x, y = images[torch.randint(len(images), (count,)), style], targets[style]
    kept = count // 2
    broken, strength = damaged(x[kept:])
    intact = augmented(torch.cat([x[:kept], worst]), float(torch.rand(())) / 2)
    lowered = y[kept:] + strength * (WORST - y[kept:])
    return torch.cat([intact, broken]), torch.cat([y[:kept], torch.full((len(worst),), WORST), lowered])


def train(
    network: nn.Module, embed: Scorer | None, data: tuple[Tensor, Tensor, Tensor], args: argparse.Namespace
) -> None:
    """Train a network on the squared error of the bounded scores.

    Args:
        network: The ResNet, or the head.
        embed: Computes the head's inputs from images, without gradient.
        data: Real images, targets of the styles and images of over-optimized models, as `pick` takes them.
        args: The arguments.
    """
    device = pick_device()
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=0.05)
    progress = Progress(0, args.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.learning_rate)
        x, y = pick(*data, args.batch_size)
        with autocast(device):
            if embed is not None:
                with torch.no_grad():
                    x = embed(x.to(device))
            logits = network(x.to(device))
        loss = mse_loss(bounded(logits), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        progress.show(mse=loss.item())


def bounded(output: Tensor | object) -> Tensor:
    """Return 10 sigmoid(logit) of a head's or a ResNet's output."""
    logits = output if isinstance(output, Tensor) else output.logits[:, 0]
    return TOP * logits.float().sigmoid()


@torch.no_grad()
def evaluate(scorers: dict[str, Scorer], images: Tensor, worst: Tensor) -> None:
    """Print mean scores of held-out images, intact and damaged, and how often 3d scores above both flat styles.

    Args:
        scorers: The score of each network, and that of the reward.
        images: Real images [names, styles, 3, H, W] of the held-out names.
        worst: The judge's images of over-optimized models [N, 3, H, W].
    """
    glossy = STYLES.index("3d")
    flat = [i for i in range(len(STYLES)) if i != glossy]
    torch.manual_seed(1)
    broken, strength = damaged(images[:, glossy])
    for name, score in scorers.items():
        scores = score(images.flatten(0, 1)).view(images.shape[:2])
        line = ", ".join(f"{style} {scores[:, i].mean():.2f}" for i, style in enumerate(STYLES))
        line += f", damaged 3d {score(broken[strength > 0.5]).mean():.2f}"
        if len(worst):
            line += f", over-optimized {score(worst).mean():.2f}"
        print(f"{name}: {line}; 3d above both flat styles {percent(scores[:, glossy] > scores[:, flat].amax(1))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--assets", type=Path, default=Path("src/draftune/assets"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(10)
    emoji, device, folder = Emoji.load(args.data), pick_device(), args.assets / "emoji-aesthetic"
    images = to_float(emoji.images)[torch.from_numpy(table(emoji))]
    held_out = torch.tensor([name in held_out_names(emoji.names) for name in emoji.vocabulary])
    clip = CLIPModel.from_pretrained(args.assets / "emoji-clip", dtype=torch.float32).to(device).eval()
    embed = lambda x: embed_images(clip, x)  # noqa: E731
    if not args.evaluate:
        targets = torch.tensor([GLOSSY if style == "3d" else FLAT for style in STYLES])
        vae = AutoencoderKL.from_pretrained(args.assets / "emoji" / "vae").to(device).eval()
        seen = images[~held_out]
        decoded = 2 * reconstructed(vae, (seen.flatten(0, 1) + 1) / 2).view_as(seen) - 1
        data = torch.cat([seen, decoded]), targets, load_exploited(args.data, rewards=DAMAGING)
        network, head = ResNetForImageClassification(resnet_config()).to(device), Head(DIM).to(device)
        train(network.train(), None, data, args)
        train(head, embed, data, args)
        export_resnet(network, folder, SIZE)
        save_file({key: value.half() for key, value in head.state_dict().items()}, folder / "head.safetensors")
    network = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    head = Head(DIM).to(device)
    head.load_state_dict(load_file(folder / "head.safetensors"))
    scorers: dict[str, Scorer] = {
        "head": lambda x: bounded(head(embed(x.to(device)))).cpu(),
        "ResNet": lambda x: bounded(network(x.to(device))).cpu(),
    }
    scorers["mean"] = lambda x: (scorers["head"](x) + scorers["ResNet"](x)) / 2
    evaluate(scorers, images[held_out], to_float(load_exploited(args.data, True, DAMAGING).numpy()))


if __name__ == "__main__":
    main()
