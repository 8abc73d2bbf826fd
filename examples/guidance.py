"""Sample with a reward as guidance, without training.

    python examples/guidance.py

Each sampling step is pushed up the reward's gradient. It takes a few seconds on a CPU.
"""

from diffusers.utils import numpy_to_pil

import draftune

model = draftune.load_model("emoji")
prompts = ["cat face", "pizza", "rocket"]
plain = draftune.sample_guided(model, "emoji_aesthetic", prompts, "pgdiff_dynamic(strength=0)")
guided = draftune.sample_guided(model, "emoji_aesthetic", prompts, "pgdiff_dynamic(strength=0.05)")
images = numpy_to_pil(guided.images.permute(0, 2, 3, 1).numpy())
for prompt, image, before, after in zip(prompts, images, plain.rewards[-1], guided.rewards[-1], strict=True):
    print(f"{prompt}: reward {before:.2f} without guidance, {after:.2f} with it")
    image.save(f"{prompt.replace(' ', '-')}.png")
