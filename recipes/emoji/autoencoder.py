"""Train the image autoencoder, an AutoencoderKL from 128x128x3 images to 16x16x8 latents.

    python recipes/emoji/autoencoder.py --data build/emoji --output build/emoji/vae

Encoder and decoder are trained together for `--encoder-steps` updates, the first `--crop-steps` of them on crops of
64x64 pixels of twice as many images, which takes half the time. Then the encoder stays as it is, so that the
text-to-image model can be trained on its latents. The decoder is trained further, with a patch discriminator:

    loss = 5 * (L1 + L1 of the spatial differences) + perceptual distance + 5e-6 KL, then + adversarial loss without KL

The gradient of the adversarial loss with respect to the images is scaled to `--adversarial` times the norm of the pixel
losses' gradient, since colors drift where it exceeds the gradient that restores them. It grows from 0 over
`--adversarial-warmup` updates. The decoder sees latents with noise of `--latent-noise` standard deviations, since the
denoiser's latents are inexact. The learning rate is constant after `--encoder-steps` and decays over the last `--decay`
updates, so that a run can be continued with a larger `--steps`. It resumes from its checkpoint and exports an
exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import os
import time
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from common import Progress, autocast, edge_energy, edges, load_state, pick_device, save_state, to_float, update_average
from data import Emoji
from perceptual import PatchDiscriminator, PerceptualDistance

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 2,
    "sample_size": 128,
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
}


class Training(nn.Module):
    """Autoencoder, its moving average and the discriminator: the weights in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderKL(**CONFIG)
        self.average = deepcopy(self.vae).requires_grad_(False)
        self.discriminator = PatchDiscriminator()


def augmented(x: Tensor) -> Tensor:
    """Augment a batch by flips and shifts."""
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    dy, dx = torch.randint(-8, 9, (2,)).tolist()
    return torch.roll(x, (dy, dx), (-2, -1))


def cropped(x: Tensor, size: int = 64) -> Tensor:
    """Crop each image at random."""
    corners = torch.randint(x.shape[-1] - size + 1, (len(x), 2)).tolist()
    return torch.stack([image[:, a : a + size, b : b + size] for image, (a, b) in zip(x, corners, strict=True)])


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate: warmup, linear decay to a quarter with the encoder, constant, linear decay to 0."""
    warmup, decay = (step + 1) / 200, (args.steps - step) / args.decay
    return args.learning_rate * min(warmup, max(0.25, 1 - 0.75 * step / args.encoder_steps), 0.25 * decay)


def pixel_loss(y: Tensor, x: Tensor) -> Tensor:
    """Compute L1 of images and of their spatial differences."""
    return 5 * (l1_loss(y, x) + sum(l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True)))


def image_gradient(loss: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of a loss with respect to the decoded images."""
    return torch.autograd.grad(loss, y)[0]


