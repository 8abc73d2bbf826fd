"""How other tools load an exported LoRA."""

from __future__ import annotations

from pathlib import Path

from draftune.lora import FILE_NAME, saved_sampler
from draftune.runs.export import sampler_options

EMBEDDED = 'str(files("draftune") / "assets" / "emoji")'
"""The folder of the embedded model, as code."""


def scheduler_line(lora: Path) -> str | None:
    """Return the line that gives diffusers' pipeline the sampler of training; None if the LoRA's file names none."""
    options = sampler_options(lora)
    if not options:
        return None
    kind = saved_sampler(lora).get("scheduler", "DDIMScheduler")
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config, {arguments})"


def diffusers_code(lora: Path, source: str, base_model: str, prompt: str, arguments: str) -> str:
    """Return Python code that samples an image with a LoRA in diffusers.

    Args:
        lora: The LoRA's file, whose metadata name the sampler.
        source: The folder or hub id that diffusers loads the LoRA from.
        base_model: The folder or hub id of its base model, or "emoji".
        prompt: The prompt.
        arguments: The keyword arguments of the pipeline's call.
    """
    line, eta = scheduler_line(lora), saved_sampler(lora).get("eta")
    kind = line.split("= ")[1].split(".")[0] if line else None
    lines = [
        *(["from importlib.resources import files", ""] if base_model == "emoji" else []),
        f"from diffusers import {', '.join(sorted(filter(None, [kind, 'DiffusionPipeline'])))}",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({EMBEDDED if base_model == 'emoji' else repr(base_model)})",
        *([line] if line else []),
        # Without the name, diffusers 0.35 refuses a folder when the hub is offline.
        f"pipe.load_lora_weights({source!r}, weight_name={FILE_NAME!r})",
        f"image = pipe({', '.join([repr(prompt), arguments, *([f'eta={eta}'] if eta is not None else [])])}).images[0]",
    ]
    return "\n".join(lines)
