"""Train the judge: a classifier of emoji names and styles for evaluation, never used as a training reward.

    python recipes/emoji/judge.py --data build/emoji --output build/emoji/judge

Only the images are the same as for the rewards: seed, architecture, objective and augmentation differ. Beside the three
styles it knows a fourth, `damaged`: coarse pixels, JPEG artifacts and mixtures of two emoji, and images of
over-optimized models (exploit.py), other ones than the rewards are trained on. It resumes from its checkpoint in
--output, writes `emoji-judge` into --assets in half precision and evaluates it. With --evaluate it only evaluates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate, max_pool2d
from transformers import ResNetConfig, ResNetForImageClassification

from common import (
    Progress,
    autocast,
    cosine,
    export_resnet,
    load_state,
    percent,
    pick_device,
    save_state,
    to_float,
    uniform,
)
from data import COMMON, STYLES, Emoji
from exploit import DAMAGING, load_exploited, sample_exploited

SIZE = 128
DAMAGED = "damaged"
LABELS = (*STYLES, DAMAGED)


def judge_config(names: list[str]) -> ResNetConfig:
    """Return the network's config. The classes are the names in alphabetical order, then the styles and "damaged"."""
    labels = names + [f"style: {style}" for style in LABELS]
    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 160],
        depths=[2, 2, 2],
        layer_type="basic",
        downsample_in_first_stage=True,
        out_features=["stage3"],
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )


def backgrounds(x: Tensor) -> Tensor:
    """Flood-fill white from the border: [N, 1, H, W], true in the background."""
    white = (x.amin(1, keepdim=True) > 0.97).float()
    reached = torch.zeros_like(white)
    reached[..., [0, -1], :] = reached[..., [0, -1]] = 1
    reached *= white
    # Longer paths of white pixels are ignored.
    for _ in range(2 * SIZE):
        reached = max_pool2d(reached, 3, 1, 1) * white
    return reached.bool()


def cropped(x: Tensor, fill: Tensor) -> Tensor:
    """Crop, resize and maybe mirror at random, with `fill` outside of the image."""
    n = len(x)
    size = torch.exp(torch.empty(n, 1).uniform_(-0.35, 0.2)) * torch.exp(torch.empty(n, 2).uniform_(-0.12, 0.12))
    offset = (0.08 + (1 - size).abs()) * torch.empty(n, 2).uniform_(-1, 1)
    size[:, 0] *= torch.randint(2, (n,)) * 2 - 1
    matrix = torch.cat([torch.diag_embed(size), offset[..., None]], -1)
    grid = affine_grid(matrix, list(x.shape), align_corners=False)
    return fill + grid_sample(x - fill, grid, align_corners=False)


def toned(x: Tensor) -> Tensor:
    """Apply a random gamma to each image and a random gain to each channel."""
    x = ((x + 1) / 2).clamp(1e-3, 1) ** torch.exp(uniform(len(x), -0.5, 0.5))
    return (x * torch.empty(len(x), 3, 1, 1).uniform_(0.8, 1.15)).clamp(0, 1) * 2 - 1


