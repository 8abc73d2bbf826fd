"""FLUX.2: LoRAs on its fused layers, its defaults, and the pipelines that are refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from test_flow import brighter, drawing
from torch import Tensor
from transformers import ProcessorMixin

import draftune
from draftune.errors import DraftuneError
from draftune.guidance.sample import sample_guided
from draftune.lora import add_lora, lora_parameters
from draftune.models import load_model
from draftune.published import PUBLISHED, variant, variant_of_pipeline
from draftune.settings import Settings
from helpers.errors import raises
from helpers.flux2 import FAMILIES, randomize, tiny_flux2
from helpers.model_checks import STEPS, check_training, drawn, opened

if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("this diffusers has no FLUX.2-klein", allow_module_level=True)

KEYS = {"base": "flux2-klein-base", "distilled": "flux2-klein", "dev": "flux2-dev"}
MORE = (
    "add_q_proj,add_k_proj,add_v_proj,to_add_out,ff.linear_in,ff.linear_out,ff_context.linear_in,ff_context.linear_out"
)
"""The further LoRA targets on docs/reference/models.md."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_flux2(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_training(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """On the layers of the family, which the settings do not name."""
    scale = FAMILIES[family]
    check_training(folders[family], tmp_path, drawing(scale, 16), scale, size=16, lora_rank=2, lora_alpha=4.0)


@pytest.mark.parametrize("family", ["base", "dev"])
def test_recommended_targets(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """Each has a gradient; exported and merged they give the same images in diffusers."""
    folder, scale = folders[family], FAMILIES[family]
    page = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
    assert all(f"`{targets}`" in page for targets in (MORE, PUBLISHED[KEYS[family]].lora_target_modules))
    model = opened(folder, 16)
    add_lora(model, 2, targets=f"{PUBLISHED[KEYS[family]].lora_target_modules},{MORE}".split(","))
    parameters = lora_parameters(model)
    layers = {name.split(".lora_")[0] for name in parameters}
    assert len(layers) == 2 * 12 + 2 * 2
    assert "single_transformer_blocks.1.attn.to_out" in layers
    randomize(parameters, 0.1)
    schedule = model.schedule(2)
    x = model.noise(torch.Generator().manual_seed(0), 2)
    denoise = model.denoiser_for(["a cat", "a dog"], schedule, scale)
    (denoise(x, schedule.steps[0]).clean * torch.randn_like(x)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())
    ours = drawn(model, "a cat", 0, scale)
    draftune.save_lora(model, tmp_path / "lora")
    again = opened(folder, 16)
    draftune.load_lora(again, tmp_path / "lora")
    assert torch.allclose(drawn(again, "a cat", 0, scale), ours, atol=1e-5)
    for kind in ("diffusers", "merged"):
        draftune.export_lora(tmp_path / "lora", tmp_path / kind, kind, model=str(folder))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "diffusers", weight_name="pytorch_lora_weights.safetensors")
    assert (drawing(scale, 16)(pipeline, "a cat", 0) - ours).abs().max() <= 1e-3
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert (drawing(scale, 16)(merged, "a cat", 0) - ours).abs().max() <= 1e-3
    with raises(DraftuneError, "kohya"):
        draftune.export_lora(tmp_path / "lora", tmp_path / "lora.safetensors", "kohya", model=str(folder))


def test_a_lora_on_a_frozen_lora(folders: dict[str, Path], tmp_path: Path) -> None:
    """The name to_out is a layer's and a list's then too."""
    model, targets = opened(folders["distilled"], 16), PUBLISHED["flux2-klein"].lora_target_modules.split(",")
    add_lora(model, 2, targets=targets)
    randomize(lora_parameters(model), 0.1)
    draftune.save_lora(model, tmp_path / "first")
    again = opened(folders["distilled"], 16)
    draftune.lora.freeze_lora(again, tmp_path / "first")
    add_lora(again, 2, targets=targets)
    assert len(lora_parameters(again)) == 2 * (2 * 4 + 2 * 2)
    assert torch.allclose(drawn(again, "a cat", 0, 1.0), drawn(model, "a cat", 0, 1.0), atol=1e-5)


@pytest.mark.parametrize("family", ["base", "dev"])
def test_every_layer_reaches_the_image(folders: dict[str, Path], family: str) -> None:
    model = opened(folders[family], 16)
    linear = [name for name, layer in model.denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert model.unused_layers() == frozenset()
    add_lora(model, 2, targets=linear)
    parameters = lora_parameters(model)
    assert len(parameters) == 2 * len(linear)
    randomize(parameters, 0.1)
    schedule = model.schedule(2)
    x = model.noise(torch.Generator().manual_seed(0), 2)
    denoise = model.denoiser_for(["a cat", "a dog"], schedule, 1.5)
    (denoise(x, schedule.steps[0]).clean * torch.randn_like(x)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())


def test_guided_sampling(folders: dict[str, Path]) -> None:
    """Of a few-step model: the reward's gradient goes through the denormalized patches."""
    model, few = opened(folders["distilled"], 16), {"num_inference_steps": 4, "guidance_scale": 1.0}
    still = sample_guided(model, "brightness", ["a cat"], "pgdiff_dynamic(strength=0, eta=0)", **few)
    assert torch.equal(still.images, model.sample_tensors(["a cat"], [0], model.schedule(4), 1.0))
    bright = sample_guided(model, "brightness", ["a cat"], "pgdiff_dynamic(strength=0.5, eta=0)", **few)
    assert (bright.rewards > still.rewards).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(folders: dict[str, Path], family: str) -> None:
    """The network is told and says what it does in the official pipeline held in bfloat16."""
    pipeline = DiffusionPipeline.from_pretrained(folders[family], torch_dtype=torch.bfloat16)
    calls: list[tuple[dict[str, Any], Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, __, told, said: calls.append((told, said[0])), with_kwargs=True
    )
    drawing(1.0, 16)(pipeline, "a cat", 0)
    model = opened(folders[family], 16).to("cpu", "bf16")
    for step, (told, theirs) in zip(model.schedule(STEPS).steps, calls, strict=True):
        x, theirs = (t.transpose(1, 2).unflatten(2, (4, 4)) for t in (told["hidden_states"], theirs))
        with torch.no_grad(), model.autocast():
            ours = model.predict(x.float(), step.timestep, model.encode(["a cat"], "", False), 1.0)
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().mean() < 0.02 * theirs.float().std()


def test_bf16_trains(folders: dict[str, Path], tmp_path: Path) -> None:
    run = draftune.train(
        load_model(folders["distilled"], "bf16"),
        brighter,
        prompts=["a cat"],
        steps=2,
        batch_size=2,
        num_inference_steps=2,
        lora_rank=2,
        height=16,
        width=16,
        log_images_steps=0,
        num_log_prompts=1,
        mixed_precision="bf16",
        output=str(tmp_path / "run"),
    )
    assert all(row["grad_norm"] > 0 for row in run.metrics)


class Processor(ProcessorMixin):  # type: ignore[misc]
    """As PixtralProcessor, which needs torchvision, but without images."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts_are_counted(folders: dict[str, Path], family: str) -> None:
    """With the template's tokens; for dev by a processor, whose tokenizer may add another start token."""
    pipeline = DiffusionPipeline.from_pretrained(folders[family])
    plain = drawn(load_model(pipeline), "a cat", 0, 1.0)
    tokenizer = pipeline.tokenizer
    if family == "dev":
        pipeline.tokenizer = Processor(tokenizer, tokenizer.chat_template)
        assert torch.equal(drawn(load_model(pipeline), "a cat", 0, 1.0), plain)
    model = load_model(pipeline)

    def tokens(prompt: str) -> int:
        """The number that diffusers' pipeline reads before it pads and truncates."""
        if family != "dev":
            return len(tokenizer(model.chat(prompt)).input_ids)  # type: ignore[attr-defined]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("system", pipeline.system_message), ("user", prompt))
        ]
        return len(pipeline.tokenizer.apply_chat_template([messages], tokenize=True)[0])

    longest = "a" * (512 - tokens("a") + 1)
    assert tokens(longest) == 512
    (found,) = model.truncated([longest, longest + "a"])
    assert (found.limit, found.cut) == (512, 1)


