"""Small random FLUX.2 pipelines in the published layout."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from test_flow import enliven

from helpers.language_models import tiny_mistral, tiny_qwen

# The scheduler config published with the models.
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
FAMILIES = {"base": 4.0, "distilled": 1.0, "dev": 4.0}
"""The guidance scales of the published models."""


def tiny_flux2(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_mistral(30) if family == "dev" else tiny_qwen(folder / "letters", 27)
    enliven(text_encoder)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=family == "dev",
    )
    enliven(transformer)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    torch.nn.init.normal_(vae.bn.running_mean, std=0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 0.3, 3)
    kind = diffusers.Flux2Pipeline if family == "dev" else diffusers.Flux2KleinPipeline
    kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        **({"is_distilled": True} if family == "distilled" else {}),
    ).save_pretrained(folder / "model")
    return folder / "model"


def randomize(parameters: dict[str, torch.nn.Parameter], scale: float) -> None:
    """Change a LoRA, so that it has an effect and each of its factors a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