def coarse(x: Tensor) -> Tensor:
    """Downsample images to a random size, to a fifth or less of their side, and upsample them again."""
    size = int(torch.randint(SIZE // 10, SIZE // 5, ()))
    back = "nearest" if torch.rand(()) < 0.5 else "bilinear"
    return interpolate(interpolate(x, (size, size), mode="area"), (SIZE, SIZE), mode=back)


def posterized(x: Tensor) -> Tensor:
    """Round the colors of blocks of 4 x 4 pixels to a few levels, each block with a random offset."""
    blocks = (len(x), 3, SIZE // 4, SIZE // 4)
    offset = interpolate(torch.rand(blocks) - 0.5, (SIZE, SIZE))
    return (((x + 1) * 2 + offset).round() / 2 - 1).clamp(-1, 1)


def mixed(x: Tensor) -> Tensor:
    """Blend each image with another one."""
    return x.lerp(x.roll(1, 0), uniform(len(x), 0.3, 0.5))


def damaged(x: Tensor) -> Tensor:
    """Damage a batch of images in one of three ways. The rewards are trained on other kinds of damage."""
    return (coarse, posterized, mixed)[int(torch.randint(3, ()))](x)


def augmented(x: Tensor, background: Tensor) -> Tensor:
    """Augment images in [-1, 1]; a third of them get a gray background instead of white."""
    gray = torch.where(torch.rand(len(x), 1, 1, 1) < 1 / 3, uniform(len(x), -1, 1), 1.0)
    return toned(cropped(torch.where(background, gray, x), gray))


def labels(emoji: Emoji) -> tuple[Tensor, Tensor]:
    """Return the class indices [N] of names and of styles."""
    position = {name: i for i, name in enumerate(emoji.vocabulary)}
    return torch.tensor([position[n] for n in emoji.names]), torch.tensor([STYLES.index(s) for s in emoji.styles])


def train(judge: ResNetForImageClassification, emoji: Emoji, args: argparse.Namespace) -> None:
    """Train on cross-entropy of names (label smoothing 0.05) and of styles."""
    device = judge.device
    images = to_float(emoji.images)
    background = torch.cat([backgrounds(x) for x in images.split(256)])
    name, style = labels(emoji)
    exploited = load_exploited(args.data, True, DAMAGING)

    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.learning_rate, weight_decay=0.05)
    start = load_state(args.output, judge, optimizer)
    progress = Progress(start, args.steps)
    few = args.batch_size // 8
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.learning_rate)
        index = torch.randint(len(images), (args.batch_size,))
        x = augmented(images[index], background[index])
        worst = sample_exploited(exploited, few)
        worst = toned(cropped(worst, torch.ones(len(worst), 1, 1, 1)))
        x = torch.cat([x, damaged(x[:few]), worst]).to(device, memory_format=torch.channels_last)
        with autocast(device):
            logits = judge(x).logits.float()
        names, styles = logits[: len(index), : -len(LABELS)], logits[:, -len(LABELS) :]
        target = name[index].to(device)
        # Damaged images have no name to be learned.
        kinds = torch.cat([style[index], torch.full((len(x) - len(index),), LABELS.index(DAMAGED))]).to(device)
        loss = cross_entropy(names, target, label_smoothing=0.05) + cross_entropy(styles, kinds)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()
        progress.show(loss=loss.item(), accuracy=(names.argmax(1) == target).float().mean().item())
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save_state(args.output, judge, optimizer, step + 1)


@torch.no_grad()
def evaluate(judge: ResNetForImageClassification, emoji: Emoji) -> None:
    """Print the accuracy on original and on augmented images, and the probability of "damaged" for damaged ones."""
    images = to_float(emoji.images)
    name, style = labels(emoji)
    is_common = torch.tensor([n in COMMON for n in emoji.names])
    common = torch.tensor([emoji.vocabulary.index(n) for n in COMMON])
    for label in ("as they are", "augmented", DAMAGED):
        torch.manual_seed(1)
        batches = images.split(256)
        if label == "augmented":
            batches = (augmented(x, backgrounds(x)) for x in batches)
        elif label == DAMAGED:
            batches = (damaged(x) for x in images.split(32))
        logits = torch.cat([judge(x.to(judge.device)).logits.cpu() for x in batches])
        names, styles = logits[:, : -len(LABELS)], logits[:, -len(LABELS) :]
        among_common = common[names[is_common][:, common].argmax(1)] == name[is_common]
        print(
            f"images {label}: {len(emoji.vocabulary)} names {percent(names.argmax(1) == name)}, "
            f"{len(COMMON)} common names {percent(among_common)}, style {percent(styles.argmax(1) == style)}, "
            f"taken for damaged {percent(styles.argmax(1) == LABELS.index(DAMAGED))}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--output", type=Path, default=Path("build/emoji/judge"))
    parser.add_argument("--assets", type=Path, default=Path("src/draftune/assets"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()

    emoji = Emoji.load(args.data)
    folder = args.assets / "emoji-judge"
    if not args.evaluate:
        torch.manual_seed(20)
        judge = ResNetForImageClassification(judge_config(emoji.vocabulary)).to(pick_device())
        judge = judge.to(memory_format=torch.channels_last).train()
        train(judge, emoji, args)
        export_resnet(judge.to(memory_format=torch.contiguous_format), folder, SIZE)
    judge = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32)
    evaluate(judge.to(pick_device()).eval(), emoji)


if __name__ == "__main__":
    main()
