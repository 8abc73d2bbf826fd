"""The models that travel with the package."""

from pathlib import Path

ROOT = Path(__file__).parent
EMBEDDED = {name: ROOT / name for name in ("emoji", "emoji-clip", "emoji-aesthetic", "emoji-judge")}
