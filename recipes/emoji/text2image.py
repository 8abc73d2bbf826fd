"""Train the text-to-image model from emoji names to 128x128 images, and save it as a StableDiffusionPipeline.

    python recipes/emoji/text2image.py --data build/emoji --vae build/emoji/vae --output build/emoji/model

Denoiser and text encoder are trained together, with v-prediction and zero terminal SNR. The loss of each image has the
min-SNR weight of v-prediction (Hang et al., 2023, arXiv:2303.09556), with SNR + 1 in place of SNR, so that the noisiest
step keeps a weight of 1:

    min(1, gamma / (SNR + 1))

The learning rate is constant and decays over the last `--decay` updates, so that a run can be continued with a larger
`--steps`. It resumes from its checkpoint and exports an exponential moving average of the weights. The encoder of --vae
must be final; its decoder may be trained further, and each export contains its latest one.

On a CPU, two processes of one thread are faster than one process of two threads:
`torchrun --nproc-per-node 2 recipes/emoji/text2image.py …`. `--batch-size` is that of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import Progress, autocast, load_state, pick_device, save_state, to_float, update_average
from data import COMMON, Emoji
from tokenizer import MAX_LENGTH, load_tokenizer, save_tokenizer

UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": [64, 128, 160],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 192,
    "attention_head_dim": [2, 4, 4],
    "norm_num_groups": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


class TextToImage(nn.Module):
    """Denoiser and text encoder in one module, with a common optimizer, moving average and checkpoint."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET)
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=UNET["cross_attention_dim"],
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_LENGTH,
                projection_dim=UNET["cross_attention_dim"],
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample


class Captions:
    """Token ids of captions: 45% with the style, 45% without, 10% empty for classifier-free guidance."""

    def __init__(self, emoji: Emoji, tokenizer: CLIPTokenizer) -> None:
        def encode(texts: list[str]) -> torch.Tensor:
            options = {"padding": "max_length", "truncation": True, "max_length": MAX_LENGTH}
            return torch.tensor(tokenizer(texts, **options).input_ids)

        self.plain = encode(emoji.names)
        self.styled = encode([f"{s} {n}" for s, n in zip(emoji.styles, emoji.names, strict=True)])
        self.empty = encode([""])

    def sample(self, index: torch.Tensor) -> torch.Tensor:
        """Sample a caption for each image index."""
        u = torch.rand(len(index), 1)
        tokens = torch.where(u < 0.45, self.styled[index], self.plain[index])
        return torch.where(u > 0.9, self.empty, tokens)


def min_snr_weights(alphas_cumprod: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the weight of each timestep's squared error of v: min(1, gamma / (SNR + 1))."""
    # SNR + 1 = 1 / (1 - alphas_cumprod)
    return (gamma * (1 - alphas_cumprod)).clamp(max=1)


def learning_rate(step: int, steps: int, peak: float, decay: int) -> float:
    """Return the learning rate: 200 warmup steps, constant, then linear decay to 2% of `peak`."""
    return peak * min(1.0, (step + 1) / 200, max(0.02, (steps - step) / decay))


def export(average: TextToImage, vae_folder: Path, tokenizer: CLIPTokenizer, output: Path) -> None:
    """Save the averaged weights as a pipeline."""
    pipeline = StableDiffusionPipeline(
        # Half precision on disk, except for the small text encoder: transformers would not load it as float32.
        vae=AutoencoderKL.from_pretrained(vae_folder).half(),
        unet=deepcopy(average.unet).half(),
        text_encoder=average.text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    save_tokenizer(tokenizer, output / "tokenizer")
    # The published layout of a text encoder, which all versions of transformers read.
    path = output / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    for path in output.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in output.rglob("config.json"):
        # Without the local paths of the machine that trained the model.
        config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--vae", type=Path, default=Path("build/emoji/vae"))
    parser.add_argument("--output", type=Path, default=Path("build/emoji/model"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--decay", type=int, default=2500, help="last updates, over which the learning rate decays")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--common-weight", type=float, default=6.0, help="sampling weight of the 64 common names")
    parser.add_argument("--snr-gamma", type=float, default=5.0, help="gamma of the min-SNR weight")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = pick_device()
    distributed, rank = "WORLD_SIZE" in os.environ, int(os.environ.get("RANK", 0))
    if distributed:
        torch.distributed.init_process_group()
    emoji = Emoji.load(args.data)
    tokenizer = load_tokenizer(args.data)
    captions = Captions(emoji, tokenizer)
    vae = AutoencoderKL.from_pretrained(args.vae).to(device)
    with torch.no_grad():
        latents = [vae.encode(x.to(device)).latent_dist.mean for x in to_float(emoji.images).split(64)]
        latents = torch.cat(latents).mul(vae.config.scaling_factor)
    weights = torch.tensor([args.common_weight if name in COMMON else 1.0 for name in emoji.names])

    model = TextToImage(tokenizer).to(device)
    average = TextToImage(tokenizer).to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start = load_state(args.output, model, optimizer, average=average)
    torch.manual_seed(2 * start + rank)
    if device.type == "cpu":
        # The backward pass of fused attention is slow on the CPU.
        model.unet.set_attn_processor(AttnProcessor())
    network = DistributedDataParallel(model) if distributed else model
    scheduler = DDIMScheduler(**SCHEDULER)
    snr_weights = min_snr_weights(scheduler.alphas_cumprod, args.snr_gamma).to(device)
    last_export = time.monotonic()
    progress = Progress(start, args.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate, args.decay)
        index = torch.multinomial(weights, args.batch_size)
        x0, tokens = latents[index.to(device)], captions.sample(index).to(device)
        # Stratified sampling: each batch covers all timesteps.
        u = (torch.arange(args.batch_size) + torch.rand(args.batch_size)) / args.batch_size
        timesteps = (u * 1000).long().clamp_max(999).to(device)
        noise = torch.randn_like(x0)
        noisy = scheduler.add_noise(x0, noise, timesteps)
        velocity = scheduler.get_velocity(x0, noise, timesteps)
        with autocast(device):
            prediction = network(noisy, timesteps, tokens)
        errors = (prediction.float() - velocity).square().mean((1, 2, 3))
        loss = (snr_weights[timesteps] * errors).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, step)
        progress.show(loss=loss.item(), mse=errors.mean().item())
        if rank == 0 and time.monotonic() - last_export > 300:
            save_state(args.output, model, optimizer, step + 1, average=average.state_dict())
            export(average, args.vae, tokenizer, args.output)
            last_export = time.monotonic()
    if rank == 0:
        save_state(args.output, model, optimizer, max(start, args.steps), average=average.state_dict())
        export(average, args.vae, tokenizer, args.output)
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
