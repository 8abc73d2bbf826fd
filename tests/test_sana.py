"""SANA and SANA 1.5: linear attention, Gemma 2 behind an instruction, DPM-Solver on flow-matching levels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from test_flow import enliven
from test_gradients import batch_of, relative
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast, PreTrainedTokenizerFast

import draftune
from draftune.errors import DraftuneError
from draftune.lora import add_lora, lora_parameters
from draftune.methods import DraftK
from draftune.models import DiffusionModel, load_model
from draftune.published import variant
from draftune.settings import Settings
from helpers.errors import raises
from helpers.model_checks import (
    STEPS,
    check_bf16_training,
    check_guidance,
    check_pictures,
    check_training,
    drawn,
)
from helpers.pipelines import add_random_lora

# As published with the models.
SOLVER = {
    "algorithm_type": "dpmsolver++",
    "flow_shift": 3.0,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "use_flow_sigmas": True,
}


def tiny_gemma(folder: Path, layers: int = 1) -> tuple[Any, Gemma2Model]:
    """Gemma 2 whose pieces are letters, and its tokenizer, which pads on the left by itself."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz:,."]
    letters = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True))
    letters.normalizer = normalizers.Replace(" ", "▁")
    letters.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    letters.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    told = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left", **told).save_pretrained(folder)
    config = Gemma2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, head_dim=8)
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    return GemmaTokenizerFast.from_pretrained(folder), Gemma2Model(config)


def tiny_autoencoder() -> AutoencoderDC:
    kinds, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (5,))
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=0.41407,
    )


def save_sana(folder: Path, scheduler: Any = None, kind: Any = SanaPipeline, **options: Any) -> Path:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_gemma(folder / "words")
    transformer = SanaTransformer2DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
            **options,
        }
    )
    enliven(transformer)
    kind(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_autoencoder(),
        transformer=transformer,
        scheduler=scheduler or DPMSolverMultistepScheduler(**SOLVER),
    ).save_pretrained(folder / "model")
    return folder / "model"


def draw(pipeline: Any, prompt: str, seed: int, guidance_scale: float = 4.5, size: int = 32, **asked: Any) -> Tensor:
    """By diffusers' pipeline, with its scheduler at first order."""
    if isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"height": size, "width": size, "output_type": "pt", "use_resolution_binning": False, **asked}
    generator = torch.Generator().manual_seed(seed)
    options = {"guidance_scale": guidance_scale, "generator": generator, "num_inference_steps": STEPS}
    pictures = pipeline(prompt, **options, **asked).images
    assert isinstance(pictures, Tensor)
    return pictures


