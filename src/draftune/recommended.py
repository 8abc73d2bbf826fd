"""Default settings by model: those of the embedded model, else the paper's, sampled as the model was published.

Imports no torch.
"""

from __future__ import annotations

from typing import Any

from draftune.published import ATTENTION, FLOW, PUBLISHED, implied_pipeline, variant, variant_of_pipeline, well_known
from draftune.utils.hub import is_hub_id, offline
from draftune.utils.logging import logger
from draftune.utils.model_options import NO_OPTIONS, ModelOptions, is_checkpoint
from draftune.utils.paths import user_path

# Clark et al., 2023, arXiv:2309.17400, section 5: Stable Diffusion 1.4, DDIM, AdamW, a LoRA of rank 8.
PAPER: dict[str, Any] = {
    "reward": "aesthetic",
    "prompts": "animals",
    "eval_prompts": None,
    "eval_prompt_template": "",
    "eval_rewards": None,
    "steps": 2000,
    "lr_scheduler": "constant_with_warmup",
    # published.py has the values of other model families.
    **PUBLISHED["stable-diffusion"]._asdict(),
    # The paper does not say; see docs/explanation/last-step.md for the measurement.
    "timestep_spacing": "trailing",
    "log_images_steps": 100,
    "checkpointing_steps": 50,
}
EMOJI: dict[str, Any] = {
    # Two of the three styles that the model knows by a word: toward the one, away from the other.
    "reward": 'emoji_clip(template="noto {prompt}") - 0.25*emoji_clip(template="twemoji {prompt}")',
    # Two sampling steps without guidance are two network calls an image: the gradient can flow through both.
    "method": "draft",
    "prompts": "emoji",
    "eval_prompts": "emoji-common",
    "eval_prompt_template": "noto {prompt}",
    "eval_rewards": 'emoji_name_accuracy + emoji_style_probability(style="noto")',
    "steps": 160,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "gradient_checkpointing": "none",  # graphs of images this small fit into any memory
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "lora_target_modules": ATTENTION,
    "mixed_precision": "no",
    "log_images_steps": 40,
    "checkpointing_steps": 40,
}
WITHOUT_STYLE = {"eval_prompt_template": "", "eval_rewards": "emoji_name_accuracy"}
"""The embedded model's defaults with another reward than the recommended one, which evaluates a style."""
SAMPLING = ("num_inference_steps", "guidance_scale")
announced: set[str] = set()
"""Models whose guessed sampling defaults were logged."""


def without_style(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return recommended settings with another reward than the recommended one."""
    return defaults | {name: value for name, value in WITHOUT_STYLE.items() if defaults.get(name)}


def fit_to_steps(method: str, num_inference_steps: Any) -> str:
    """Return a recommended method for this number of sampling steps: ReFL stops at one of at most as many steps."""
    fewer = isinstance(num_inference_steps, int) and 0 < num_inference_steps < 10
    return f"refl(m={num_inference_steps})" if method == FLOW["method"] and fewer else method


def recommended(model: str, options: ModelOptions = NO_OPTIONS) -> dict[str, Any]:
    """Return the default settings for a model, by its name, folder, hub id or checkpoint file."""
    if model == "emoji":
        return EMOJI
    base = {"base_pipeline": options.base_pipeline or implied_pipeline(model)} if is_checkpoint(model) else {}
    family = variant(model, options)
    return PAPER | (PUBLISHED[family]._asdict() if family else {}) | base


def recommended_of(pipeline: Any, name: str) -> dict[str, Any]:
    """Return the default settings for a loaded pipeline, except the precision, which its weights already have."""
    if name == "emoji":
        return EMOJI
    family = variant_of_pipeline(pipeline, name) or "stable-diffusion"
    return PAPER | PUBLISHED[family]._asdict() | {"mixed_precision": "no"}


def tell_sampling(model: str, options: ModelOptions = NO_OPTIONS) -> None:
    """Log the default sampling steps and guidance once for each model for which they are a guess."""
    if model in announced or model == "emoji":
        return
    family = variant(model, options)
    pipeline = (options.base_pipeline or implied_pipeline(model) or "") if is_checkpoint(model) else model
    defaults = PUBLISHED[family or "stable-diffusion"]
    values = (
        f"{defaults.num_inference_steps} steps and guidance {defaults.guidance_scale:g} "
        "(--num-inference-steps, --guidance-scale)"
    )
    if family is None and is_hub_id(pipeline) and not user_path(pipeline).exists():
        if offline():
            return  # it can't be downloaded, as loading it reports
        logger.warning(f"the family of {pipeline!r} is unknown before its download; the defaults are {values}")
    elif family in ("few-step", "few-step-xl", "z-image-turbo") and not well_known(pipeline):
        logger.warning(f"by its scheduler, {model!r} is a few-step model; the defaults are {values}")
    else:
        return
    announced.add(model)
