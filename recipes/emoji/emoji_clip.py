"""Train a small CLIP of emoji images and captions, a reward.

    python recipes/emoji/emoji_clip.py --data build/emoji --output build/emoji/clip

It resumes from its checkpoint in --output, writes `emoji-clip` into --assets in half precision and evaluates it. With
--evaluate it only evaluates. Images of over-optimized models (exploit.py), if there are any, are further images of each
batch that no caption describes.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from augment import augmented
from common import Progress, autocast, cosine, load_state, percent, pick_device, save_state, to_float
from data import COMMON, STYLES, Emoji, table
from exploit import load_exploited, sample_exploited
from tokenizer import MAX_LENGTH, load_tokenizer, save_tokenizer

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SIZE = 128
DIM = 128


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
    vision = {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": 16}
    return CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=DIM)


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
    images, numbers = to_float(emoji.images), torch.from_numpy(table(emoji))
    exploited = load_exploited(args.data)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    start = load_state(args.output, clip, optimizer)
    progress = Progress(start, args.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.learning_rate)
        # Full augmentation from the start slows training, and without mild batches fine details are not learned.
        strength = min(1.0, 0.3 + 1.4 * step / args.steps) * float(torch.empty(()).uniform_(0.3, 1))
        index, captions = pick(emoji, numbers, args.batch_size)
        worst = sample_exploited(exploited, args.batch_size // 8)
        x = augmented(torch.cat([images[index], worst]), strength).to(device)
        with autocast(device):
            embeddings = embed_masked(clip, x) if step < 0.9 * args.steps else embed_images(clip, x)
            texts = embed_texts(clip, tokenizer, captions)
        logits = clip.logit_scale.exp() * texts @ embeddings.T
        target = torch.arange(len(texts), device=device)
        loss = (cross_entropy(logits, target) + cross_entropy(logits[:, : len(texts)].T, target)) / 2
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
    vocabulary, numbers = emoji.vocabulary, torch.from_numpy(table(emoji))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--output", type=Path, default=Path("build/emoji/clip"))
    parser.add_argument("--assets", type=Path, default=Path("src/draftune/assets"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()

    emoji = Emoji.load(args.data)
    folder = args.assets / "emoji-clip"
    if not args.evaluate:
        torch.manual_seed(0)
        tokenizer = load_tokenizer(args.data)
        clip = CLIPModel(clip_config(tokenizer)).to(pick_device())
        train_clip(clip, tokenizer, emoji, args)
        export(clip.eval(), tokenizer, folder)
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(pick_device())
    evaluate_clip(clip, CLIPTokenizer.from_pretrained(folder), emoji)


if __name__ == "__main__":
    main()
