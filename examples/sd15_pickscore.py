"""Fine-tune Stable Diffusion 1.5 on PickScore by DRaFT-LV, and export the LoRA for ComfyUI.

    python examples/sd15_pickscore.py

It needs a GPU of 16 GB and downloads about 9 GB.
"""

import draftune

run = draftune.train(
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "pickscore",
    prompts="animals",
    method="draft_lv(n=2)",
    steps=500,
    batch_size=4,
    mixed_precision="bf16",
    # Scores that are not trained on show when images get worse while the reward still rises.
    eval_prompts="animals",
    eval_rewards="imagereward",
    validation_steps=50,
    early_stopping_patience=3,
    output="runs/sd15-pickscore",
)
print(run.comparison)
draftune.export_lora(run.folder, "sd15-pickscore.safetensors", "comfyui", best=True)
