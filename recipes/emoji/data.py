"""Build the data set: emoji images with names, from Noto's font and from Twemoji and Fluent 3D as published on npm.

    python recipes/emoji/data.py --output build/emoji

This downloads the packages with `npm pack` and selects the names that all three sets contain. It writes
`emoji.npz` (images: uint8 [N, 128, 128, 3] on white; names; styles), the same images as `pictures/STYLE/NAME.png`, the
tokenizer and, into the package, the two lists of names.

Noto is read from the bitmaps of the font file (`apt install fonts-noto-color-emoji`), Twemoji from vector graphics
(`pip install resvg-py`).
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
from PIL import Image, ImageDraw, ImageFont

from tokenizer import build_tokenizer, save_tokenizer

INDEX = "emoji-datasource-twitter@16.0.0"
TWEMOJI = "@twemoji/svg@15.0.0"
FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"
NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STYLES = ("noto", "twemoji", "3d")
SIZE = 128
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
    """The data set: images uint8 [N, 128, 128, 3], with the name and the style of each."""

    images: np.ndarray
    names: list[str]
    styles: list[str]

    @classmethod
    def load(cls, folder: Path) -> Emoji:
        """Load the data set."""
        data = np.load(folder / "emoji.npz")
        return cls(data["images"], data["names"].tolist(), data["styles"].tolist())

    @property
    def vocabulary(self) -> list[str]:
        return sorted(set(self.names))


def table(emoji: Emoji) -> np.ndarray:
    """Return the image indices [names, styles], names in alphabetical order."""
    number = {pair: i for i, pair in enumerate(zip(emoji.names, emoji.styles, strict=True))}
    return np.array([[number[name, style] for style in STYLES] for name in emoji.vocabulary])


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


def read_package(archive: Path, suffix: str) -> dict[str, bytes]:
    """Read the files of an npm package with this suffix, by path."""
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(suffix)}


def code_point(path: str) -> str:
    """Return the code point in a file name, without the variation selector, which the sets use differently."""
    return Path(path).stem.lower().replace("-fe0f", "")


def draw_noto(font: ImageFont.FreeTypeFont, unified: str) -> Image.Image | None:
    """Draw an emoji from its bitmap of 136x128 pixels without the margin of 4; None if the font has no such glyph."""
    text = "".join(chr(int(code, 16)) for code in unified.split("-"))
    if font.getbbox(text) != (0, 0, SIZE + 8, SIZE):
        return None
    image = Image.new("RGB", (SIZE, SIZE), "white")
    ImageDraw.Draw(image).text((-4, 0), text, font=font, embedded_color=True)
    return image


def draw_twemoji(svg: bytes) -> Image.Image:
    """Draw a vector graphic on white."""
    import resvg_py  # only this step of the recipes needs it

    png = resvg_py.svg_to_bytes(svg_string=svg.decode(), width=SIZE, height=SIZE, background="white")
    return Image.open(io.BytesIO(png)).convert("RGB")


def draw_fluent(webp: bytes, margin: int = 12) -> Image.Image:
    """Resize an image of 256 pixels on white, without most of its empty margin of 15 pixels on each side."""
    image = Image.open(io.BytesIO(webp)).convert("RGBA")
    image = image.crop((margin, margin, image.width - margin, image.height - margin))
    image = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def build(output: Path, noto_font: Path) -> Emoji:
    output.mkdir(parents=True, exist_ok=True)
    index = json.loads(read_package(fetch(INDEX, output), "package/emoji.json")["package/emoji.json"])
    font = ImageFont.truetype(noto_font, 109)
    twemoji = {code_point(path): svg for path, svg in read_package(fetch(TWEMOJI, output), ".svg").items()}
    fluent = {code_point(path): webp for path, webp in read_package(fetch(FLUENT, output), ".webp").items()}

    images, names, styles = [], [], []
    for entry in index:
        name = (entry["name"] or "").lower()
        if entry["subcategory"] not in SUBCATEGORIES or any(word in name for word in SKIPPED_WORDS):
            continue
        key = code_point(entry["image"])
        noto = draw_noto(font, entry["unified"])
        if noto is None or key not in twemoji or key not in fluent:
            continue
        for style, image in zip(STYLES, (noto, draw_twemoji(twemoji[key]), draw_fluent(fluent[key])), strict=True):
            images.append(np.asarray(image))
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
    parser.add_argument("--noto-font", type=Path, default=NOTO)
    args = parser.parse_args()
    emoji = build(args.output, args.noto_font)
    print(f"{len(emoji.names)} images of {len(emoji.vocabulary)} names")
