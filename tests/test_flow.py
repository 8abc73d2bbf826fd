"""Stable Diffusion 3 and FLUX.1: straight paths, T5, a grid that moves with the picture's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import draftune
from draftune.errors import DraftuneError
from draftune.lora import ATTENTION, add_lora, lora_parameters
from draftune.methods import load_method
from draftune.models import DiffusionModel, load_model
from draftune.runs.export import sampler_options, source_file
from draftune.sampling.ancestral import mean
from draftune.sampling.sampler import ddim_step, rollout
from helpers.errors import mentions, raises
from helpers.model_checks import STEPS, Draw, check_guidance, check_pictures, check_training, drawn, opened
from helpers.pipelines import tiny_tokenizer

# The scheduler configs published with the models.
SD3 = {"shift": 3.0}
DEV = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15}


def tiny_t5(folder: Path) -> tuple[Any, T5EncoderModel]:
    """T5 whose pieces are letters, and its tokenizer."""
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(token, 0.0) for token in special] + [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    letters = Tokenizer(Unigram(pieces, unk_id=2))
    letters.pre_tokenizer = Metaspace()
    letters.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    told = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}
    PreTrainedTokenizerFast(tokenizer_object=letters, **told).save_pretrained(folder)
    config = T5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config.feed_forward_proj, config.is_gated_act, config.dense_act_fn = "gated-gelu", True, "gelu_new"
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0), T5EncoderModel(config)


def tiny_clip(kind: type, width: int) -> Any:
    config = CLIPTextConfig(vocab_size=74, hidden_size=width, intermediate_size=32, num_hidden_layers=2)
    config.num_attention_heads, config.max_position_embeddings, config.projection_dim = 2, 12, width
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 72, 73, 73
    return kind(config)


def tiny_vae(levels: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def enliven(network: torch.nn.Module) -> None:
    """Random weights instead of small ones, so that the prompt and the noise level are seen in the pictures."""
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            torch.nn.init.ones_(parameter)


def save_sd3(folder: Path, scheduler: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    tokenizer_3, text_encoder_3 = tiny_t5(folder / "t5")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    enliven(transformer)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=tiny_vae(),
        text_encoder=tiny_clip(CLIPTextModelWithProjection, 8),
        tokenizer=tiny_tokenizer(folder / "words"),
        text_encoder_2=tiny_clip(CLIPTextModelWithProjection, 8),
        tokenizer_2=tiny_tokenizer(folder / "words_2"),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder / "model")
    return folder / "model"


def save_flux(folder: Path, guidance_embeds: bool) -> Path:
    scheduler, sizes = DEV if guidance_embeds else SCHNELL, {"attention_head_dim": 8, "num_attention_heads": 2}
    return save_two_blocks(
        folder, scheduler, enliven, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4), **sizes
    )


def save_two_blocks(
    folder: Path, scheduler: dict[str, Any], fill: Callable[[torch.nn.Module], None], **config: Any
) -> Path:
    """A FLUX.1 pipeline with one double and one single block, whose weights `fill` sets."""
    torch.manual_seed(0)
    tokenizer_2, text_encoder_2 = tiny_t5(folder / "t5")
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1}
    sizes |= {"joint_attention_dim": 16, "pooled_projection_dim": 8}
    transformer = FluxTransformer2DModel(**sizes, **config)
    fill(transformer)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=tiny_vae(),
        text_encoder=tiny_clip(CLIPTextModel, 8),
        tokenizer=tiny_tokenizer(folder / "words"),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder / "model")
    return folder / "model"


def drawing(guidance_scale: float, height: int, width: int | None = None, **more: Any) -> Draw:
    def draw(pipeline: Any, prompt: str | list[str], seed: int) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        asked = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "output_type": "pt", **more}
        generator = torch.Generator().manual_seed(seed)
        pictures = pipeline(prompt=prompt, height=height, width=width or height, generator=generator, **asked).images
        assert isinstance(pictures, Tensor)
        return pictures

    return draw


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"), SD3)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("dev"), guidance_embeds=True)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("schnell"), guidance_embeds=False)


def test_sd3_pictures(sd3: Path) -> None:
    check_pictures(sd3, drawing(5.0, 16), 5.0)
    check_pictures(sd3, drawing(1.0, 16), 1.0)
    check_guidance(sd3, 5.0)


def test_sd3_negative_prompt(sd3: Path) -> None:
    pipeline, model = DiffusionPipeline.from_pretrained(sd3), load_model(sd3)
    ours = model.sample_tensors(["a cat"], [0], model.schedule(STEPS), 5.0, "bad dog")
    assert (ours - drawing(5.0, 16, negative_prompt="bad dog")(pipeline, "a cat", 0)).abs().max() <= 1e-3
    assert (ours - drawn(model, "a cat", 0, 5.0)).abs().max() > 1e-3


def test_sd3_with_a_shift_by_the_size(tmp_path: Path) -> None:
    folder = save_sd3(tmp_path, DEV | {"base_image_seq_len": 16, "max_image_seq_len": 48})
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    levels = []
    for height, width in ((16, 16), (20, 24)):
        model.set_size(height, width)
        ours = drawn(model, "a cat", 0, 5.0)
        assert ours.shape == (1, 3, height, width)
        assert (ours - drawing(5.0, height, width)(pipeline, "a cat", 0)).abs().max() <= 1e-3
        levels.append(model.schedule(STEPS).steps[1].sigma)
    assert levels[1] > levels[0] + 0.01


def test_sd3_without_t5(sd3: Path, tmp_path: Path) -> None:
    # The same networks otherwise.
    parts = DiffusionPipeline.from_pretrained(sd3).components
    deaf = StableDiffusion3Pipeline(**parts | {"text_encoder_3": None, "tokenizer_3": None})
    deaf.save_pretrained(tmp_path)
    ours = drawn(load_model(tmp_path), "a cat", 0, 5.0)
    assert (ours - drawing(5.0, 16)(deaf, "a cat", 0)).abs().max() <= 1e-3
    assert torch.equal(ours, drawn(load_model(deaf), "a cat", 0, 5.0))
    assert (ours - drawn(load_model(sd3), "a cat", 0, 5.0)).abs().max() > 1e-3


def test_sd3_training(sd3: Path, tmp_path: Path) -> None:
    check_training(sd3, tmp_path, drawing(5.0, 16), 5.0, lora_rank=2, lora_alpha=4.0)
    assert sampler_options(source_file(tmp_path / "draft_k")) == {}  # whatever the run's settings say of DDIM's


def test_flux_dev_pictures(dev: Path) -> None:
    check_pictures(dev, drawing(3.5, 16), 3.5, size=16)
    check_guidance(dev, 3.5, size=16)


def test_flux_dev_in_any_shape(dev: Path) -> None:
    pipeline, model = DiffusionPipeline.from_pretrained(dev), load_model(dev)
    assert model.latent_shape == (4, 128, 128)
    model.set_size(12, 20)
    theirs = drawing(3.5, 12, 20)(pipeline, ["a cat", "dog"], 0)
    noise = model.noise(torch.Generator().manual_seed(0), 2)
    schedule = model.schedule(STEPS)
    with torch.no_grad():
        ours = model.decode(rollout(model.denoiser_for(["a cat", "dog"], schedule, 3.5), schedule.steps, noise))
    assert ours.shape == (2, 3, 12, 20)
    assert (ours - theirs).abs().max() <= 1e-3


def test_flux_dev_is_called_once_a_step(dev: Path) -> None:
    model = opened(dev, 16)
    sizes = []
    model.denoiser.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    model.sample_tensors(["a cat", "a dog"], [0, 1], model.schedule(STEPS), 3.5)
    assert sizes == [2] * STEPS


def test_flux_schnell_pictures(schnell: Path) -> None:
    # What its model card asks for; guidance is nothing to it.
    check_pictures(schnell, drawing(0.0, 16, max_sequence_length=256), 0.0, size=16)
    model = opened(schnell, 16)
    assert torch.equal(drawn(model, "a cat", 0, 7.5), drawn(model, "a cat", 0, 0.0))


def test_flux_training(dev: Path, tmp_path: Path) -> None:
    check_training(dev, tmp_path, drawing(3.5, 16), 3.5, size=16, lora_rank=2, lora_alpha=4.0)


BOTH = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,ff.net.0.proj,ff.net.2"
RECOMMENDED = {"sd3": BOTH, "dev": f"{BOTH},proj_mlp,proj_out"}
"""What docs/reference/models.md recommends as LoRA targets, all together."""


def brighter(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def run_on(model: DiffusionModel, output: Path, targets: str, **settings: Any) -> draftune.training.Run:
    model.set_size(16, 16)
    given = {"steps": 4, "batch_size": 2, "num_inference_steps": 2, "guidance_scale": 3.5, "log_images_steps": 0}
    given |= {"num_log_prompts": 1, "lora_rank": 2, "learning_rate": 0.02, "height": 16, "width": 16}
    given |= {"method": "draft_k(k=2)", "prompts": ["a cat"], "lora_target_modules": targets, "output": str(output)}
    return draftune.train(model, brighter, **given | settings)


@pytest.mark.parametrize("family", RECOMMENDED)
def test_the_recommended_targets_train(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder: Path = request.getfixturevalue(family)
    targets = RECOMMENDED[family]
    page = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
    assert all(f"`{target}" in page or f",{target}" in page for target in targets.split(","))
    model = load_model(folder)
    run = run_on(model, tmp_path / "run", targets)
    adapted = {name.split(".lora_")[0] for name in lora_parameters(model)}
    told = [line for line in caplog.text.splitlines() if mentions(line, "no LoRA")]
    if family == "sd3":
        (line,) = told
        assert mentions(line, 1, "transformer_blocks.1.attn.add_q_proj")
        assert "transformer_blocks.1.attn.add_q_proj" not in adapted
    else:
        assert told == []
    assert {"transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn.to_add_out"} <= adapted
    # What was saved has a place for each of its tensors, here and in diffusers.
    again = load_model(folder)
    again.set_size(16, 16)
    draftune.load_lora(again, run.folder)
    ours = drawn(model, "a cat", 0, 3.5)
    assert torch.allclose(ours, drawn(again, "a cat", 0, 3.5), atol=1e-5)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(run.folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert (drawing(3.5, 16)(pipeline, "a cat", 0) - ours).abs().max() <= 1e-3


def unused_flux(folder: Path) -> DiffusionModel:
    """A FLUX without single blocks, whose last block's text tokens nothing reads."""
    pipeline = FluxPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "num_layers": 2, "num_single_layers": 0}
    pipeline.transformer = FluxTransformer2DModel.from_config(config)
    enliven(pipeline.transformer)
    return load_model(pipeline)


