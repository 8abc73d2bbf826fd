"""The command `draftune export`."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, add_base_model, add_lora, add_number, filled, writing_to
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import user_path

LOAD = {
    "diffusers": "in diffusers: pipe.load_lora_weights({path!r})",
    "comfyui": "copy it to ComfyUI's models/loras",
    "kohya": "copy it to ComfyUI's models/loras or AUTOMATIC1111's models/Lora, or pipe.load_lora_weights({path!r})",
    "merged": "in diffusers: DiffusionPipeline.from_pretrained({path!r})",
}

DTYPES = ("fp32", "fp16")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_lora(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=LOAD,
        help="diffusers: folder of a LoRA; comfyui: .safetensors file for ComfyUI; kohya: .safetensors file for "
        "AUTOMATIC1111, of Stable Diffusion 1, 2 and XL only; merged: folder of a pipeline with the LoRA merged into "
        "its weights",
    )
    parser.add_argument(
        "--output", type=filled, required=True, metavar="PATH", help="folder or file, which must not exist"
    )
    add_number(parser, "--lora-scale", 1.0, "A", "factor of the LoRA's weights, any number")
    parser.add_argument(
        "--best", action="store_true", help="export the run's best LoRA by its evaluations (default: the last one)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="data type of the weights (default: fp32)")
    add_base_model(parser)


def run(args: argparse.Namespace) -> None:
    """Export the LoRA, and print how other tools load it."""
    from draftune.lora import saved_sampler, saved_steps
    from draftune.runs.export import export_lora, source_file
    from draftune.runs.usage import scheduler_line

    with writing_to(user_path(args.output)):
        path = export_lora(
            args.source,
            args.output,
            args.format,
            args.lora_scale,
            args.best,
            args.dtype,
            args.model,
            args.skip_text_encoder_lora,
            ModelOptions.of(args),
        )
    load = LOAD[args.format].format(path=str(path))
    if args.format == "diffusers" and (line := scheduler_line(source := source_file(args.source, args.best))):
        sampler = saved_sampler(source)
        load += f"; {line}" + (f"; pipe(…, eta={sampler['eta']})" if "eta" in sampler else "")
    if args.format != "merged" and not (steps := saved_steps(path)).is_all:
        load += f"; for the steps {steps} only, by a callback_on_step_end (docs/how-to/lora-steps.md)"
    print(f"{path}\n{load}")


COMMAND = Command(
    "export",
    "export a LoRA for other tools",
    "Export a LoRA for diffusers, for ComfyUI and AUTOMATIC1111, or merged into its base model.",
    "draftune export runs/first --format comfyui --lora-scale 0.7 --output glossy.safetensors",
    arguments,
    run,
)
