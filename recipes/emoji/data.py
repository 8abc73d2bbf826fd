"""Build the data set: emoji images with names, from Noto, Twemoji and Fluent 3D as published on npm.

    python recipes/emoji/data.py --output build/emoji

This downloads the three packages with `npm pack` and selects the names that all three sets contain. It writes
`emoji.npz` (images: uint8 [N, 64, 64, 3] on white; names; styles), the same images as `pictures/STYLE/NAME.png`, the
tokenizer and, into the package, the two lists of names.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokenizer import build_tokenizer, save_tokenizer

PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
STYLES = tuple(PACKAGES)
SIZE = 64
ASSETS = Path(__file__).parents[2] / "src" / "draftune" / "assets"

# Without people (skin tones, gender variants), flags, clocks, keycaps, signs and office supplies: they are numerous and
# similar, and would use much of a small model's capacity.
SUBCATEGORIES = {
    "animal-amphibian", "animal-bird", "animal-bug", "animal-mammal", "animal-marine", "animal-reptile",
    "award-medal", "cat-face", "dishware", "drink", "event", "food-asian", "food-fruit", "food-marine",
    "food-prepared", "food-sweet", "food-vegetable", "game", "heart", "light & video", "monkey-face",
    "musical-instrument", "place-building", "place-geographic", "place-other", "plant-flower", "plant-other",
    "sky & weather", "sport", "transport-air", "transport-ground", "transport-water",
    "face-affection", "face-concerned", "face-costume", "face-glasses", "face-hand", "face-hat",
    "face-negative", "face-neutral-skeptical", "face-sleepy", "face-smiling", "face-tongue", "face-unwell",
}  # fmt: skip
SKIPPED_WORDS = ("moon symbol", "oncoming", "building construction", "japanese post", "european post")
RENAMED = {
    "automobile": "car",
    "electric light bulb": "light bulb",
    "slice of pizza": "pizza",
    "house building": "house",
    "soft ice cream": "soft serve",
    "heavy black heart": "red heart",
    "snowman without snow": "snowman",
    "snowman": "snowman in snow",
    "white medium star": "star",
    "lady beetle": "ladybug",
    "aubergine": "eggplant",
    "ear of maize": "corn",
    "steam locomotive": "locomotive",
    "basketball and hoop": "basketball",
    "tennis racquet and ball": "tennis",
    "closed umbrella": "folded umbrella",
    "umbrella": "umbrella without rain",
    "umbrella with rain drops": "umbrella",
    "black sun with rays": "sun",
    "red apple": "apple",
    "sailboat": "sailboat",
    "high voltage sign": "lightning",
    "jack-o-lantern": "pumpkin",
    "wrapped present": "present",
}

# The 64 names of the evaluation.
COMMON = (
    "cat face", "dog face", "mouse face", "rabbit face", "fox face", "bear face", "panda face", "tiger face",
    "lion face", "cow face", "pig face", "frog face", "monkey face", "unicorn face", "penguin", "owl",
    "elephant", "whale", "dolphin", "octopus", "crab", "turtle", "snail", "butterfly",
    "ladybug", "tropical fish", "sunflower", "rose", "tulip", "cactus", "palm tree", "mushroom",
    "apple", "banana", "strawberry", "watermelon", "pineapple", "cherries", "lemon", "carrot",
    "pizza", "hamburger", "doughnut", "birthday cake", "lollipop", "soft serve", "french fries", "beer mug",
    "soccer ball", "basketball", "guitar", "light bulb", "rocket", "car", "bus", "sailboat",
    "house", "sun", "rainbow", "fire", "red heart", "grinning face", "ghost", "robot face",
)  # fmt: skip


@dataclass
class Emoji:
    """The data set: images uint8 [N, 64, 64, 3], with the name and the style of each."""

    images: np.ndarray
    names: list[str]
    styles: list[str]

    @classmethod
    def load(cls, folder: Path) -> Emoji:
        data = np.load(folder / "emoji.npz")
        return cls(data["images"], data["names"].tolist(), data["styles"].tolist())

    @property
    def vocabulary(self) -> list[str]:
        return sorted(set(self.names))


def held_out_names(names: list[str]) -> set[str]:
    """Return every tenth name in alphabetical order; the aesthetic head is not trained on them."""
    return set(sorted(set(names))[::10])


def fetch(package: str, folder: Path) -> Path:
    """Download a package's archive from npm into `folder` if it does not exist, and return its path."""
    name, version = package.rsplit("@", 1)
    archive = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    return archive


def read_png_set(archive: Path, set_name: str) -> tuple[list[dict], dict[str, Image.Image]]:
    """Read the index of an emoji-datasource package and its 64-pixel images by code point."""
    index, images = [], {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name == "package/emoji.json":
                index = json.load(tar.extractfile(member))
            elif member.name.startswith(f"package/img/{set_name}/64/") and member.name.endswith(".png"):
                images[code_point(member.name)] = Image.open(io.BytesIO(tar.extractfile(member).read()))
    return index, images


def read_fluent_set(archive: Path) -> dict[str, Image.Image]:
    """Read the images of the Fluent package by code point."""
    with tarfile.open(archive) as tar:
        return {
            code_point(m.name): Image.open(io.BytesIO(tar.extractfile(m).read()))
            for m in tar
            if m.name.endswith(".webp")
        }


def code_point(path: str) -> str:
    """Return the code point in a file name, without the variation selector, which the sets use differently."""
    return Path(path).stem.lower().replace("-fe0f", "")


def on_white(image: Image.Image, margin: int) -> np.ndarray:
    """Crop `margin` pixels on each side, resize, and composite on white: RGB uint8 [64, 64, 3]."""
    image = image.convert("RGBA")
    image = image.crop((margin, margin, image.width - margin, image.height - margin))
    image = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def build(output: Path) -> Emoji:
    output.mkdir(parents=True, exist_ok=True)
    archives = {style: fetch(package, output) for style, package in PACKAGES.items()}
    index, noto = read_png_set(archives["noto"], "google")
    _, twemoji = read_png_set(archives["twemoji"], "twitter")
    sets = {"noto": noto, "twemoji": twemoji, "3d": read_fluent_set(archives["3d"])}

    images, names, styles = [], [], []
    for entry in index:
        name = (entry["name"] or "").lower()
        if entry["subcategory"] not in SUBCATEGORIES or any(word in name for word in SKIPPED_WORDS):
            continue
        key = code_point(entry["image"])
        if any(key not in by_code for by_code in sets.values()):
            continue
        for style, by_code in sets.items():
            # Fluent images have an empty margin of 15 of 256 pixels on each side; the others fill the frame.
            images.append(on_white(by_code[key], margin=12 if style == "3d" else 0))
            names.append(RENAMED.get(name, name))
            styles.append(style)
    emoji = Emoji(np.stack(images), names, styles)
    missing = set(COMMON) - set(names)
    assert not missing, f"common names without images: {missing}"
    other = [name for name in emoji.vocabulary if name not in COMMON]
    (ASSETS / "names-common.txt").write_text("\n".join(COMMON) + "\n")
    (ASSETS / "names-other.txt").write_text("\n".join(other) + "\n")
    save_tokenizer(build_tokenizer(emoji.names, STYLES), output / "tokenizer")
    for image, name, style in zip(images, names, styles, strict=True):
        path = output / "pictures" / style / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez_compressed(output / "emoji.npz", images=emoji.images, names=names, styles=styles)
    return emoji


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/emoji"))
    emoji = build(parser.parse_args().output)
    print(f"{len(emoji.names)} images of {len(emoji.vocabulary)} names")