@torch.no_grad()
def standardize(vae: AutoencoderKL, images: Tensor) -> None:
    """Give each channel of the latents mean 0 and variance 1, as the denoiser needs them, without changing any image.

    The scale and shift are folded into the last layer of the encoder and the first layer of the decoder.
    """
    latents = torch.cat([vae.encode(x.to(vae.device)).latent_dist.mean for x in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last, first, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    first.bias += first.weight[:, :, 0, 0] @ mean
    first.weight *= std[None, :, None, None]
    last.weight[:channels] /= std[:, None, None, None]
    last.bias[:channels] = (last.bias[:channels] - mean) / std
    # The other half of its outputs are the logarithms of the posterior's variance.
    last.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def evaluate(vae: AutoencoderKL, images: Tensor) -> str:
    """Return a line with PSNR and edge energy of reconstructions, and the standard deviations of the latents."""
    posteriors = [vae.encode(x.to(vae.device)).latent_dist for x in images.split(64)]
    outputs = torch.cat([vae.decode(p.mean).sample.clamp(-1, 1).cpu() for p in posteriors])
    psnr = 10 * torch.log10(4 / (outputs - images).square().mean((1, 2, 3))).mean()
    means, stds = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    channels = ", ".join(f"{a:.2f} ± {b:.2f}" for a, b in zip(means.std((0, 2, 3)), stds.mean((0, 2, 3)), strict=True))
    return (
        f"PSNR {psnr:.2f} dB, edge energy {edge_energy(outputs) / edge_energy(images):.3f} of the originals'; "
        f"standard deviation of the latents ± of the posterior, by channel: {channels}"
    )


def export(vae: AutoencoderKL, output: Path) -> None:
    """Save the autoencoder in the layout of diffusers, each file as a whole, while others may read it."""
    vae.save_pretrained(output / "new")
    for path in (output / "new").iterdir():
        os.replace(path, output / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--output", type=Path, default=Path("build/emoji/vae"))
    parser.add_argument("--crop-steps", type=int, default=3000)
    parser.add_argument("--encoder-steps", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--decay", type=int, default=3000, help="last updates, over which the learning rate decays")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=5e-6)
    parser.add_argument("--adversarial", type=float, default=0.2)
    parser.add_argument("--adversarial-warmup", type=int, default=2000)
    parser.add_argument("--latent-noise", type=float, default=0.1)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = pick_device()
    images = to_float(Emoji.load(args.data).images)
    measured = images[::8]
    training = Training().to(device)
    vae, average = training.vae, training.average
    discriminator = training.discriminator.to(memory_format=torch.channels_last)
    distance = PerceptualDistance().to(device, memory_format=torch.channels_last)
    groups = [
        {"params": list(vae.parameters()), "betas": (0.9, 0.99)},
        {"params": list(discriminator.parameters()), "betas": (0.5, 0.99)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=1e-3, fused=True)
    start = load_state(args.output, training, optimizer)
    torch.manual_seed(start)
    last_save = time.monotonic()
    progress = Progress(start, args.steps)
    for step in progress:
        adversarial = step >= args.encoder_steps
        if adversarial:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        for group, factor in zip(optimizer.param_groups, (1, 2), strict=True):
            group["lr"] = factor * learning_rate(step, args)
        count = args.batch_size * (2 if step < args.crop_steps else 1)
        x = augmented(images[torch.randint(len(images), (count,))]).to(device)
        if step < args.crop_steps:
            x = cropped(x)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            if adversarial:
                noise = args.latent_noise * torch.randn_like(posterior.mean)
                y = vae.decode(posterior.mean + noise).sample.float()
            else:
                y = vae.decode(posterior.sample()).sample.float()
            # A leaf, so that the gradients of the losses can be compared before one backward pass of the decoder.
            leaf = y.detach().to(memory_format=torch.channels_last).requires_grad_()
            pixels, perceptual = pixel_loss(leaf, x), distance(leaf, x)
        restoring = image_gradient(pixels, leaf)
        gradient = restoring + image_gradient(perceptual, leaf)
        optimizer.zero_grad()
        if adversarial:
            with autocast(device):
                realism = discriminator(leaf).float().mean()
                separation = discriminator.loss(x, leaf.detach())
            fooling = image_gradient(-realism, leaf)
            weight = args.adversarial * min(1.0, (step - args.encoder_steps) / args.adversarial_warmup)
            gradient = gradient + fooling * (weight * restoring.norm() / fooling.norm())
            separation.backward()
            y.backward(gradient)
            progress.show(pixels=pixels.item(), perceptual=perceptual.item(), hinge=separation.item())
        else:
            divergence = args.kl_weight * posterior.kl().mean()
            torch.autograd.backward([y, divergence], [gradient, None])
            progress.show(pixels=pixels.item(), perceptual=perceptual.item(), kl=divergence.item())
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        update_average(average, vae, step)
        if step + 1 == args.encoder_steps:
            standardize(average, measured)
            vae.load_state_dict(average.state_dict())
            print(f"\nthe encoder is final: {evaluate(average, measured)}", flush=True)
        if time.monotonic() - last_save > 240 or step + 1 in (args.encoder_steps, args.steps):
            save_state(args.output, training, optimizer, step + 1)
            export(average, args.output)
            last_save = time.monotonic()
    print(evaluate(average, measured))


if __name__ == "__main__":
    main()
