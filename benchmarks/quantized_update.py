"""Measure one LoRA update of a FLUX.1-sized transformer with random weights in 4 or 8 bits.

    python benchmarks/quantized_update.py --layers 2
    python benchmarks/quantized_update.py --quantization bnb_4bit

The transformer is built layer by layer, each quantized at once, so that it is never in memory in another precision.
Its config is that of FLUX.1-schnell. The text encoders have one layer, with the widths that the transformer reads. The
autoencoder has the published size. The update is made by draftune's trainer: one sampling step with gradient, decoding,
the reward, the backward pass and AdamW. Memory is the peak resident set size of the process.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import json
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.quantizers import DiffusersAutoQuantizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from architectures import filled, tokenizer
from draftune.models.quantization import BACKENDS, follow_autocast, keep_dtype
from draftune.training.memory_count import network_bytes
from draftune.training.trainer import Trainer
from draftune.utils.devices import DTYPES
from published_configs import CLIP_L, VAE

FLUX: dict[str, Any] = {"in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24}
FLUX |= {"joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56)}
DOUBLE, SINGLE, PUBLISHED = 19, 38, 11_891_178_560
"""Numbers of blocks of both kinds, and of parameters."""


def transformer(double: int, single: int, quantization: str, dtype: torch.dtype) -> tuple[Any, int]:
    """Build FLUX.1-schnell's transformer with these numbers of blocks. Return it and its parameter count."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=double, num_single_layers=single, **FLUX)
    return quantized(network.to(dtype), quantization)


@torch.no_grad()
def quantized(network: Any, quantization: str, device: torch.device | str = "cpu") -> tuple[Any, int]:
    """Quantize a network on the device "meta" as diffusers loads one, with weights N(0, 1 / fan_in), layer by layer.

    Args:
        network: The network, in the precision of the computation.
        quantization: A name in BACKENDS.
        device: Where its weights are stored.

    Returns:
        The network, and the number of its parameters before.
    """
    dtype, device = network.dtype, torch.device(device)
    count = sum(parameter.numel() for parameter in network.parameters())
    quantizer = DiffusersAutoQuantizer.from_config(BACKENDS[quantization].config(dtype), pre_quantized=False)
    quantizer.offload = False
    quantizer.preprocess_model(model=network, device_map=None, keep_in_fp32_modules=[])
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(network.named_parameters()):
        value = torch.zeros(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim > 1:
            value.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        elif not name.endswith("bias"):
            value.fill_(1.0)
        if quantizer.check_if_quantized_param(network, value, name, {}):
            quantizer.create_quantized_param(network, value, name, device, {}, [])
        else:
            set_module_tensor_to_device(network, name, device, value)
    quantizer.postprocess_model(network)
    network.hf_quantizer = quantizer
    # The rest as `draftune.models.quantization.load_denoiser` does.
    follow_autocast(network)
    keep_dtype(network)
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return network.eval(), count


def pipeline(network: FluxTransformer2DModel, dtype: torch.dtype) -> FluxPipeline:
    """Return a pipeline of the transformer with text encoders of one layer."""
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    t5 = T5Config(vocab_size=4, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64)
    clip = CLIPTextConfig(**{**CLIP_L, "num_hidden_layers": 1})
    vae = AutoencoderKL(**{**VAE, "latent_channels": 16}, use_quant_conv=False, use_post_quant_conv=False)
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    return FluxPipeline(
        transformer=network,
        vae=filled(vae).to(dtype),
        text_encoder=filled(CLIPTextModel(clip)).to(dtype),
        text_encoder_2=filled(T5EncoderModel(t5)).to(dtype),
        tokenizer=tokenizer(),
        tokenizer_2=PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **special),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def peak_rss() -> int:
    """Return the peak resident set size of this process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build the model, make one update, and return sizes and seconds."""
    dtype = DTYPES[args.mixed_precision] or torch.float32
    double = min(args.layers, DOUBLE)
    single = SINGLE if double == DOUBLE else 2 * double
    start = time.perf_counter()
    network, count = transformer(double, single, args.quantization, dtype)
    if double == DOUBLE and count != PUBLISHED:
        raise ValueError(f"the transformer has {count:,} parameters, not {PUBLISHED:,}")
    built, result = time.perf_counter(), {"parameters": count, "rss_built": peak_rss()}
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            pipeline(network, dtype),
            args.reward,
            prompts=["cat"],
            method="draft_k(k=1)",
            batch_size=1,
            num_inference_steps=1,
            guidance_scale=0.0,
            height=args.size,
            width=args.size,
            mixed_precision=args.mixed_precision,
            output=str(Path(folder) / "run"),
            device="cpu",
        )
        trainer.train_step.folder = None
        parameters = trainer.train_step.parameters
        result |= {"held": network_bytes(trainer), "trained": sum(p.numel() for p in parameters.values())}
        print(json.dumps(result), flush=True)
        began = time.perf_counter()
        trainer.train_step.run(1)
        ended = time.perf_counter()
    updated = [bool(p.any()) for name, p in parameters.items() if "lora_B" in name]  # all were 0
    memory = {"rss": peak_rss(), "layers_updated": f"{sum(updated)} of {len(updated)}"}
    seconds = {"seconds_building": round(built - start, 1), "seconds_update": round(ended - began, 1)}
    return {**vars(args), **result, **memory, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=DOUBLE, help=f"double blocks; {DOUBLE} is the published number")
    parser.add_argument("--quantization", choices=BACKENDS, default="bnb_4bit")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--reward", default="emoji_aesthetic")
    print(json.dumps(measure(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