def unguided(pipeline: Any, prompt: str, seed: int) -> Tensor:
    return draw(pipeline, prompt, seed, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sana(tmp_path_factory.mktemp("sana"))


def test_pictures_are_those_of_diffusers(folder: Path) -> None:
    check_pictures(folder, draw, 4.5)
    check_pictures(folder, unguided, 1.0)
    check_guidance(folder, 4.5)


VARIANTS: dict[str, dict[str, Any]] = {
    "SANA 1.5": {"qk_norm": "rms_norm_across_heads"},
    "positions, as for 4096 pixels": {"interpolation_scale": 2},
    "learned variance": {"out_channels": 8},
    "scaled time, patches": {"timestep_scale": 0.001, "patch_size": 2},
    "Euler": {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    check_pictures(save_sana(tmp_path, **VARIANTS[name]), draw, 4.5)


def test_levels_are_the_published_ones(folder: Path) -> None:
    """The noise levels and timesteps of the published scheduler, which truncates its timesteps to integers."""
    scheduler = DPMSolverMultistepScheduler(**SOLVER)
    scheduler.set_timesteps(20)
    schedule = load_model(folder).schedule(20)
    assert [step.sigma for step in schedule.steps] == scheduler.sigmas[:-1].tolist()
    assert [step.timestep for step in schedule.steps] == scheduler.timesteps.tolist()
    assert schedule.steps[-1].sigma_next == 0


def test_sizes_prompts_and_negative_prompts(folder: Path) -> None:
    model = load_model(folder)
    assert model.latent_shape == (4, 8, 8)
    model.set_size(32, 64)
    prompts = ["a cat", "A much longer dog. "]
    ours = model.sample_tensors(prompts, [0, 0], model.schedule(STEPS), 4.5, "a bird")
    assert ours.shape == (2, 3, 32, 64)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for i, prompt in enumerate(prompts):
        theirs = draw(pipeline, prompt, 0, width=64, negative_prompt="a bird")
        assert (theirs - ours[i : i + 1]).abs().max() <= 1e-3
    assert (ours[0] - drawn(model, "a cat", 0, 4.5)[0]).abs().max() > 1e-3
    with raises(DraftuneError, "height 4 18"):
        model.set_size(18, None)


def test_what_gemma_reads_is_what_it_is_said_to_read(folder: Path) -> None:
    model = load_model(folder)
    ((name, limit, (text,)),) = model.text_readers(["a"])
    room = limit - len(getattr(model.pipeline, name)(text).input_ids)
    fits, longer = "a" * (1 + room), "a" * (2 + room)
    assert [found.cut for found in model.truncated([fits, longer])] == [1]
    texts = [model.encode([prompt], "", False).text for prompt in (fits, longer, fits[:-1] + "b")]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_gradient_is_that_of_plain_autograd(folder: Path) -> None:
    """Through the official transformer and decoder. The linear attention computes in float32 whatever is asked."""
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    for part in (model.denoiser, model.pipeline.vae, pipeline.transformer, pipeline.vae):
        part.to(torch.float64)
    model.dtype = torch.float64
    schedule = model.schedule(STEPS)
    noise = model.noise(torch.Generator().manual_seed(0), 2)
    model.denoiser.requires_grad_(True)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def reward(latents: Tensor) -> Tensor:
        return (model.decode(latents) * pixels).mean((1, 2, 3))

    prompts = ["", ""]
    denoise = model.denoiser_for(prompts, schedule, 4.5)
    for loss in DraftK(2).losses([batch_of(denoise, schedule, noise=noise, reward=reward)]):
        (-loss).backward()
    ours = {name: p.grad for name, p in model.denoiser.named_parameters()}

    told = model.instruction.split("\n")
    text, mask, other, other_mask = pipeline.encode_prompt(prompts, complex_human_instruction=told)
    text, mask = torch.cat([other, text]).double(), torch.cat([other_mask, mask])
    scheduler = DPMSolverMultistepScheduler(**SOLVER)
    scheduler.set_timesteps(STEPS)
    x, levels = noise, scheduler.sigmas.double()
    for i, timestep in enumerate(scheduler.timesteps):
        x = x.detach() if i <= STEPS - 2 else x
        both = torch.cat([x, x])
        output = pipeline.transformer(both, text, timestep.expand(4), encoder_attention_mask=mask).sample
        negative, positive = output.chunk(2)
        x = x + (levels[i + 1] - levels[i]) * (negative + 4.5 * (positive - negative))
    images = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    (images * pixels).mean((1, 2, 3)).mean().backward()
    flat = [
        torch.cat([g.flatten() for g in gradients if g is not None])
        for gradients in (ours.values(), [p.grad for p in pipeline.transformer.parameters()])
    ]
    assert flat[0].norm() > 0
    assert relative(*flat) < 1e-5


def test_decoder_is_recomputed(folder: Path) -> None:
    """The gradient is the same, and the graph stores less."""
    model = load_model(folder)
    latents = model.noise(torch.Generator().manual_seed(0), 1)
    gradients, stored = [], []
    for mode in ("none", "denoiser"):
        model.set_checkpointing(mode)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = latents.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            images = model.decode(x)
        stored.append(sum(kept.values()))
        assert not any("forward" in vars(layer) for layer in model.pipeline.vae.modules())
        images.square().mean().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)
    assert stored[1] < 0.5 * stored[0]


def test_lora_is_trained_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    check_training(folder, tmp_path, draw, 4.5, lora_rank=2, lora_alpha=4.0)


def test_recommended_targets(folder: Path, tmp_path: Path) -> None:
    """Also of the convolutions, in diffusers and merged, where the sampler is saved at first order."""
    model = load_model(folder)
    add_lora(model, 2, targets=("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point"))
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert any("conv_point" in name for name in lora_parameters(model))
    ours = drawn(model, "a cat", 0, 4.5)
    assert (ours - drawn(load_model(folder), "a cat", 0, 4.5)).abs().max() > 1e-2
    draftune.save_lora(model, tmp_path / "lora")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert (draw(pipeline, "a cat", 0) - ours).abs().max() <= 1e-3
    draftune.export_lora(tmp_path / "lora", tmp_path / "merged", "merged", model=str(folder))
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert merged.scheduler.config.solver_order == 1
    assert (draw(merged, "a cat", 0) - ours).abs().max() <= 1e-3
    with raises(DraftuneError, "kohya"):
        draftune.export_lora(tmp_path / "lora", tmp_path / "lora.safetensors", "kohya", model=str(folder))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(folder: Path, precision: str, tmp_path: Path) -> None:
    """The transformer says what it does in the official pipeline; in fp16 the other networks stay in float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.transformer.to(dtype)
    calls: list[tuple[Tensor, Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, told, kwargs, said: calls.append((told[0], said[0])), with_kwargs=True
    )
    unguided(pipeline, "a cat", 0)
    model = load_model(folder, precision).to("cpu", precision)
    wide = torch.float32 if precision == "fp16" else torch.bfloat16
    assert {model.pipeline.text_encoder.dtype, model.pipeline.vae.dtype} == {wide}
    for step, (x, theirs) in zip(model.schedule(STEPS).steps, calls, strict=True):
        with torch.no_grad(), model.autocast():
            ours = model.predict(x.float(), step.timestep, model.encode(["a cat"], "", False), 1.0)
        assert (ours - theirs).abs().mean() < (1e-3 if precision == "fp16" else 0.05) * theirs.float().std()
    whole = drawn(load_model(folder), "a cat", 0, 4.5)
    assert 0 < (drawn(model, "a cat", 0, 4.5) - whole).abs().mean() < 0.03


def test_mixed_precision_trains(folder: Path, tmp_path: Path) -> None:
    check_bf16_training(folder, tmp_path)


def test_published_sampling(folder: Path) -> None:
    assert variant(str(folder)) == "sana"
    for name in (
        "Sana_1600M_1024px_diffusers",
        "Sana_1600M_4Kpx_BF16_diffusers",
        "Sana_1600M_1024px_MultiLing_diffusers",
        "Sana_600M_512px_diffusers",
        "SANA1.5_1.6B_1024px_diffusers",
        "SANA1.5_4.8B_1024px_diffusers",
    ):
        settings = Settings(model=f"Efficient-Large-Model/{name}")
        assert (settings.num_inference_steps, settings.guidance_scale) == (20, 4.5)
    assert load_model(folder).recommended.items() >= {"num_inference_steps": 20, "guidance_scale": 4.5}.items()


def changed(folder: Path, part: str, **options: Any) -> SanaPipeline:
    pipeline = SanaPipeline.from_pretrained(folder)
    old = getattr(pipeline, part)
    setattr(pipeline, part, type(old).from_config({**old.config, **options}))
    return pipeline


REFUSED: list[tuple[str, dict[str, Any], Sequence[Any]]] = [
    ("transformer", {"in_channels": 8}, ("transformer.in_channels", 8, 4)),
    ("transformer", {"out_channels": 6}, ("transformer.out_channels", 6)),
    ("transformer", {"caption_channels": 8}, ("transformer.caption_channels", 8, 16)),
    ("transformer", {"cross_attention_dim": 8}, ("transformer.cross_attention_dim", 8, 16)),
    ("transformer", {"guidance_embeds": True}, ("transformer.guidance_embeds", "Sprint")),
    ("scheduler", {"use_flow_sigmas": False}, ("scheduler.use_flow_sigmas",)),
    ("scheduler", {"use_karras_sigmas": True}, ("scheduler.use_karras_sigmas",)),
    ("scheduler", {"prediction_type": "epsilon"}, ("scheduler.prediction_type", "flow_prediction")),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_parts_that_do_not_fit_are_refused(folder: Path, case: int) -> None:
    part, options, words = REFUSED[case]
    with raises(DraftuneError, " ".join(str(word) for word in words)):
        load_model(changed(folder, part, **options))


def test_other_refusals(folder: Path) -> None:
    parts: dict[str, Any] = SanaPipeline.from_pretrained(folder).components

    def refused(**others: Any) -> DiffusionModel:
        return load_model(SanaPipeline(**parts | others))

    for scheduler in (DDIMScheduler(), SCMScheduler()):
        with raises(DraftuneError, f"{type(scheduler).__name__} DPMSolverMultistepScheduler"):
            refused(scheduler=scheduler)
    with raises(DraftuneError, "use_dynamic_shifting"):
        refused(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with raises(DraftuneError, "text_encoder"):
        refused(text_encoder=None)
    pipeline = SanaPipeline(**parts)
    pipeline.vae = AutoencoderKL(latent_channels=4)
    with raises(DraftuneError, "AutoencoderKL AutoencoderDC"):
        load_model(pipeline)


def test_base_model_is_without_the_lora(folder: Path) -> None:
    model = load_model(folder)
    schedule, x = model.schedule(STEPS), model.noise(torch.Generator().manual_seed(0), 1)
    before = model.denoiser_for(["a cat"], schedule, 4.5)(x, schedule.steps[0]).clean
    add_random_lora(model)
    trained, base = model.denoisers_for(["a cat"], schedule, 4.5)
    assert torch.allclose(base(x, schedule.steps[0]).clean, before, atol=1e-5)
    assert not torch.allclose(trained(x, schedule.steps[0]).clean, before, atol=1e-3)