@pytest.mark.parametrize("family", ["sd3", "dev", "schnell", "dev without single blocks"])
def test_unused_layers_are_those_without_a_gradient(family: str, request: pytest.FixtureRequest) -> None:
    """Of all linear layers of the network, by one backward pass of a LoRA on each that does something already."""
    folder: Path = request.getfixturevalue(family.split()[0])
    model = unused_flux(folder) if "without" in family else load_model(folder)
    model.set_size(16, 16)
    linear = [name for name, layer in model.denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    unused = model.unused_layers()
    assert unused <= set(linear)
    model.unused_layers = frozenset  # type: ignore[method-assign]
    add_lora(model, 2, targets=linear)
    parameters = lora_parameters(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    schedule = model.schedule(2)
    x = model.noise(torch.Generator().manual_seed(0), 2)
    denoise = model.denoiser_for(["a cat", "a dog"], schedule, 1.5)
    (denoise(x, schedule.steps[0]).clean * torch.randn_like(x)).sum().backward()
    silent = {name.split(".lora_")[0] for name, p in parameters.items() if p.grad is None or not p.grad.any()}
    assert silent == unused
    assert bool(unused) == (family not in ("dev", "schnell"))


def test_a_layer_that_is_cut_still_ends_the_run(sd3: Path, tmp_path: Path) -> None:
    """Beside the one that is left out by construction."""
    model = load_model(sd3)
    cut = model.denoiser.transformer_blocks[0].attn
    cut.register_forward_hook(lambda _, __, output: tuple(tokens.detach() for tokens in output))
    with raises(DraftuneError, "gradient transformer_blocks.0.attn.to_q"):
        run_on(model, tmp_path / "run", RECOMMENDED["sd3"], gradient_checkpointing="none")


def test_a_lora_with_an_unused_layer_is_distilled(sd3: Path, tmp_path: Path) -> None:
    """As other tools save one; the layer changes nothing that is drawn."""
    model = load_model(sd3)
    model.unused_layers = frozenset  # type: ignore[method-assign]
    add_lora(model, 4, targets=("to_q", "add_q_proj"))
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    draftune.save_lora(model, tmp_path / "lora")
    found = draftune.distill_lora(
        str(tmp_path / "lora"),
        [["a cat"]],
        tmp_path / "small",
        2,
        model=str(sd3),
        num_trajectories=1,
        steps_per_trajectory=1,
        batch_size=1,
    )
    assert found.differences["truncated"] < found.differences["no LoRA"]


def test_targets_that_change_nothing_at_all(sd3: Path) -> None:
    model = load_model(sd3)
    with raises(DraftuneError, "lora_target_modules transformer_blocks.1.attn.add_q_proj"):
        add_lora(model, 2, targets=["transformer_blocks.1.attn.add_q_proj"])
    assert not hasattr(model.denoiser, "peft_config")


METHODS = [
    "adjoint_matching(scale=100, k=2)",
    "ddpo(timestep_fraction=1.0, clip_range=0.1)",
    "dpok",
    "kl(draft_k(k=2), beta=0.1)",
    "leapalign",
    "flowbp_bridge(k=2)",
    "flowbp_lagrange(order=2, active=2)",
    "direct_align(last=1)",
    "alignprop(m=2)",
    "flow_grpo",
    "mix_grpo(window=2)",
    "diffusion_nft",
    "online_dpo(pairs=2)",
    "draft",
]


@pytest.mark.parametrize("method", METHODS)
def test_other_methods(sd3: Path, tmp_path: Path, method: str) -> None:
    def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))

    model = load_model(sd3)
    before = drawn(model, "a cat", 0, 5.0)
    settings = {"steps": 2, "batch_size": 4, "num_inference_steps": STEPS, "guidance_scale": 5.0, "log_images_steps": 0}
    settings |= {"learning_rate": 0.02, "num_log_prompts": 1, "output": str(tmp_path / "run"), "prompts": ["a cat"]}
    settings["num_images_per_prompt"] = load_method(method).min_images_per_prompt
    run = draftune.train(model, brightness, method=method, **settings)
    assert all(row["grad_norm"] > 0 for row in run.metrics)
    assert (drawn(model, "a cat", 0, 5.0) - before).abs().max() > 1e-3


