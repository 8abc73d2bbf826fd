"""Face identity: FaceNet's embedding as facenet-pytorch computes it, on the box of a face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, max_pool2d, normalize
from transformers import CLIPTokenizer, OwlViTForObjectDetection

from draftune import train
from draftune.errors import DraftuneError
from draftune.rewards import load_reward, parse_reward
from draftune.rewards.face import Face, InceptionResnetV1
from draftune.rewards.preprocess import CLIP_MEAN, CLIP_STD
from draftune.utils.images import from_pil
from draftune.utils.weightless import without_weights
from helpers.errors import raises
from helpers.published_weights import OLD_PILLOW, photographs, save_owlvit, squashed_pixels

BOX = "0.1,0.2,0.8,0.9"
LAYERS: dict[str, list[list[tuple[int, int | tuple[int, int]]]]] = {
    "repeat_1": [[(1, 0)], [(1, 0), (1, 1)], [(1, 0), (1, 1), (1, 1)]],
    "mixed_6a": [[(2, 0)], [(1, 0), (1, 1), (2, 0)]],
    "repeat_2": [[(1, 0)], [(1, 0), (1, (0, 3)), (1, (3, 0))]],
    "mixed_7a": [[(1, 0), (2, 0)], [(1, 0), (2, 0)], [(1, 0), (1, 1), (2, 0)]],
    "repeat_3": [[(1, 0)], [(1, 0), (1, (0, 1)), (1, (1, 0))]],
}
"""Stride and padding of each convolution in each branch, from Inception-ResNet v1's definition."""
LAYERS["block8"] = LAYERS["repeat_3"]


