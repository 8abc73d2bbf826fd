"""Likeness rewards: embeddings as the official code computes them, several references, and diversity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from draftune import train
from draftune.errors import DraftuneError
from draftune.evaluation.metrics import diversity
from draftune.rewards import load_reward, parse_reward
from draftune.rewards.dreamsim import VARIANTS, DreamSim
from draftune.rewards.likeness import Dino, Likeness
from draftune.utils.images import from_pil
from draftune.utils.weightless import without_weights
from helpers.errors import raises
from helpers.likeness import BIT, DINO, SMALL, dreamsim_embedding, float_pixels, save_dino, save_dreamsim
from helpers.published_weights import agree, cropped_pixels, photographs

try:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
except ImportError:  # transformers 4
    from transformers.models.bit.image_processing_bit import BitImageProcessor as BitImageProcessorPil

FAST = ("ensemble", "clip_vitb32")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two photographs in a folder."""
    folder = tmp_path_factory.mktemp("references")
    for i in (1, 2):
        photographs()[i].save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_dino(tmp_path_factory.mktemp(kind), kind) for kind in DINO}


@pytest.fixture(scope="module")
def dreamsim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("dreamsim") / "models"
    return folder, save_dreamsim(folder, "ensemble")


@pytest.mark.parametrize(
    ("kind", "tokens"), [*((kind, "cls") for kind in DINO), ("registers", "patches"), ("dinov3", "patches")]
)
def test_dino_agrees_with_transformers(
    folders: dict[str, Path], references: list[Path], kind: str, tokens: str
) -> None:
    network: Any = DINO[kind][0].from_pretrained(folders[kind]).eval()

    def embedding(image: Image.Image) -> Tensor:
        if DINO[kind][2] is BIT:
            output = network(**BitImageProcessorPil(**BIT)(image, return_tensors="pt"))
        else:
            output = network(float_pixels(image))
        patches = {"dinov2": 1, "registers": 4, "dinov3": 5, "convnext": 1}[kind]
        return output.pooler_output[0] if tokens == "cls" else output.last_hidden_state[0, patches:]

    first, second = (Image.open(path) for path in references)

    def official(image: Image.Image, prompt: str) -> Tensor:
        return torch.stack(
            [cosine_similarity(embedding(image), embedding(i), -1).mean() for i in (first, second)]
        ).mean()

    agree(load_reward(Dino(str(references[0].parent), str(folders[kind]), tokens)), [""], official)


def test_the_processor_of_dinov2_crops_as_transformers_does() -> None:
    for image in photographs()[:9]:
        theirs = BitImageProcessorPil(**BIT)(image, return_tensors="pt").pixel_values
        pixels = cropped_pixels(image, 64, 56, math.floor, BIT["image_mean"], BIT["image_std"])  # type: ignore[arg-type]
        torch.testing.assert_close(pixels, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", [v if v in FAST else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_dreamsim_agrees_with_its_published_steps(tmp_path: Path, references: list[Path], variant: str) -> None:
    files = save_dreamsim(tmp_path / "models", variant)
    reference = dreamsim_embedding(files, variant, Image.open(references[0]))

    def official(image: Image.Image, prompt: str) -> Tensor:
        return cosine_similarity(dreamsim_embedding(files, variant, image), reference, 0) - 1

    reward = load_reward(DreamSim(str(references[0]), str(tmp_path / "models"), variant, SMALL))
    agree(reward, [""], official)
    assert float(reward(from_pil(Image.open(references[0])), [""])) == pytest.approx(0, abs=1e-5)


def rewards(folders: dict[str, Path], dreamsim: Path, reference: Path) -> list[Likeness]:
    found = [Dino(str(reference), str(folders[kind])) for kind in DINO]
    return [load_reward(r) for r in (*found, DreamSim(str(reference), str(dreamsim), "ensemble", SMALL))]  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(3, 3, 41, 90), (2, 3, 130, 57)])
def test_scores_depend_on_their_own_image_and_have_a_gradient(
    folders: dict[str, Path], dreamsim: tuple[Path, Any], references: list[Path], shape: tuple[int, ...]
) -> None:
    for reward in rewards(folders, dreamsim[0], references[0]):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        scores = reward(images, [""] * len(images))
        alone = torch.cat([reward(image[None], [""]) for image in images])
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert gradient.isfinite().all()
        assert (gradient.abs().amax((1, 2, 3)) > 0).all()
        assert not any(p.requires_grad for p in reward.parameters())