def test_the_ancestral_sampler_forgets_its_noise(sd3: Path) -> None:
    """With the exact velocity of data N(2, 0.5^2) it draws N(2, 0.5^2), and x_0 tells nothing of x_T; of Euler's, all.

    Adjoint matching's optimum is right for such a sampler alone.
    """
    schedule = load_model(sd3).schedule(1000)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, generator=generator, dtype=torch.float64)

    def sampled(ancestral: bool) -> Tensor:
        x = start
        for step in schedule.steps:
            excess = (x - step.alpha * 2) / ((step.alpha * 0.5) ** 2 + step.sigma**2)
            velocity = step.sigma * excess - (2 + step.alpha * 0.25 * excess)
            prediction = schedule.to_prediction(velocity, x, step)
            if ancestral:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
                x = mean(prediction, step) + step.ancestral_std * noise
            else:
                x = ddim_step(prediction, step)
        return x

    def told(x: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([start, x]))[0, 1])

    forgetful, straight = sampled(True), sampled(False)
    for x in (forgetful, straight):
        assert float(x.mean()) == pytest.approx(2, abs=0.02)
        assert float(x.std()) == pytest.approx(0.5, rel=0.03)
    assert abs(told(forgetful)) < 0.03
    assert told(straight) > 0.99


def test_export(sd3: Path, dev: Path, tmp_path: Path) -> None:
    """diffusers' own pipeline draws the same from the LoRA and from the merged model, which loads here as well."""
    more = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2")
    of_flux = (*more, "proj_mlp", "proj_out")
    for folder, scale, size, targets in ((sd3, 5.0, 16, more), (dev, 3.5, 16, of_flux)):
        there = tmp_path / folder.parent.name
        model = opened(folder, size)
        add_lora(model, 2, targets=ATTENTION + targets)
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        ours = drawn(model, "a cat", 0, scale)
        assert (ours - drawn(opened(folder, size), "a cat", 0, scale)).abs().max() > 1e-2
        draftune.save_lora(model, there / "lora")
        draftune.export_lora(there / "lora", there / "diffusers", "diffusers", model=str(folder))
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(there / "diffusers", weight_name="pytorch_lora_weights.safetensors")
        assert (drawing(scale, size)(pipeline, "a cat", 0) - ours).abs().max() <= 1e-3
        draftune.export_lora(there / "lora", there / "merged", "merged", model=str(folder))
        merged = DiffusionPipeline.from_pretrained(there / "merged")
        assert type(merged.scheduler) is FlowMatchEulerDiscreteScheduler
        assert (drawing(scale, size)(merged, "a cat", 0) - ours).abs().max() <= 1e-3
        assert (drawn(opened(there / "merged", size), "a cat", 0, scale) - ours).abs().max() <= 1e-4
        with raises(DraftuneError, "UNet"):
            draftune.export_lora(there / "lora", there / "lora.safetensors", "kohya", model=str(folder))
        assert not (there / "lora.safetensors").exists()


