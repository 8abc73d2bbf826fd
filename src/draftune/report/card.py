"""The model card of a run's LoRA, and the folder that is uploaded to the Hugging Face hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.lora import saved_steps
from draftune.prompts import PROMPT_SETS
from draftune.report.charts import reward_column
from draftune.report.collect import read_json, run_name
from draftune.report.scores import score_table
from draftune.report.settings_table import command
from draftune.report.summary import best_step, facts, summary, warning
from draftune.runs.export import export_lora, source_file
from draftune.runs.logs import EVALUATIONS, METRICS, SAMPLES, read_rows
from draftune.runs.run_dir import CONFIG, read_settings
from draftune.runs.usage import diffusers_code
from draftune.settings import Settings
from draftune.utils.hub import is_hub_id
from draftune.utils.paths import atomic_write, user_path

PREVIEW = "before_after.png"
PACKAGES = ("draftune", "torch", "diffusers", "transformers", "peft")
EMBEDDED = "the embedded model"
PROMPT_SETTINGS = ("prompts", "eval_prompts", "retain_prompts")
"""Settings that may name a file of prompts."""
SEEN = 3
"""Evaluations, the base model's included, that a warning of over-optimization needs at least."""


def write_card(
    run: Path | str, output: Path | str, repository: str = "", best: bool = False, license: str = ""
) -> Path:
    """Write a folder for the hub: the LoRA in diffusers' format, a model card, the image and the run's settings.

    Args:
        run: The run's folder.
        output: The folder, which must not exist or be empty.
        repository: The hub id in the card's code; the output folder's name by default.
        best: Whether to take the run's best LoRA by its evaluations instead of the last one.
        license: The license's identifier on the hub, such as "apache-2.0"; "" for none.

    Returns:
        The folder.

    Raises:
        DraftuneError: there is no run, it has no LoRA, or the folder cannot be written.
    """
    folder, target = user_path(run), user_path(output)
    check_license(license)
    if not (folder / CONFIG).is_file():
        raise DraftuneError(f"no run at {str(folder)!r}: give a folder with a {CONFIG}")
    text = model_card(folder, repository or target.name, best, license)
    export_lora(folder, target, "diffusers", best=best)
    settings, copies = shared(read_settings(folder / CONFIG))
    for name, source in (copies | {PREVIEW: folder / PREVIEW}).items():
        if source.is_file():
            shutil.copyfile(source, target / name)
    for name, content in {CONFIG: settings.to_yaml(), "README.md": text}.items():
        with atomic_write(target / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return target


def shared(settings: Settings) -> tuple[Settings, dict[str, Path]]:
    """Return settings that hold beside the card, and the files of prompts that they name there, by their names.

    The files are copied. The settings name no folder of this machine that a reader does not need.
    """
    names: dict[Path, str] = {}
    values: dict[str, Any] = {"output": Settings.output}
    for setting in PROMPT_SETTINGS:
        text = getattr(settings, setting) or ""
        if text in PROMPT_SETS or text.isdecimal():
            continue
        path, column = user_path(text), ""
        if not path.exists() and ":" in text:
            path, column = user_path(text.rpartition(":")[0]), f":{text.rpartition(':')[2]}"
        if path.is_file():
            name = names.setdefault(path.resolve(), f"{setting}{path.suffix.lower()}")
            values[setting] = f"{name}{column}"
        elif path.is_absolute():
            values[setting] = f"{path.name}{column}"  # a folder, or a file that is not there any more
    return replace(settings, **values), {name: path for path, name in names.items()}


def check_license(license: str) -> None:
    """Raise DraftuneError unless a license is empty or written like the hub's identifiers."""
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise DraftuneError(f"--license must be an identifier of the hub such as apache-2.0, not {license!r}")


def model_card(folder: Path, repository: str, best: bool = False, license: str = "") -> str:
    """Return the model card of a run's LoRA in the hub's format. See `write_card` for the arguments."""
    from huggingface_hub import ModelCardData

    lora, (settings, copies) = source_file(folder, best), shared(read_settings(folder / CONFIG))
    metrics, evaluations = read_rows(folder / METRICS), read_rows(folder / EVALUATIONS)
    environment = read_json(folder / "environment.json")
    reward, steps = reward_column(evaluations), saved_steps(lora)
    on_hub = is_hub_id(settings.model) and not user_path(settings.model).exists()
    data = ModelCardData(
        base_model=settings.model if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license or None,
        tags=["lora", "draftune", "reward-fine-tuning", settings.method.partition("(")[0]],
    )
    prompt = next((row["prompts"][0] for row in read_rows(folder / SAMPLES) if row["prompts"]), "a prompt")
    arguments = f"num_inference_steps={settings.num_inference_steps}, guidance_scale={settings.guidance_scale:g}"
    base = f"`{settings.model}`" if settings.model != "emoji" else EMBEDDED
    shown = best_step(evaluations) or 0 if best else metrics[-1]["step"] if metrics else 0
    scores = score_table(evaluations, reward, settings.eval_prompt_template or "", shown)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {run_name(folder)}",
        f"A LoRA for {base}, fine-tuned on the reward `{settings.reward}` by backpropagation through sampling "
        f"(`{settings.method}`) with draftune. These are the weights after "
        f"{shown:,} updates.",
        *([f"![Images before and after training]({PREVIEW})"] if (folder / PREVIEW).is_file() else []),
        "## Use",
        f"```python\n{diffusers_code(lora, repository, settings.model, prompt, arguments)}\n```",
        *(
            []
            if steps.is_all
            else [f"The LoRA was trained for the sampling steps {steps} only; it is off on the others."]
        ),
        "`pipe.set_adapters` and a weight below 1 weaken the effect.",
        "## Results",
        markdown_table(scores.head, [[f"`{name}`", *cells] for name, *cells in scores.rows])
        if scores.rows
        else "The run has no evaluations.",
        scores.note,
        summary(settings, metrics, evaluations, reward),
        "## Over-optimization",
        over_optimization(settings, evaluations, reward),
        "## Training",
        markdown_table(["", ""], facts(settings, metrics, environment.get("device"))),
        f"Repeat it with{' the prompts beside this card' if copies else ''}:",
        f"```bash\n{command(settings)}\n```",
        ", ".join(f"{name} {environment[name]}" for name in PACKAGES if name in environment),
        "## License",
        license_paragraph(base, settings, license),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def over_optimization(settings: Settings, evaluations: Sequence[Mapping[str, Any]], reward: str | None) -> str:
    """Return what the evaluations say of over-optimization."""
    if text := warning(settings, evaluations, reward):
        return f"**{text}**"
    if not settings.eval_rewards:
        return "No reward was measured that was not trained on: over-optimization would not have been noticed."
    if len(evaluations) < SEEN:
        return "There are too few evaluations to notice over-optimization: look at the images."
    return (
        "Every reward can be exploited: higher scores then come with worse images. The scores that were not trained on "
        "gave no warning in this run. They are models too: look at the images."
    )


def license_paragraph(base: str, settings: Settings, license: str) -> str:
    """Return the paragraph on licenses."""
    given = f"The LoRA: {license}." if license else "No license of the LoRA was given."
    return (
        f"{given} The license of the base model ({base}) applies to images and to merged weights. The reward "
        f"(`{settings.reward}`) has licenses of its own; `draftune list` names them."
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; vertical bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
