"""Train two small rewards: a CLIP of emoji images and captions, and an aesthetic head on its embeddings.

    python recipes/emoji/rewards.py --data build/emoji --output build/emoji/rewards

CLIP resumes from its checkpoint in --output. Both are written into --assets in half precision, as `emoji_clip` and
`emoji_aesthetic`, and evaluated. With --evaluate it only evaluates.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import affine_grid, conv2d, cross_entropy, grid_sample, mse_loss, normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from common import Progress, autocast, cosine, load_state, percent, pick_device, save_state, to_float, uniform
from data import COMMON, STYLES, Emoji, held_out_names
from tokenizer import MAX_LENGTH, load_tokenizer, save_tokenizer

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SIZE = 64
DIM = 128
GLOSSY, FLAT = 8.0, 3.0


class AestheticHead(nn.Module):
    """Head of the published aesthetic predictor: linear layers without activations."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings).squeeze(-1)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    tower = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": DIM}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8}
    return CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=DIM)


def moved(x: Tensor, strength: float) -> Tensor:
    """Rotate, scale and shift at random."""
    n = len(x)
    angle = uniform(n, -1, 1).flatten() * strength * math.radians(12)
    zoom = torch.exp(uniform(n, -0.2, 0.3).flatten() * strength)
    shift = torch.empty(n, 2).uniform_(-0.2, 0.2) * strength
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], -1).view(n, 2, 3)
    # grid_sample pads with 0; 1 - x makes the outside white.
    return 1 - grid_sample(1 - x, affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)


def recolored(x: Tensor, strength: float) -> Tensor:
    """Change saturation, contrast, brightness and channel offsets at random."""
    n = len(x)
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * torch.exp(uniform(n, -0.6, 0.4) * strength)
    x = x * torch.exp(uniform(n, -0.4, 0.2) * strength) + uniform(n, -0.2, 0.1) * strength
    return x + torch.empty(n, 3, 1, 1).uniform_(-0.12, 0.12) * strength


def blurred(x: Tensor, strength: float) -> Tensor:
    """Blur half of the images by a random amount."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    soft = conv2d(x, torch.outer(line, line).expand(3, 1, 5, 5), padding=2, groups=3)
    return x.lerp(soft, (uniform(len(x), -1, 1) * strength).clamp(min=0))


def cut_out(x: Tensor, strength: float) -> Tensor:
    """Fill a random rectangle with a random color (cutout)."""
    n = len(x)
    half = torch.empty(n, 2).uniform_(-8, 10) * strength
    center = torch.empty(n, 2).uniform_(0, SIZE)
    line = torch.arange(SIZE)
    rows, columns = ((line - center[:, i, None]).abs() < half[:, i, None] for i in (0, 1))
    hole = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(hole, torch.empty(n, 3, 1, 1).uniform_(-1, 1), x)


def augmented(x: Tensor, strength: float) -> Tensor:
    """Augment images in [-1, 1] by changes that a generated image of the same emoji may show."""
    x = cut_out(blurred(recolored(moved(x, strength), strength), strength), strength)
    return (x + torch.randn_like(x) * uniform(len(x), 0, 0.15) * strength).clamp(-1, 1)


def pixel_values(x: Tensor) -> Tensor:
    """Normalize images in [-1, 1] as CLIP does."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return ((x + 1) / 2 - mean) / std


def embed_images(clip: CLIPModel, x: Tensor) -> Tensor:
    """Compute L2-normalized embeddings of images in [-1, 1]."""
    pooled = clip.vision_model(pixel_values=pixel_values(x)).pooler_output
    return normalize(clip.visual_projection(pooled).float(), dim=-1)


