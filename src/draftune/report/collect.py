"""Read all data of a run's page from the run's folder. Loads no model and needs no network."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.evaluation.verdict import known
from draftune.report.charts import charts, reward_column, sweep_charts
from draftune.report.images import SIZES, ImageStore, evenly, fitting
from draftune.report.scores import score_table
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
        "name": run_name(folder),
        "facts": facts(settings, metrics, environment.get("device")),
        "summary": summary(settings, metrics, evaluations, reward),
        "scores": score_table(evaluations, reward, settings.eval_prompt_template or "")._asdict(),
        "warning": warning(settings, evaluations, reward),
        "best": best,
        "charts": charts(metrics, evaluations, reward),
        "settings": table(settings),
        "command": command(settings),
        "environment": [[name, str(value)] for name, value in environment.items()],
        "reward_check": [
            [part, row]
            for part, row in read_json(folder / "reward_check.json").items()
            if isinstance(row, dict) and all(isinstance(value, int | float | None) for value in row.values())
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
    sweep = sweep if is_sweep(sweep) else {}
    scales, swept = sweep.get("scales", []), [str(prompt) for prompt in sweep.get("prompts", [])][:MOST_PROMPTS]
    size = fitting(len(rows) * len(prompts) + len(scales) * len(swept))

    def frame(at: float, paths: Sequence[Path], scores: Sequence[float] = (), size: int = size) -> dict[str, Any]:
        return {"at": at, "images": [images.take(path, size) for path in paths], "scores": list(scores)}

    def sample(row: dict[str, Any], count: int, size: int = size) -> dict[str, Any]:
        return frame(row["step"], sample_images(folder, row["step"], count), row["scores"][:count], size)

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
            "recommended": sweep["recommended"] if known(sweep, "recommended") else None,
        },
    }
    used = {key for part in parts.values() for frame in part["frames"] for key in frame["images"]}
    return {**parts, "images": {key: images.uris[key] for key in sorted(used)}}


def run_name(folder: Path) -> str:
    """Return the name of a run's folder; bytes that are no UTF-8 become question marks."""
    return folder.resolve().name.encode("utf-8", "replace").decode()


def sample_images(run: Path, step: float, count: int) -> list[Path]:
    """Return the paths of the first sample images after an update. None of them leads out of the run's folder."""
    return [inside(run, f"samples/step-{int(step):06d}/{i:02d}.png") for i in range(count)]


def whole(frames: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the frames whose images can all be read."""
    return [frame for frame in frames if frame["images"] and None not in frame["images"]]


def is_sweep(sweep: dict[str, Any]) -> bool:
    """Return whether a file of a sweep has what the page shows: scales, and for each one scores and images."""

    def is_list(values: Any, kind: Any) -> bool:
        return isinstance(values, list) and len(values) == count and all(isinstance(value, kind) for value in values)

    scales, parts = sweep.get("scales"), [sweep.get("columns"), sweep.get("stderr", {})]
    count = len(scales) if isinstance(scales, list) else -1
    columns = [values for part in parts if isinstance(part, dict) for values in part.values()]
    return (
        is_list(scales, int | float)
        and is_list(sweep.get("images"), list)
        and isinstance(sweep.get("prompts"), list)
        and all(isinstance(part, dict) for part in parts)
        and all(is_list(values, int | float | None) for values in columns)
    )


def inside(folder: Path, name: object) -> Path:
    """Return the path of a file in the folder; of a missing file if the name points outside of it."""
    root = os.path.realpath(folder)
    try:
        path = Path(os.path.realpath(os.path.join(root, str(name))))
    except ValueError:  # a null byte
        return folder / "outside"
    return path if path.is_relative_to(root) else folder / "outside"


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