def test_the_gradient_is_the_derivative_of_the_score(folders: dict[str, Path], references: list[Path]) -> None:
    """In float64 and at the input's size, since rounding to 8 bits has the gradient of the identity."""
    reward = load_reward(Dino(str(references[0]), str(folders["dinov3"]))).double()
    image, direction = torch.rand(2, 1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(image, [""]).sum(), image)
    with torch.no_grad():
        ahead, behind = (reward.score(image + step * direction, [""]) for step in (1e-4, -1e-4))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind)[0] / 2e-4, rtol=1e-4, atol=1e-7)


def test_diversity_is_the_mean_distance_of_two_images(dreamsim: tuple[Path, Any], references: list[Path]) -> None:
    images = [image.resize((64, 64)) for image in photographs()[:6]]
    reward = load_reward(DreamSim(str(references[0]), str(dreamsim[0]), "ensemble", SMALL))
    measured = diversity(reward, torch.cat([from_pil(image) for image in images]), 3)
    embeddings = torch.stack([dreamsim_embedding(dreamsim[1], "ensemble", image) for image in images])
    a, b, c, d, e, f = embeddings
    pairs = [[(a, b), (a, c), (b, c)], [(d, e), (d, f), (e, f)]]
    expected = [sum(float(1 - x @ y) for x, y in three) / 3 for three in pairs]
    assert measured is not None
    assert measured.tolist() == pytest.approx(expected, abs=1e-4)
    assert min(expected) > 0.01


def test_the_embedded_model_trains_on_likeness(
    folders: dict[str, Path], references: list[Path], tmp_path: Path
) -> None:
    run = train(
        "emoji",
        f"dino(image='{references[0]}', model='{folders['dinov2']}')",
        method="draft_lv",
        steps=2,
        batch_size=1,
        num_inference_steps=2,
        prompts=["cat face", "pizza"],
        eval_prompts="",
        eval_rewards=None,
        log_images_steps=0,
        num_log_prompts=1,
        output=str(tmp_path / "run"),
    )
    assert len(run.metrics) == 2
    assert all(row["grad_norm"] > 0 for row in run.metrics)


def test_what_is_missing_is_named_before_anything_is_loaded(
    folders: dict[str, Path], references: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = references[0]
    with raises(DraftuneError, "facebook/dinov2-small", "model="):
        parse_reward(f"dino(image='{image}')")
    with raises(DraftuneError, "nowhere.png"):
        parse_reward(f"dino(image='{tmp_path / 'nowhere.png'}', model='{folders['dinov2']}')")
    (tmp_path / "empty").mkdir()
    with raises(DraftuneError, "empty"):
        parse_reward(f"dino(image='{tmp_path / 'empty'}', model='{folders['dinov2']}')")
    with raises(DraftuneError, "tokens", "patch", "patches"):
        parse_reward(f"dino(image='{image}', tokens=patch)")
    with raises(DraftuneError, "clip", "dinov2"):
        load_reward(f"dino(image='{image}', model=emoji_clip)")
    # Every file of the release that is missing, with its address.
    monkeypatch.chdir(tmp_path)
    with raises(
        DraftuneError, "dino_vitbase16_pretrain.pth", "dreamsim_ensemble_checkpoint.zip", "adapter_config.json"
    ):
        parse_reward(f"dreamsim(image='{image}')")
    with raises(DraftuneError, "variant", "ensembles", "ensemble"):
        parse_reward(f"dreamsim(image='{image}', variant=ensembles)")


def test_another_lora_is_refused(tmp_path: Path, references: list[Path]) -> None:
    save_dreamsim(tmp_path, "open_clip_vitb32")
    folder = tmp_path / "open_clip_vitb32_single_lora"
    tensors = torch.load(folder / "adapter_model.bin")
    torch.save({name: t for name, t in tensors.items() if ".1." not in name}, folder / "adapter_model.bin")
    with raises(DraftuneError, "adapter_model.bin", "blocks.1.attn.qkv"):
        load_reward(DreamSim(str(references[0]), str(tmp_path), "open_clip_vitb32", SMALL))
    (folder / "adapter_config.json").write_text('{"r": 0}')
    with raises(DraftuneError, "adapter_config.json"):
        load_reward(DreamSim(str(references[0]), str(tmp_path), "open_clip_vitb32", SMALL))


def test_both_are_built_from_their_configs(folders: dict[str, Path], references: list[Path]) -> None:
    with without_weights() as mode:
        for reward in (Dino(str(references[0]), str(folders["dinov2"])), DreamSim(str(references[0]), shape=SMALL)):
            with mode:
                assert {type(p.data).__name__ for p in load_reward(reward).parameters()} == {"FakeTensor"}