def embed_masked(clip: CLIPModel, x: Tensor) -> Tensor:
    """Compute embeddings from a random half of the patches (FLIP, arXiv:2212.00794), which takes half the time."""
    vision = clip.vision_model
    tokens = vision.embeddings(pixel_values(x))
    patches = tokens.shape[1] - 1
    chosen = 1 + torch.rand(len(x), patches, device=x.device).topk(patches // 2).indices
    visible = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
    hidden = vision.pre_layrnorm(torch.cat([tokens[:, :1], visible], 1))
    last = vision.encoder(inputs_embeds=hidden).last_hidden_state
    return normalize(clip.visual_projection(vision.post_layernorm(last[:, 0])).float(), dim=-1)


def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Compute L2-normalized embeddings of captions."""
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    pooled = clip.text_model(input_ids=tokens.input_ids.to(clip.device)).pooler_output
    return normalize(clip.text_projection(pooled).float(), dim=-1)


def table(emoji: Emoji) -> Tensor:
    """Return image indices [names, styles], names in alphabetical order."""
    number = {pair: i for i, pair in enumerate(zip(emoji.names, emoji.styles, strict=True))}
    return torch.tensor([[number[name, style] for style in STYLES] for name in emoji.vocabulary])


def pick(emoji: Emoji, numbers: Tensor, size: int) -> tuple[Tensor, list[str]]:
    """Sample a batch: image indices, and captions that are plain names or a style and a name, half of each.

    No name occurs twice, so that each caption describes one image. The styled half contains each of its names in every
    style, so that the captions differ only in the style.
    """
    plain = size // 2
    order = torch.randperm(len(numbers))
    ones = numbers[order[:plain], torch.randint(len(STYLES), (plain,))]
    triples = numbers[order[plain : plain + (size - plain) // len(STYLES)]].flatten()
    captions = [emoji.names[i] for i in ones] + [f"{emoji.styles[i]} {emoji.names[i]}" for i in triples]
    return torch.cat([ones, triples]), captions


def train_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, emoji: Emoji, args: argparse.Namespace) -> None:
    """Train CLIP on the symmetric contrastive loss, with masked images for the first 90% of the steps."""
    device = clip.device
    images, numbers = to_float(emoji.images), table(emoji)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    start = load_state(args.output, clip, optimizer)
    progress = Progress(start, args.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.learning_rate)
        # Full augmentation from the start slows training, and without mild batches fine details are not learned.
        strength = min(1.0, 0.3 + 1.4 * step / args.steps) * float(torch.empty(()).uniform_(0.3, 1))
        index, captions = pick(emoji, numbers, args.batch_size)
        x = augmented(images[index], strength).to(device)
        with autocast(device):
            embeddings = embed_masked(clip, x) if step < 0.9 * args.steps else embed_images(clip, x)
            texts = embed_texts(clip, tokenizer, captions)
        logits = clip.logit_scale.exp() * embeddings @ texts.T
        target = torch.arange(len(x), device=device)
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        accuracy = (logits.argmax(1) == target).float().mean()
        progress.show(loss=loss.item(), accuracy=accuracy.item(), scale=clip.logit_scale.exp().item())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            save_state(args.output, clip, optimizer, step + 1)


@torch.no_grad()
def embed_all(clip: CLIPModel, images: Tensor, strength: float = 0.0) -> Tensor:
    """Compute embeddings on the CPU; `strength` is that of the augmentation, 0 for none."""
    batches = (augmented(x, strength) if strength else x for x in images.split(256))
    return torch.cat([embed_images(clip, x.to(clip.device)).cpu() for x in batches])


def train_head(clip: CLIPModel, emoji: Emoji, args: argparse.Namespace) -> AestheticHead:
    """Train the head to regress 8 for the style 3d and 3 for the flat styles. Half of each batch is 3d."""
    eval_rewards = held_out_names(emoji.names)
    numbers = table(emoji)[[name not in eval_rewards for name in emoji.vocabulary]]
    images = to_float(emoji.images)[numbers.flatten()]
    strengths = [0.0] + [0.5, 1.0] * (args.head_rounds // 2)
    embeddings = torch.stack([embed_all(clip, images, s) for s in strengths])
    embeddings = embeddings.view(len(strengths), *numbers.shape, DIM)
    targets = torch.tensor([GLOSSY if style == "3d" else FLAT for style in STYLES])
    weights = torch.tensor([2.0 if style == "3d" else 1.0 for style in STYLES])

    head = AestheticHead()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-3)
    progress = Progress(0, args.head_steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.head_steps, 1e-3)
        style = torch.multinomial(weights, 256, replacement=True)
        where = (torch.randint(len(strengths), (256,)), torch.randint(len(numbers), (256,)), style)
        loss = mse_loss(head(embeddings[where]), targets[style])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.show(mse=loss.item())
    return head.eval()


def export(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save CLIP in half precision with its tokenizer and image processor."""
    clip.half().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    ).save_pretrained(folder)
    # Half precision is only for the file: transformers loads the dtype in the config.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def evaluate_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, emoji: Emoji) -> None:
    """Print the retrieval accuracy among all names, among the common names, and among the three styles."""
    vocabulary, numbers = emoji.vocabulary, table(emoji)
    images = to_float(emoji.images)[numbers.flatten()]
    common = torch.tensor([vocabulary.index(name) for name in COMMON])
    plain = embed_texts(clip, tokenizer, vocabulary).cpu()
    styled = torch.stack([embed_texts(clip, tokenizer, [f"{s} {n}" for n in vocabulary]).cpu() for s in STYLES], 1)
    for label, strength in (("as they are", 0.0), ("augmented", 1.0)):
        torch.manual_seed(1)
        embeddings = embed_all(clip, images, strength).view(*numbers.shape, DIM)
        all_names = (embeddings @ plain.T).argmax(-1) == torch.arange(len(vocabulary))[:, None]
        among_common = (embeddings[common] @ plain[common].T).argmax(-1) == torch.arange(len(common))[:, None]
        style = torch.einsum("nsd,ntd->nst", embeddings, styled).argmax(-1) == torch.arange(len(STYLES))
        print(
            f"images {label}: {len(vocabulary)} names {percent(all_names)}, "
            f"{len(COMMON)} common names {percent(among_common)}, style {percent(style)}"
        )


