"""Steps and guidance of a family where nobody sets them: those that it was published with."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml
from diffusers import FluxPipeline
from torch import Tensor

import draftune
from draftune import recommended as module
from draftune.cli.main import main
from draftune.cli.train import train_settings
from draftune.models import DiffusionModel, load_model
from draftune.published import PUBLISHED, Defaults, is_turbo, variant
from draftune.recommended import recommended
from draftune.settings import Settings
from draftune.training.setup import prepare
from helpers.errors import mentions
from helpers.odd_models import edit, families, rebuild, scheduler
from helpers.pipelines import add_random_lora

# What the model cards and diffusers' pipelines say.
WANTED = {
    "sd": (50, 7.5),
    "sdxl": (30, 5.0),
    "sd3": (40, 4.5),  # with qk_norm and dual attention: 3.5 medium
    "dev": (28, 3.5),
    "schnell": (4, 0.0),
    "dit": (50, 4.0),
    "pixart": (20, 4.5),
    "ddpm": (50, 1.0),
}
TRAILING = {"timestep_spacing": "trailing", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Variants of a family that only a config tells apart.
VARIANTS: dict[str, tuple[str, Any, tuple[int, float]]] = {
    "sdxl-turbo": ("sdxl", scheduler("EulerAncestralDiscreteScheduler", **TRAILING), (4, 0.0)),
    "sd-turbo": ("sd", scheduler("EulerDiscreteScheduler", **TRAILING), (4, 0.0)),
    "lcm": ("sd", scheduler("LCMScheduler"), (4, 0.0)),
    "tcd": ("sdxl", scheduler("TCDScheduler"), (4, 0.0)),
    "pixart-lcm": ("pixart", scheduler("LCMScheduler"), (4, 0.0)),
    # Trailing steps alone do not make a few-step model.
    "trailing ddim": ("sdxl", scheduler("DDIMScheduler", **TRAILING), (30, 5.0)),
    "trailing v": ("sdxl", scheduler("EulerDiscreteScheduler", prediction_type="v_prediction", **TRAILING), (30, 5.0)),
    "sd3 medium": ("sd3", rebuild("transformer", qk_norm=None, dual_attention_layers=()), (28, 7.0)),
    "sd3.5 large": ("sd3", rebuild("transformer", dual_attention_layers=()), (28, 3.5)),
    "a flow with keys of betas": (
        "dev",
        edit("scheduler/scheduler_config.json", timestep_spacing="trailing"),
        (28, 3.5),
    ),
    "dev made schnell": ("dev", rebuild("transformer", guidance_embeds=False), (4, 0.0)),
}
SAID = ("num_inference_steps", "guidance_scale")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return families(tmp_path_factory.mktemp("families"))


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "announced", set())


def of(settings: Settings) -> tuple[int, float]:
    return settings.num_inference_steps, settings.guidance_scale


@pytest.mark.parametrize("family", WANTED)
def test_each_family_has_its_own(saved: dict[str, Path], family: str) -> None:
    folder = str(saved[family])
    assert of(Settings(model=folder)) == WANTED[family]
    # A loaded model says the same of itself, whatever it is called.
    model = load_model(folder)
    assert tuple(model.recommended[name] for name in SAID) == WANTED[family]
    model.name = "given"
    assert tuple(model.recommended[name] for name in SAID) == WANTED[family]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_told_apart_by_their_configs(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    family, change, wanted = VARIANTS[name]
    folder = Path(shutil.copytree(saved[family], tmp_path / "any name"))
    change(folder)
    assert of(Settings(model=str(folder))) == wanted
    assert tuple(load_model(folder).recommended[name] for name in SAID) == wanted


@pytest.mark.parametrize("model", ["stabilityai/sdxl-turbo", "lcm", "guided lcm"])
def test_few_step_models_of_sdxl_train_in_its_precision(saved: dict[str, Path], tmp_path: Path, model: str) -> None:
    """Their networks have the size of SDXL's: in float32 they do not fit into one consumer GPU."""
    if model != "stabilityai/sdxl-turbo":
        folder = Path(shutil.copytree(saved["sdxl"], tmp_path / "sdxl"))
        scheduler("LCMScheduler")(folder)
        if model == "guided lcm":
            edit("unet/config.json", time_cond_proj_dim=256)(folder)
        model = str(folder)
    settings = Settings(model=model)
    assert (settings.mixed_precision, settings.learning_rate, settings.method) == ("bf16", 1e-4, "draft")
    assert Settings(model="stabilityai/sd-turbo").mixed_precision == "no"


