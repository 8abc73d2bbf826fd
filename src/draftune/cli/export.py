"""A LoRA for other tools."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, add_skip_text_encoder, filled, writing_to
from draftune.utils.paths import user_path

LOAD = {
    "diffusers": "in diffusers: pipe.load_lora_weights({path!r})",
    "kohya": "put it into ComfyUI's models/loras or AUTOMATIC1111's models/Lora, or pipe.load_lora_weights({path!r})",
    "merged": "in diffusers: DiffusionPipeline.from_pretrained({path!r})",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=filled, metavar="RUN_OR_LORA", help="a run's folder, a LoRA file or its folder")
    parser.add_argument(
        "--format",
        required=True,
        choices=LOAD,
        help="diffusers: a LoRA's folder; kohya: a LoRA's .safetensors file, as ComfyUI and AUTOMATIC1111 read it; "
        "merged: the folder of a whole pipeline with the LoRA in its weights",
    )
    parser.add_argument(
        "--output", type=filled, required=True, metavar="PATH", help="the folder or file; it must not be there yet"
    )
    parser.add_argument("--lora-scale", type=float, default=1.0, metavar="A", help="the strength that becomes 1")
    parser.add_argument("--best", action="store_true", help="the run's best LoRA by its evaluations, not its last")
    parser.add_argument("--half", action="store_true", help="store float16 (default: float32)")
    parser.add_argument(
        "--model", type=filled, help="the base model, where the LoRA does not say it or it lies elsewhere"
    )
    add_skip_text_encoder(parser)


def run(args: argparse.Namespace) -> None:
    from draftune.runs.export import export_lora, grid

    with writing_to(user_path(args.output)):
        path = export_lora(
            args.source,
            args.output,
            args.format,
            args.lora_scale,
            args.best,
            args.half,
            args.model,
            args.skip_text_encoder_lora,
        )
    load = LOAD[args.format].format(path=str(path))
    if args.format == "diffusers" and (trained := grid(args.source, args.best)):
        options = ", ".join(f"{name}={value!r}" for name, value in trained.items())
        load += f"; pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {options})"
    print(f"{path}\n{load}")


COMMAND = Command(
    "export",
    "write a LoRA as other tools read it",
    "Writes a run's LoRA, or a LoRA file, for diffusers, for ComfyUI and AUTOMATIC1111, or merged into its base model.",
    "draftune export runs/first --format kohya --lora-scale 0.7 --output glossy.safetensors",
    arguments,
    run,
)
