"""Train on the answer of a vision-language model to a question about each image.

    python examples/question.py

The reward is the log-odds of "yes". It needs a GPU of 24 GB.
"""

import draftune

QUESTION = "does the image show {prompt}, alone and completely?"

run = draftune.train(
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    f'vqa(question="{QUESTION}")',
    prompts="animals",
    steps=300,
    batch_size=2,
    gradient_accumulation_steps=2,
    mixed_precision="bf16",
    # The model that answers can be fooled: another one watches.
    eval_prompts="animals",
    eval_rewards="pickscore",
    validation_steps=50,
    output="runs/question",
)
print(run.comparison)
