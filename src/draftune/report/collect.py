"""From a run's folder to one table of all that its page shows. Nothing of it needs the model or a network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.report.asked import command, table
from draftune.report.charts import charts, reward_column, sweep_charts
from draftune.report.pictures import SIZES, Pictures, evenly, fitting
from draftune.report.verdict import best_step, facts, verdict, warning
from draftune.runs.run_dir import CONFIG, EVALUATIONS, METRICS, SAMPLES, read_rows, read_settings
from draftune.utils.paths import user_path

MOST_FRAMES = 24
MOST_PROMPTS = 16
MOST_PAIRS = 8
SWEEP = Path("sweep") / "sweep.json"
FILES = (CONFIG, METRICS, EVALUATIONS, SAMPLES, "environment.json", "reward_check.json", SWEEP)
"""All that is read of a run but for the pictures, which these name."""


def collect(run: Path | str, pictures: Pictures | None = None) -> dict[str, Any]:
    """All that the page of a run's folder shows, as JSON can hold it; what the folder lacks is None or empty.

    `pictures` keeps what was read for the next time. Raises DraftuneError where there is no run.
    """
    folder, pictures = user_path(run), pictures or Pictures()
    if not (folder / CONFIG).is_file():
        raise DraftuneError(f"no run at {str(folder)!r}: a folder with a {CONFIG} is wanted")
    settings = read_settings(folder / CONFIG)
    metrics, evaluations, samples = (read_rows(folder / name) for name in (METRICS, EVALUATIONS, SAMPLES))
    environment = read_json(folder / "environment.json")
    reward, best = reward_column(evaluations), best_step(evaluations)
    data = {
        "name": folder.resolve().name,
        "facts": facts(settings, metrics, environment.get("device")),
        "verdict": verdict(settings, metrics, evaluations, reward),
        "warning": warning(settings, evaluations, reward),
        "best": best,
        "charts": charts(metrics, evaluations, reward),
        "settings": table(settings),
        "command": command(settings),
        "environment": [[name, str(value)] for name, value in environment.items()],
        "reward_check": [
            [part, found] for part, found in read_json(folder / "reward_check.json").items() if isinstance(found, dict)
        ],
        **shown(folder, samples, best, read_json(folder / SWEEP), pictures),
    }
    return finite(data)


def shown(
    folder: Path, samples: Sequence[dict[str, Any]], best: int | None, sweep: dict[str, Any], pictures: Pictures
) -> dict[str, Any]:
    """The pictures over time, before and after, and over scales, in a size that all of them fit in."""
    always = [i for i, row in enumerate(samples) if row["step"] == best]
    rows = [samples[i] for i in evenly(len(samples), MOST_FRAMES, always)]
    prompts = [str(prompt) for prompt in rows[0]["prompts"]][:MOST_PROMPTS] if rows else []
    if not {"scales", "columns", "prompts", "pictures"} <= sweep.keys():
        sweep = {}
    scales, swept = sweep.get("scales", []), [str(prompt) for prompt in sweep.get("prompts", [])][:MOST_PROMPTS]
    size = fitting(len(rows) * len(prompts) + len(scales) * len(swept))

    def frame(at: float, paths: Sequence[Path], scores: Sequence[float] = (), size: int = size) -> dict[str, Any]:
        return {"at": at, "pictures": [pictures.take(path, size) for path in paths], "scores": list(scores)}

    def sample(row: dict[str, Any], count: int, size: int = size) -> dict[str, Any]:
        at = folder / "samples" / f"step-{row['step']:06d}"
        return frame(row["step"], [at / f"{i:02d}.png" for i in range(count)], row["scores"][:count], size)

    frames = [sample(row, len(prompts)) for row in rows]
    pairs = [sample(row, min(len(prompts), MOST_PAIRS), SIZES[0]) for row in (rows[:1] + rows[-1:])]
    over_scales = [
        frame(scale, [inside(folder / SWEEP.parent, name) for name in names[: len(swept)]])
        for scale, names in zip(scales, sweep.get("pictures", []), strict=False)
    ]
    found: dict[str, Any] = {
        "pairs": {"prompts": prompts[:MOST_PAIRS], "frames": whole(pairs)},
        "samples": {"prompts": prompts, "frames": whole(frames)},
        "sweep": {
            "prompts": swept,
            "frames": whole(over_scales),
            "charts": sweep_charts(sweep),
            "rule": sweep.get("rule"),
            "recommended": sweep.get("recommended"),
        },
    }
    used = {key for name in found for frame in found[name]["frames"] for key in frame["pictures"]}
    return {**found, "pictures": {key: pictures.uris[key] for key in sorted(used)}}


def whole(frames: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose pictures can all be read."""
    return [frame for frame in frames if frame["pictures"] and None not in frame["pictures"]]


def inside(folder: Path, name: object) -> Path:
    """A file of the folder; a name that leads out of it is that of no file."""
    path = (folder / str(name)).resolve()
    return path if path.is_relative_to(folder.resolve()) else folder / "outside"


def read_json(path: Path) -> dict[str, Any]:
    """The table in a file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def finite(value: Any) -> Any:
    """The same with five digits of each number, and None for one that JSON can't hold."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
