"""Two nodes: one scores images by a reward, the other applies a LoRA on a range of the sampling steps."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import draftune
from draftune.lora import saved_steps
from draftune.sampling.step_range import StepRange


@lru_cache(maxsize=2)
def loaded_reward(expression: str, device: str) -> draftune.Reward:
    """Return a reward on a device, loaded once."""
    return draftune.load_reward(expression).to(device)


def score_images(images: Tensor, prompt: str, expression: str, device: str = "cpu") -> list[float]:
    """Score images by a reward.

    Args:
        images: ComfyUI's images [B, H, W, C] in [0, 1].
        prompt: Their common prompt.
        expression: A reward expression, as for `draftune train --reward`.
        device: The reward's device.

    Returns:
        B scores.

    Raises:
        DraftuneError: the reward is unknown, its weights are missing, or it cannot score the prompt.
    """
    pixels = images[..., :3].permute(0, 3, 1, 2).to(device, torch.float32)
    with torch.no_grad():
        scores: list[float] = loaded_reward(expression, device)(pixels, [prompt] * len(pixels)).tolist()
    return scores


def keyframes(steps: StepRange) -> list[tuple[float, float]]:
    """Return the strengths of a LoRA over the path: pairs of the fraction from which a strength holds, and it."""
    frames = [(steps.start, 1.0)]
    if steps.start > 0:
        frames.insert(0, (0.0, 0.0))
    return frames if steps.end == 1 else [*frames, (steps.end, 0.0)]


class ScoreImages:
    """Score images by a reward, and pass on the best one."""

    CATEGORY = "draftune"
    FUNCTION = "score"
    RETURN_TYPES = ("FLOAT", "STRING", "IMAGE")
    RETURN_NAMES = ("mean", "scores", "best_image")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI looks this name up
        """Return the node's inputs."""
        return {
            "required": {
                "images": ("IMAGE",),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "reward": ("STRING", {"default": "pickscore", "tooltip": "as for draftune train --reward"}),
            }
        }

    def score(self, images: Tensor, prompt: str, reward: str) -> dict[str, Any]:
        """Return the mean score, the scores as text, and the image with the highest score."""
        import comfy.model_management

        scores = score_images(images, prompt, reward, str(comfy.model_management.get_torch_device()))
        text = "\n".join(f"image {i}: {score:.4g}" for i, score in enumerate(scores, 1))
        best = max(range(len(scores)), key=scores.__getitem__)
        return {"ui": {"text": [text]}, "result": (sum(scores) / len(scores), text, images[best : best + 1])}


class LoRAOnSteps:
    """Create hooks that apply a LoRA on a range of the sampling steps, by default the one it was trained for."""

    CATEGORY = "draftune"
    FUNCTION = "create"
    RETURN_TYPES = ("HOOKS",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI looks this name up
        """Return the node's inputs."""
        import folder_paths

        return {
            "required": {
                "lora_name": (folder_paths.get_filename_list("loras"),),
                "strength_model": ("FLOAT", {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}),
                "steps": ("STRING", {"default": "", "tooltip": "such as 0.0-0.4; empty: the range in the LoRA's file"}),
            },
            "optional": {"prev_hooks": ("HOOKS",)},
        }

    def create(self, lora_name: str, strength_model: float, steps: str, prev_hooks: Any = None) -> tuple[Any]:
        """Return the hooks; attach them to the positive and negative conditioning (Cond Set Props)."""
        import comfy.hooks
        import comfy.utils
        import folder_paths

        path = folder_paths.get_full_path("loras", lora_name)
        chosen = StepRange.parse(steps) if steps.strip() else saved_steps(Path(path))
        hooks = comfy.hooks.create_hook_lora(
            lora=comfy.utils.load_torch_file(path, safe_load=True), strength_model=strength_model, strength_clip=0.0
        )
        group = comfy.hooks.HookKeyframeGroup()
        for start, strength in keyframes(chosen):
            group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start, guarantee_steps=0))
        hooks.set_keyframes_on_hooks(group)
        return (hooks if prev_hooks is None else prev_hooks.clone_and_combine(hooks),)


NODE_CLASS_MAPPINGS = {"DraftuneScoreImages": ScoreImages, "DraftuneLoRAOnSteps": LoRAOnSteps}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DraftuneScoreImages": "Score images (draftune)",
    "DraftuneLoRAOnSteps": "LoRA on steps (draftune)",
}