def conv(t: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
    x = conv2d(x, t[f"{name}.conv.weight"], stride=stride, padding=padding)
    bn = [t[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return batch_norm(x, *bn, eps=1e-3).relu()


def branches(t: dict[str, Tensor], name: str, kind: str, x: Tensor) -> list[Tensor]:
    outputs = []
    for i, chain in enumerate(LAYERS[kind]):
        y = x
        for j, (stride, padding) in enumerate(chain):
            y = conv(t, f"{name}.branch{i}" + (f".{j}" if len(chain) > 1 else ""), y, stride, padding)
        outputs.append(y)
    return outputs


def embedding(t: dict[str, Tensor], image: Image.Image) -> Tensor:
    """The embedding [512] of a face that fills the image, from the published tensors."""
    pixels = (np.asarray(image.resize((160, 160), Image.Resampling.BILINEAR), dtype=np.float32) - 127.5) / 128
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    x = conv(t, "conv2d_2b", conv(t, "conv2d_2a", conv(t, "conv2d_1a", x, 2)), 1, 1)
    x = conv(t, "conv2d_4b", conv(t, "conv2d_4a", conv(t, "conv2d_3b", max_pool2d(x, 3, 2))), 2)
    for kind, count, scale in (("repeat_1", 5, 0.17), ("repeat_2", 10, 0.1), ("repeat_3", 5, 0.2), ("block8", 1, 1.0)):
        for i in range(count):
            name = kind if kind == "block8" else f"{kind}.{i}"
            up = t[f"{name}.conv2d.weight"], t[f"{name}.conv2d.bias"]
            x = x + scale * conv2d(torch.cat(branches(t, name, kind, x), 1), *up)
            x = x if kind == "block8" else x.relu()
        if (mixed := {"repeat_1": "mixed_6a", "repeat_2": "mixed_7a"}.get(kind)) is not None:
            x = torch.cat([*branches(t, mixed, mixed, x), max_pool2d(x, 3, 2)], 1)
    x = x.mean((2, 3)) @ t["last_linear.weight"].T
    bn = [t[f"last_bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return normalize(batch_norm(x, *bn, eps=1e-3))[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the published layout, with the classifier and the counters."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in InceptionResnetV1().state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensors[name] = noise * 1.5 / tensor[0].numel() ** 0.5
        elif tensor.dim():
            is_scale = name.endswith(("weight", "running_var"))
            tensors[name] = 1 + 0.1 * noise.clamp(-3, 3) if is_scale else 0.1 * noise
        else:
            tensors[name] = tensor
    tensors |= {"logits.weight": torch.zeros(7, 512), "logits.bias": torch.zeros(7)}
    path = tmp_path_factory.mktemp("face") / "vggface2.pt"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def reference(weights: Path) -> Path:
    photographs()[1].save(weights.parent / "reference.png")
    return weights.parent / "reference.png"


def test_scores_agree_with_facenet(weights: Path, reference: Path) -> None:
    tensors = torch.load(weights)
    reward = load_reward(Face(str(reference), str(weights), box=BOX))
    known, ours, theirs = embedding(tensors, Image.open(reference)), [], []
    for image in photographs()[:12]:
        sides = image.width, image.height, image.width, image.height
        face = image.crop(tuple(int(float(share) * n) for share, n in zip(BOX.split(","), sides, strict=True)))  # type: ignore[arg-type]
        theirs.append(float(embedding(tensors, face) @ known))
        with torch.no_grad():
            ours.append(float(reward(from_pil(image), [""])))
    assert np.std(theirs) > 1e-3
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-3 * np.std(theirs)


def test_only_the_box_has_a_gradient(weights: Path, reference: Path) -> None:
    reward = load_reward(Face(str(reference), str(weights), box=BOX))
    images = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = reward(images, ["", ""])
    torch.testing.assert_close(scores, torch.cat([reward(image[None], [""]) for image in images]), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    inside = torch.zeros(50, 40, dtype=torch.bool)
    inside[10:45, 4:32] = True
    assert (gradient[..., inside] != 0).float().mean() > 0.9
    assert (gradient[..., ~inside] == 0).all()


@pytest.mark.skipif(OLD_PILLOW, reason="Pillow before version 13 resizes in another order")
def test_the_detector_cuts_out_its_best_box(weights: Path, reference: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_owlvit(tmp_path)
    reward = load_reward(Face(str(reference), str(weights), detector=str(folder), query="a cat"))
    network, tensors = OwlViTForObjectDetection.from_pretrained(folder).eval(), torch.load(weights)

    def face(image: Image.Image) -> Image.Image:
        pixels = squashed_pixels(image, 64, CLIP_MEAN, CLIP_STD)
        tokens = CLIPTokenizer.from_pretrained(folder)(
            ["a cat"], padding="max_length", truncation=True, max_length=12, return_tensors="pt"
        )
        output = network(pixel_values=pixels, **tokens)
        x, y, width, height = output.pred_boxes[0, output.logits[0, :, 0].argmax()].tolist()
        shares = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        (box,) = reward.boxes(from_pil(image))  # type: ignore[operator]
        assert box == pytest.approx([min(max(share, 0), 1) for share in shares], abs=1e-5)
        # A share that is a whole number of pixels may be rounded either way, so the crop is that of the box itself.
        sides = image.width, image.height, image.width, image.height
        return image.crop(tuple(int(share * side) for share, side in zip(box, sides, strict=True)))  # type: ignore[arg-type]

    image = photographs()[2]
    expected = embedding(tensors, face(image)) @ embedding(tensors, face(Image.open(reference)))
    images = from_pil(image).requires_grad_()
    score = reward(images, [""])
    torch.testing.assert_close(score[0].detach(), expected, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.any()


@pytest.mark.slow
def test_it_trains_the_embedded_model(weights: Path, reference: Path, tmp_path: Path) -> None:
    run = train(
        "emoji",
        Face(str(reference), str(weights), box=BOX),
        method="draft_lv",
        prompts=["cat face", "pizza"],
        steps=2,
        batch_size=1,
        num_inference_steps=2,
        eval_prompts="",
        eval_rewards=None,
        log_images_steps=0,
        num_log_prompts=1,
        output=str(tmp_path / "run"),
    )
    assert all(row["grad_norm"] > 0 for row in run.metrics)


def test_what_is_missing_is_refused(weights: Path, reference: Path, tmp_path: Path) -> None:
    with raises(DraftuneError, "20180402-114759-vggface2.pt", "https", "weights=", "google/owlvit-base-patch32"):
        parse_reward(f"face(image='{reference}')")
    for box in ("0,0,1", "0.5,0,0.5,1", "0,0,2,1", "a,b,c,d"):
        with raises(DraftuneError, "box", box):
            Face(str(reference), str(weights), box=box)
    tensors = torch.load(weights)
    del tensors["block8.conv2d.bias"]
    torch.save(tensors, tmp_path / "other.pt")
    with raises(DraftuneError, "other.pt", "block8.conv2d.bias"):
        load_reward(Face(str(reference), str(tmp_path / "other.pt"), box=BOX))


def test_it_is_built_without_weights(reference: Path) -> None:
    with without_weights() as mode, mode:
        reward = load_reward(Face(str(reference), box=BOX))
    assert {type(p.data).__name__ for p in reward.parameters()} == {"FakeTensor"}