@pytest.mark.parametrize(
    ("name", "turbo"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", True),
        ("hub/models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/0123abcd", True),
        ("models/sd35turbo", True),
        ("turbo/stable-diffusion-3.5-large", False),
        ("stable-diffusion-3.5-large", False),
    ],
)
def test_turbo_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, turbo: bool) -> None:
    """No config says it; the name may be that of the folder one is in."""
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_turbo(name) is turbo
    monkeypatch.chdir(tmp_path / name)
    assert is_turbo(".") is turbo


IDS = {
    "CompVis/stable-diffusion-v1-4": (50, 7.5),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (50, 7.5),
    "stabilityai/stable-diffusion-2-1-base": (50, 7.5),
    "stabilityai/stable-diffusion-xl-base-1.0": (30, 5.0),
    "stabilityai/sdxl-turbo": (4, 0.0),
    "stabilityai/sd-turbo": (4, 0.0),
    "stabilityai/stable-diffusion-3-medium-diffusers": (28, 7.0),
    "stabilityai/stable-diffusion-3.5-medium": (40, 4.5),
    "stabilityai/stable-diffusion-3.5-large": (28, 3.5),
    "stabilityai/stable-diffusion-3.5-large-turbo": (4, 0.0),
    "black-forest-labs/FLUX.1-dev": (28, 3.5),
    "black-forest-labs/FLUX.1-schnell": (4, 0.0),
    "black-forest-labs/FLUX.2-dev": (50, 4.0),
    "black-forest-labs/FLUX.2-klein-base-4B": (50, 4.0),
    "black-forest-labs/FLUX.2-klein-9B": (4, 1.0),
    "lodestones/Chroma1-HD": (35, 5.0),
    "krea/Krea-2-Raw": (28, 5.5),
    "krea/Krea-2-Turbo": (8, 0.0),
    "Alpha-VLLM/Lumina-Image-2.0": (50, 4.0),
    "Qwen/Qwen-Image": (50, 4.0),
    "Qwen/Qwen-Image-2512": (50, 4.0),
    "Tongyi-MAI/Z-Image": (50, 5.0),
    "Tongyi-MAI/Z-Image-Turbo": (8, 0.0),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (20, 4.5),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": (20, 4.5),
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": (2, 4.5),
    "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": (4, 0.0),
    "SimianLuo/LCM_Dreamshaper_v7": (4, 8.5),
    "facebook/DiT-XL-2-256": (50, 4.0),
    "google/ddpm-cat-256": (50, 1.0),
}


@pytest.mark.parametrize("model", IDS)
def test_known_ids_before_anything_is_downloaded(model: str, caplog: pytest.LogCaptureFixture) -> None:
    assert of(Settings(model=model)) == IDS[model]
    assert caplog.messages == []


