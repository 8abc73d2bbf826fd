"""Read all data of a run's page from the run's folder. Loads no model and needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.report.charts import charts, reward_column, sweep_charts
from draftune.report.images import SIZES, ImageStore, evenly, fitting
from draftune.report.settings_table import command, table
from draftune.report.summary import best_step, facts, summary, sweep_note, warning
from draftune.runs.logs import EVALUATIONS, METRICS, SAMPLES, read_rows
from draftune.runs.run_dir import CONFIG, read_settings
from draftune.utils.paths import user_path

MOST_FRAMES = 24
MOST_PROMPTS = 16
MOST_PAIRS = 8
SWEEP = Path("sweep") / "sweep.json"
FILES = (CONFIG, METRICS, EVALUATIONS, SAMPLES, "environment.json", "reward_check.json", SWEEP)
"""Files of a run that the page reads, besides the images that they name."""


def collect(run: Path | str, images: ImageStore | None = None) -> dict[str, Any]:
    """Read the data of a run's page.

    Args:
        run: The run's folder.
        images: Images that were read before, which are reused.

    Returns:
        Data for JSON. Parts whose files are missing are None or empty.

    Raises:
        DraftuneError: there is no run.
    """
    folder, images = user_path(run), images or ImageStore()
    if not (folder / CONFIG).is_file():
        raise DraftuneError(f"no run at {str(folder)!r}: give a folder with a {CONFIG}")
    settings = read_settings(folder / CONFIG)
    metrics, evaluations, samples = (read_rows(folder / name) for name in (METRICS, EVALUATIONS, SAMPLES))
    environment = read_json(folder / "environment.json")
    reward, best = reward_column(evaluations), best_step(evaluations)
    data = {
        "name": folder.resolve().name,
        "facts": facts(settings, metrics, environment.get("device")),
        "summary": summary(settings, metrics, evaluations, reward),
        "warning": warning(settings, evaluations, reward),
        "best": best,
        "charts": charts(metrics, evaluations, reward),
        "settings": table(settings),
        "command": command(settings),
        "environment": [[name, str(value)] for name, value in environment.items()],
        "reward_check": [
            [part, row] for part, row in read_json(folder / "reward_check.json").items() if isinstance(row, dict)
        ],
        **shown(folder, samples, best, read_json(folder / SWEEP), images),
    }
    return finite(data)


def shown(
    folder: Path, samples: Sequence[dict[str, Any]], best: int | None, sweep: dict[str, Any], images: ImageStore
) -> dict[str, Any]:
    """Return the images over time, before and after training and over scales, in one size that fits the page."""
    always = [i for i, row in enumerate(samples) if row["step"] == best]
    rows = [samples[i] for i in evenly(len(samples), MOST_FRAMES, always)]
    prompts = [str(prompt) for prompt in rows[0]["prompts"]][:MOST_PROMPTS] if rows else []
    if not {"scales", "columns", "prompts", "images"} <= sweep.keys():
        sweep = {}
    scales, swept = sweep.get("scales", []), [str(prompt) for prompt in sweep.get("prompts", [])][:MOST_PROMPTS]
    size = fitting(len(rows) * len(prompts) + len(scales) * len(swept))

    def frame(at: float, paths: Sequence[Path], scores: Sequence[float] = (), size: int = size) -> dict[str, Any]:
        return {"at": at, "images": [images.take(path, size) for path in paths], "scores": list(scores)}

    def sample(row: dict[str, Any], count: int, size: int = size) -> dict[str, Any]:
        at = folder / "samples" / f"step-{row['step']:06d}"
        return frame(row["step"], [at / f"{i:02d}.png" for i in range(count)], row["scores"][:count], size)

    frames = [sample(row, len(prompts)) for row in rows]
    pairs = [sample(row, min(len(prompts), MOST_PAIRS), SIZES[0]) for row in (rows[:1] + rows[-1:])]
    over_scales = [
        frame(scale, [inside(folder / SWEEP.parent, name) for name in names[: len(swept)]])
        for scale, names in zip(scales, sweep.get("images", []), strict=False)
    ]
    parts: dict[str, Any] = {
        "pairs": {"prompts": prompts[:MOST_PAIRS], "frames": whole(pairs)},
        "samples": {"prompts": prompts, "frames": whole(frames)},
        "sweep": {
            "prompts": swept,
            "frames": whole(over_scales),
            "charts": sweep_charts(sweep),
            "note": sweep_note(sweep),
            "recommended": sweep.get("recommended"),
        },
    }
    used = {key for part in parts.values() for frame in part["frames"] for key in frame["images"]}
    return {**parts, "images": {key: images.uris[key] for key in sorted(used)}}


def whole(frames: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the frames whose images can all be read."""
    return [frame for frame in frames if frame["images"] and None not in frame["images"]]


def inside(folder: Path, name: object) -> Path:
    """Return the path of a file in the folder; of a missing file if the name points outside of it."""
    path = (folder / str(name)).resolve()
    return path if path.is_relative_to(folder.resolve()) else folder / "outside"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def finite(value: Any) -> Any:
    """Round numbers to five significant digits and replace those that are not finite by None."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