def test_published_defaults(folders: dict[str, Path]) -> None:
    for family, folder in folders.items():
        key, model = KEYS[family], load_model(folder)
        assert variant(str(folder)) == variant_of_pipeline(model.pipeline) == key
        settings = Settings(model=str(folder))
        assert (settings.num_inference_steps, settings.guidance_scale) == PUBLISHED[key][:2]
        assert settings.method == ("draft" if family == "distilled" else "refl(m=10)")
        assert settings.lora_target_modules == "to_q,to_k,to_v,to_out.0,to_qkv_mlp_proj,attn.to_out"
        if family != "distilled":
            parameters = inspect.signature(type(model.pipeline).__call__).parameters
            assert PUBLISHED[key][:2] == tuple(parameters[name].default for name in PUBLISHED[key]._fields[:2])


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("transformer", {"in_channels": 8}, "transformer.in_channels 8 16"),
        ("transformer", {"out_channels": 8}, "transformer.out_channels 8 16"),
        ("transformer", {"patch_size": 2}, "transformer.patch_size 2 1"),
        ("transformer", {"num_single_layers": 0}, "transformer.num_single_layers 0"),
        ("transformer", {"joint_attention_dim": 32}, "transformer.joint_attention_dim 32 48"),
        ("transformer", {"axes_dims_rope": (2, 2, 4)}, "transformer.axes_dims_rope 8"),
        ("transformer", {"guidance_embeds": True}, "transformer.guidance_embeds True"),
        ("vae", {"out_channels": 4}, "vae.out_channels 4 3"),
        ("vae", {"latent_channels": 8}, "transformer.in_channels 16 32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    folders: dict[str, Path], part: str, change: dict[str, Any], words: str
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders["base"])
    old = getattr(pipeline, part)
    setattr(pipeline, part, type(old).from_config({**old.config, **change}))
    with raises(DraftuneError, words):
        load_model(pipeline)


def test_other_refusals(folders: dict[str, Path]) -> None:
    with raises(DraftuneError, "height 4 18"):
        load_model(folders["base"]).set_size(18, 16)
    for changes, words in (
        ({"text_encoder": None}, "text_encoder"),
        ({"scheduler": DDIMScheduler()}, "DDIMScheduler"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=None)}, "base_shift"),
        ({"vae": AutoencoderKL(latent_channels=4)}, "AutoencoderKL AutoencoderKLFlux2"),
    ):
        pipeline = DiffusionPipeline.from_pretrained(folders["base"])
        for part, value in changes.items():
            setattr(pipeline, part, value)
        with raises(DraftuneError, words):
            load_model(pipeline)
    pipeline = DiffusionPipeline.from_pretrained(folders["base"])
    pipeline.tokenizer.chat_template = None
    with raises(DraftuneError, "chat_template"):
        load_model(pipeline)
    pipeline = DiffusionPipeline.from_pretrained(folders["base"])
    pipeline.text_encoder.config.num_hidden_layers = 20
    with raises(DraftuneError, "num_hidden_layers 20 27"):
        load_model(pipeline)
