"""The models that travel with the package."""

from pathlib import Path

ROOT = Path(__file__).parent
EMBEDDED = {name: ROOT / name.replace("_", "-") for name in ("emoji", "emoji_clip", "emoji_aesthetic", "emoji_judge")}