@torch.no_grad()
def evaluate_head(clip: CLIPModel, head: AestheticHead, emoji: Emoji) -> None:
    """Print, for the held-out names, how often 3d scores above both flat styles, and the mean scores."""
    eval_rewards = held_out_names(emoji.names)
    numbers = table(emoji)[[name in eval_rewards for name in emoji.vocabulary]]
    scores = head(embed_all(clip, to_float(emoji.images)[numbers.flatten()])).view(numbers.shape)
    glossy = STYLES.index("3d")
    flat = [i for i in range(len(STYLES)) if i != glossy]
    means = ", ".join(f"{style} {scores[:, i].mean():.2f}" for i, style in enumerate(STYLES))
    above = scores[:, glossy] > scores[:, flat].amax(1)
    print(f"{len(numbers)} held-out names: 3d above both others {percent(above)}; mean scores {means}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--output", type=Path, default=Path("build/emoji/rewards"))
    parser.add_argument("--assets", type=Path, default=Path("src/draftune/assets"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--head-rounds", type=int, default=10)
    parser.add_argument("--head-steps", type=int, default=3000)
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()

    emoji = Emoji.load(args.data, SIZE)
    clip_folder, head_file = args.assets / "emoji-clip", args.assets / "emoji-aesthetic" / "model.safetensors"
    if not args.evaluate:
        torch.manual_seed(0)
        tokenizer = load_tokenizer(args.data)
        clip = CLIPModel(clip_config(tokenizer)).to(pick_device())
        train_clip(clip, tokenizer, emoji, args)
        head = train_head(clip.eval(), emoji, args)
        export(clip, tokenizer, clip_folder)
        head_file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half() for key, value in head.state_dict().items()}, head_file)

    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).to(pick_device())
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    head = AestheticHead().eval()
    head.load_state_dict(load_file(head_file))
    evaluate_clip(clip, tokenizer, emoji)
    evaluate_head(clip, head, emoji)


if __name__ == "__main__":
    main()