def test_half_precision(sd3: Path) -> None:
    """T5 keeps what overflows in float32, as in diffusers' own pipeline, and what is encoded is the same."""
    pipeline = DiffusionPipeline.from_pretrained(sd3, torch_dtype=torch.float16)
    model = load_model(sd3).to("cpu", "fp16")
    held = {name: p.dtype for name, p in model.pipeline.text_encoder_3.named_parameters()}
    assert held == {name: p.dtype for name, p in pipeline.text_encoder_3.named_parameters()}
    assert set(held.values()) == {torch.float16, torch.float32}
    with torch.no_grad(), model.autocast():
        condition = model.encode(["a cat"], "", False)
        text, _, pooled, _ = pipeline.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)
    assert condition.text.dtype == condition.pooled.dtype == torch.float16
    assert torch.equal(condition.pooled, pooled)
    # The official T5 is under autocast here, ours never.
    assert torch.allclose(condition.text.float(), text.float(), atol=1e-2)


@pytest.mark.parametrize("family", ["sd3", "dev"])
def test_bfloat16(family: str, request: pytest.FixtureRequest) -> None:
    """The network is told and says what it does in the official pipeline held in bfloat16, which rounds a lot."""
    folder = request.getfixturevalue(family)
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    calls: list[tuple[Tensor, Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, __, told, said: calls.append((told["hidden_states"], said[0])), with_kwargs=True
    )
    drawing(1.0, 16)(pipeline, "a cat", 0)
    model = opened(folder, 16).to("cpu", "bf16")
    for step, call in zip(model.schedule(STEPS).steps, calls, strict=True):
        x, theirs = (FluxPipeline._unpack_latents(t, 16, 16, 2) for t in call) if family == "dev" else call
        with torch.no_grad(), model.autocast():
            ours = model.predict(x.float(), step.timestep, model.encode(["a cat"], "", False), 1.0)
        assert (ours - theirs).abs().mean() < 0.005 * theirs.std()


def test_refusals(sd3: Path, dev: Path, tmp_path: Path) -> None:
    for folder in (sd3, dev):
        with raises(DraftuneError, "height 4 18"):
            load_model(folder).set_size(18, 16)
    with raises(DraftuneError, "width 24 28"):
        load_model(sd3).set_size(16, 28)
    model = opened(dev, 16)
    with raises(DraftuneError, "negative prompt"):
        model.sample_tensors(["a cat"], [0], model.schedule(STEPS), 3.5, "bad")
    with raises(DraftuneError, "1 1000 1001"):
        model.schedule(1001)
    parts = DiffusionPipeline.from_pretrained(dev).components
    with raises(DraftuneError, "text_encoder_2"):
        load_model(FluxPipeline(**parts | {"text_encoder_2": None}))
    with raises(DraftuneError, "DDIMScheduler"):
        load_model(FluxPipeline(**parts | {"scheduler": DDIMScheduler()}))
