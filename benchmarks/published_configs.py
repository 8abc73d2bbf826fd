"""The configs of published models, as Python values, and the number of parameters of each network.

They follow diffusers' class defaults, its conversion scripts and transformers' configs. `architectures.py` builds the
networks and compares their sizes with the published ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from draftune.rewards.hpsv2 import VIT_H_14


class Part(NamedTuple):
    """A network.

    Attributes:
        kind: Its class in diffusers or transformers.
        config: The arguments of the class, or of its config class in transformers.
        parameters: The published number of parameters.
    """

    kind: str
    config: dict[str, Any]
    parameters: int


class Model(NamedTuple):
    """A pipeline.

    Attributes:
        kind: Its class in diffusers.
        networks: The names of its networks in PARTS, by component.
        tokenizers: Their kind in `architectures.TOKENIZERS`, by component.
        scheduler: The class of its scheduler and the class's arguments.
        index_entries: More entries of model_index.json.
    """

    kind: str
    networks: dict[str, str]
    tokenizers: dict[str, str]
    scheduler: tuple[str, dict[str, Any]]
    index_entries: dict[str, Any] | None = None


VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_16 = VAE | {"latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
"""Without the convolutions around the latents, as in Stable Diffusion 3 and FLUX.1."""
SD14_UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# diffusers' scripts/convert_sd3_to_diffusers.py. The layers with two attentions are those of 3.5 medium's checkpoint.
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
# diffusers' scripts/convert_flux2_to_diffusers.py, "klein-4b".
KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
QWEN3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
QWEN25_VL_7B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
}
# diffusers' scripts/convert_dcae_to_diffusers.py, "dc-ae-f32c32-sana-1.0".
DC_AE: dict[str, Any] = {
    "encoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "decoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.41407,
}

# Numbers of parameters that are published exactly are those of the safetensors on the hub, which it shows rounded for
# large models: SD3.5 medium 2.5 billion (with 0.23 billion position embeddings, which are no parameters), FLUX.1 12,
# klein 4, Z-Image 6, Qwen-Image 20 and SANA 1.6 billion by their model cards, T5-XXL's encoder 4.7 by diffusers' page
# on Stable Diffusion 3, Qwen3 4, Qwen2.5-VL 8.3 and Gemma 2.6 billion by their hub pages.
PARTS: dict[str, Part] = {
    "SD 1.4 UNet": Part("UNet2DConditionModel", SD14_UNET, 859_520_964),
    "SDXL UNet": Part("UNet2DConditionModel", SDXL_UNET, 2_567_463_684),
    "SD 3.5 medium transformer": Part("SD3Transformer2DModel", SD35_MEDIUM, 2_243_171_520),
    "FLUX.1-dev transformer": Part("FluxTransformer2DModel", {"guidance_embeds": True}, 11_901_408_320),
    "FLUX.2-klein-4B transformer": Part("Flux2Transformer2DModel", KLEIN_4B, 3_875_544_576),
    "Z-Image transformer": Part("ZImageTransformer2DModel", {"axes_lens": (1536, 512, 512)}, 6_154_908_736),
    "Qwen-Image transformer": Part("QwenImageTransformer2DModel", {}, 20_430_401_088),
    "SANA 1.6B transformer": Part("SanaTransformer2DModel", {}, 1_604_462_752),
    "SD 1.4 VAE": Part("AutoencoderKL", VAE | {"sample_size": 512}, 83_653_863),
    "SDXL VAE": Part("AutoencoderKL", VAE | {"sample_size": 1024, "scaling_factor": 0.13025}, 83_653_863),
    "SD 3 VAE": Part("AutoencoderKL", VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}, 83_819_683),
    "FLUX.1 VAE": Part("AutoencoderKL", VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}, 83_819_683),
    "FLUX.2 VAE": Part("AutoencoderKLFlux2", {}, 84_046_115),
    "Qwen-Image VAE": Part("AutoencoderKLQwenImage", {}, 126_892_531),
    "SANA VAE": Part("AutoencoderDC", DC_AE, 312_250_275),
    "CLIP-L text": Part("CLIPTextModel", CLIP_L, 123_060_480),
    "CLIP-L text, projected": Part("CLIPTextModelWithProjection", CLIP_L, 123_650_304),
    "CLIP bigG text": Part("CLIPTextModelWithProjection", CLIP_G, 694_659_840),
    "T5-XXL encoder": Part("T5EncoderModel", T5_XXL, 4_762_310_656),
    "Qwen3-4B": Part("Qwen3ForCausalLM", QWEN3_4B, 4_022_468_096),
    "Qwen3-4B without head": Part("Qwen3Model", QWEN3_4B, 4_022_468_096),
    "Qwen2.5-VL-7B": Part("Qwen2_5_VLForConditionalGeneration", QWEN25_VL_7B, 8_292_166_656),
    "Gemma 2 2B": Part("Gemma2Model", {}, 2_614_341_888),
    "CLIP ViT-H/14": Part("CLIPModel", VIT_H_14, 986_109_441),
}

DDIM: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SHIFT_BY_SIZE: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SHIFT_OF_QWEN = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
SOLVER: dict[str, Any] = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW = "FlowMatchEulerDiscreteScheduler"

MODELS: dict[str, Model] = {
    "CompVis/stable-diffusion-v1-4": Model(
        "StableDiffusionPipeline",
        {"unet": "SD 1.4 UNet", "vae": "SD 1.4 VAE", "text_encoder": "CLIP-L text"},
        {"tokenizer": "clip"},
        ("DDIMScheduler", DDIM),
        {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False},
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Model(
        "StableDiffusionXLPipeline",
        {
            "unet": "SDXL UNet",
            "vae": "SDXL VAE",
            "text_encoder": "CLIP-L text",
            "text_encoder_2": "CLIP bigG text",
        },
        {"tokenizer": "clip", "tokenizer_2": "clip"},
        ("DDIMScheduler", DDIM),
    ),
    "stabilityai/stable-diffusion-3.5-medium": Model(
        "StableDiffusion3Pipeline",
        {
            "transformer": "SD 3.5 medium transformer",
            "vae": "SD 3 VAE",
            "text_encoder": "CLIP-L text, projected",
            "text_encoder_2": "CLIP bigG text",
            "text_encoder_3": "T5-XXL encoder",
        },
        {"tokenizer": "clip", "tokenizer_2": "clip", "tokenizer_3": "t5"},
        (FLOW, {"shift": 3.0}),
    ),
    "black-forest-labs/FLUX.1-dev": Model(
        "FluxPipeline",
        {
            "transformer": "FLUX.1-dev transformer",
            "vae": "FLUX.1 VAE",
            "text_encoder": "CLIP-L text",
            "text_encoder_2": "T5-XXL encoder",
        },
        {"tokenizer": "clip", "tokenizer_2": "t5"},
        (FLOW, SHIFT_BY_SIZE),
    ),
    "black-forest-labs/FLUX.2-klein-4B": Model(
        "Flux2KleinPipeline",
        {"transformer": "FLUX.2-klein-4B transformer", "vae": "FLUX.2 VAE", "text_encoder": "Qwen3-4B"},
        {"tokenizer": "qwen"},
        (FLOW, SHIFT_BY_SIZE),
        {"is_distilled": True},
    ),
    "Tongyi-MAI/Z-Image-Turbo": Model(
        "ZImagePipeline",
        {"transformer": "Z-Image transformer", "vae": "FLUX.1 VAE", "text_encoder": "Qwen3-4B without head"},
        {"tokenizer": "qwen"},
        (FLOW, {"shift": 3.0}),
    ),
    "Qwen/Qwen-Image": Model(
        "QwenImagePipeline",
        {"transformer": "Qwen-Image transformer", "vae": "Qwen-Image VAE", "text_encoder": "Qwen2.5-VL-7B"},
        {"tokenizer": "qwen"},
        (FLOW, SHIFT_OF_QWEN),
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": Model(
        "SanaPipeline",
        {"transformer": "SANA 1.6B transformer", "vae": "SANA VAE", "text_encoder": "Gemma 2 2B"},
        {"tokenizer": "gemma"},
        ("DPMSolverMultistepScheduler", SOLVER),
    ),
}
"""The pipelines of the presets, by hub id."""
SHORT = dict(zip(("sd14", "sdxl", "sd35", "flux", "klein", "zimage", "qwenimage", "sana"), MODELS, strict=True))
"""The hub ids by the names that presets start with."""
TINY_DECODERS = {
    "madebyollin/taesd": 4,
    "madebyollin/taesdxl": 4,
    "madebyollin/taesd3": 16,
    "madebyollin/taef1": 16,
}
"""The latent channels of published tiny decoders, by hub id; otherwise they have the defaults of AutoencoderTiny."""