def test_a_model_in_the_hubs_cache_is_known_by_its_files(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a download leaves it, under an id that says nothing."""
    snapshot = tmp_path / "models--some--one" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(saved["dev"])
    (tmp_path / "models--some--one" / "refs").mkdir()
    (tmp_path / "models--some--one" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = variant("some/one")
    if found is None:  # versions of the client that read the cache's place when they are imported
        monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
        found = variant("some/one")
    assert found == "flux-dev"


def test_an_unknown_id_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    Settings(model="some/one")
    assert caplog.messages == []  # offline, where it can't be loaded
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert of(Settings(model="some/one")) == (50, 7.5)
    Settings(model="some/one")
    (line,) = caplog.text.splitlines()
    assert mentions(line, "some/one", 50, 7.5)
    caplog.clear()
    Settings(model="some/other", num_inference_steps=3, guidance_scale=2.0)
    assert caplog.messages == []


def test_a_guess_by_the_scheduler_is_said(
    saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(saved["sdxl"], tmp_path / "model"))
    VARIANTS["sdxl-turbo"][1](folder)
    Settings(model=str(folder))
    (line,) = caplog.text.splitlines()
    assert mentions(line, 4, 0)


def parsed(*words: str) -> Settings:
    from draftune.cli.main import build_parser

    return train_settings(build_parser().parse_args(["train", *words]))


def test_flags_and_files_win(saved: dict[str, Path], tmp_path: Path) -> None:
    dev = str(saved["dev"])
    assert of(parsed("--model", dev)) == (28, 3.5)
    assert of(parsed("--model", dev, "--guidance-scale", "2")) == (28, 2.0)
    assert of(parsed("--model", dev, "--num-inference-steps", "9")) == (9, 3.5)
    (tmp_path / "c.yaml").write_text(f"model: {dev}\nguidance_scale: 1.5\n")
    assert of(parsed("--config", str(tmp_path / "c.yaml"))) == (28, 1.5)
    assert of(parsed("--config", str(tmp_path / "c.yaml"), "--guidance-scale", "6")) == (28, 6.0)


def test_a_family_has_its_own_training_settings(saved: dict[str, Path], tmp_path: Path) -> None:
    paper, dev = Settings(model=str(saved["sd"])), Settings(model=str(saved["dev"]))
    assert (paper.method, paper.learning_rate, paper.mixed_precision) == ("draft_lv", 4e-4, "no")
    assert (dev.method, dev.learning_rate, dev.mixed_precision) == ("refl(m=10)", 1e-4, "bf16")
    assert paper.lora_target_modules == "to_q,to_k,to_v,to_out.0"
    assert {"add_q_proj", "ff_context.net.2"} <= set(dev.lora_target_modules.split(","))
    others = [name for name in recommended(str(saved["dev"])) if name not in Defaults._fields]
    assert {getattr(dev, name) for name in others} == {getattr(paper, name) for name in others}


def test_the_recommended_method_fits_the_number_of_steps(saved: dict[str, Path], tmp_path: Path) -> None:
    dev = str(saved["dev"])
    methods = [Settings(model=dev, num_inference_steps=steps).method for steps in (28, 10, 9, 1)]
    assert methods == ["refl(m=10)", "refl(m=10)", "refl(m=9)", "refl(m=1)"]
    assert Settings(model=dev, num_inference_steps=4, method="refl(m=10)").method == "refl(m=10)"
    values = {"output": str(tmp_path), "report_to": "none", "num_inference_steps": 4}
    assert prepare(load_model(dev), bright, ["a cat"], None, None, None, values).settings.method == "refl(m=4)"


def test_a_loaded_model_is_trained_with_the_settings_of_its_family_in_its_own_precision(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(saved["dev"])
    model.name = "given"
    settings = prepare(
        model, bright, ["a cat"], None, None, None, {"output": str(tmp_path), "report_to": "none"}
    ).settings
    assert (settings.method, settings.learning_rate, settings.mixed_precision) == ("refl(m=10)", 1e-4, "no")


def bright(images: Tensor, prompts: Any) -> Tensor:
    return images.mean((1, 2, 3))


SHORT: dict[str, Any] = {"prompts": ["a cat"], "steps": 1, "batch_size": 1, "num_log_prompts": 1, "log_images_steps": 0}


@pytest.mark.parametrize("given", ["folder", "model", "pipeline"])
def test_a_run_s_config_holds_what_it_was_drawn_with(saved: dict[str, Path], tmp_path: Path, given: str) -> None:
    """However the model is given; FLUX.1-schnell draws in four steps, which a test can wait for."""
    folder = saved["schnell"]
    model: Any = {
        "folder": lambda: str(folder),
        "model": lambda: load_model(folder),
        "pipeline": lambda: FluxPipeline.from_pretrained(folder),
    }[given]()
    run = draftune.train(
        model, bright, method="draft_k(k=1)", output=str(tmp_path / "run"), height=16, width=16, **SHORT
    )
    said = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (said["num_inference_steps"], said["guidance_scale"]) == (4, 0.0)
    # What is drawn with it later is read from there, whatever is recommended by then.
    again = draftune.runs.load.resolve_lora(str(run.folder)).settings
    assert of(again) == (4, 0.0)


def test_sample_and_eval_draw_a_base_model_so(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, float]] = []
    generate = DiffusionModel.sample_tensors

    def counted(
        self: DiffusionModel, prompts: Any, seeds: Any, schedule: Any, guidance_scale: float, *a: Any, **b: Any
    ) -> Tensor:
        drawn.append((len(schedule), guidance_scale))
        return generate(self, prompts, seeds, self.schedule(1), guidance_scale, *a, **b)

    monkeypatch.setattr(DiffusionModel, "sample_tensors", counted)
    for family, prompt in (("sdxl", "a cat"), ("pixart", "a cat"), ("dit", "1"), ("ddpm", "")):
        folder = saved[family]
        if family != "ddpm":
            assert main(["sample", str(folder), "--prompt", prompt, "--output", str(tmp_path / f"{family}.png")]) == 0
        load_model(folder).sample(prompt)
        assert set(drawn) == {WANTED[family]}
        drawn.clear()
    model = load_model(saved["pixart"])
    add_random_lora(model)
    draftune.save_lora(model, tmp_path / "lora")
    words = ["eval", str(tmp_path / "lora"), "--prompts", "animals", "--reward", "brightness", "--num-images", "1"]
    assert main(words) == 0
    assert set(drawn) == {WANTED["pixart"]}


def test_reno_and_guidance_draw_so(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    schedule = DiffusionModel.schedule

    def counted(self: DiffusionModel, num_inference_steps: int) -> Any:
        asked.append(num_inference_steps)
        return schedule(self, min(num_inference_steps, 2))

    model = load_model(saved["pixart"])
    monkeypatch.setattr(DiffusionModel, "schedule", counted)
    draftune.optimize_noise(model, bright, "a cat", steps=1)
    draftune.sample_guided(model, bright, "a cat")
    assert asked == [20, 20]


def test_nothing_of_torch_is_imported_for_it(saved: dict[str, Path]) -> None:
    code = (
        "import sys; from draftune.settings import Settings; s = Settings(model=sys.argv[1]);"
        "print(s.num_inference_steps, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(saved["dev"])], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["28", "False"]


@pytest.mark.parametrize("content", ["{", "[]", "null", "", json.dumps({"_class_name": ["FluxPipeline"]})])
def test_an_index_that_can_not_be_read_is_said_when_it_is_loaded(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    assert of(Settings(model=str(tmp_path))) == (50, 7.5)


def test_the_page_names_every_value() -> None:
    """docs/reference/models.md shows the table that the code has."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
    for defaults in PUBLISHED.values():
        steps, scale = defaults.num_inference_steps, defaults.guidance_scale
        assert f"| {steps} | {scale:g}" in page or f"| {steps} | none" in page
        rate, layers = f"{defaults.learning_rate:.0e}".replace("e-0", "e-"), defaults.lora_target_modules
        assert f"| `{defaults.method}` | {rate} | {defaults.mixed_precision} | `{layers}` |" in page


OFFICIAL = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "FluxPipeline": "flux-dev",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana-sprint",
    "LatentConsistencyModelPipeline": "latent-consistency",
    "DiTPipeline": "dit",
}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_diffusers_agrees_where_its_pipelines_are_the_source(kind: str) -> None:
    parameters = inspect.signature(getattr(diffusers, kind).__call__).parameters
    steps = {"StableDiffusionXLPipeline": 50}.get(kind, PUBLISHED[OFFICIAL[kind]].num_inference_steps)  # 30: its pages
    expected = (steps, PUBLISHED[OFFICIAL[kind]].guidance_scale)
    assert tuple(parameters[name].default for name in SAID) == expected
