"""Train the image autoencoder, an AutoencoderKL from 64x64x3 images to 16x16x4 latents.

    python recipes/emoji/autoencoder.py --data build/emoji --output build/emoji/vae

    loss = L1 + MSE + L1 of the spatial differences + 1e-6 KL

It resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import l1_loss, mse_loss

from common import Progress, autocast, cosine, load_state, pick_device, save_state, to_float
from data import Emoji

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [24, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
}


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vertical and horizontal differences of neighboring pixels."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def loss_of(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Compute the loss of a batch of images [B, 3, 64, 64] in [-1, 1]."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    loss = l1_loss(y, x) + mse_loss(y, x) + sum(l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
    return loss + 1e-6 * posterior.kl().mean()


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Augment a batch by flips and shifts."""
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    dy, dx = torch.randint(-4, 5, (2,)).tolist()
    return torch.roll(x, (dy, dx), (-2, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--output", type=Path, default=Path("build/emoji/vae"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = pick_device()
    images = to_float(Emoji.load(args.data).images)
    vae = AutoencoderKL(**CONFIG).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    start = load_state(args.output, vae, optimizer)
    progress = Progress(start, args.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.learning_rate)
        index = torch.randint(len(images), (args.batch_size,))
        x = augmented(images[index]).to(device, memory_format=torch.channels_last)
        with autocast(device):
            loss = loss_of(vae, x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.show(loss=loss.item())
        if step % 500 == 499:
            save_state(args.output, vae, optimizer, step + 1)

    # The denoiser needs latents of unit variance: store the scale as Stable Diffusion does.
    with torch.no_grad():
        latents = torch.cat([vae.encode(x.to(device)).latent_dist.mean for x in images.split(64)])
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        error = mse_loss(vae.decode(latents[:256]).sample.clamp(-1, 1).cpu(), images[:256])
    vae.save_pretrained(args.output)
    print(f"scaling_factor {vae.config.scaling_factor}, PSNR {10 * torch.log10(4 / error):.2f} dB")


if __name__ == "__main__":
    main()
