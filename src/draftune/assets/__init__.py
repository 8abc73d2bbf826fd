"""The models that travel with the package."""

from pathlib import Path

ROOT = Path(__file__).parent
NAMES = ("emoji", "emoji_clip", "emoji_aesthetic", "emoji_judge", "emoji_latent_aesthetic")
EMBEDDED = {name: ROOT / name.replace("_", "-") for name in NAMES}
