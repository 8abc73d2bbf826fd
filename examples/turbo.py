"""Fine-tune SDXL-Turbo through all of its four steps.

    python examples/turbo.py

The gradient of full DRaFT reaches the layout of the image, and is cheap in few steps. It needs a GPU of 24 GB.
"""

import draftune

run = draftune.train(
    "stabilityai/sdxl-turbo",
    "pickscore",
    prompts="animals",
    method="draft",
    num_inference_steps=4,
    steps=300,
    batch_size=2,
    gradient_accumulation_steps=2,
    tiny_decoder="madebyollin/taesdxl",
    reward_precision="bf16",
    output="runs/turbo",
)
draftune.export_lora(run.folder, "turbo-pickscore", "diffusers")
