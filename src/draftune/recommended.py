"""Settings that fit a model: the embedded one's own, else those of the paper's runs, drawn as the model was published.

Imports no torch.
"""

from __future__ import annotations

from typing import Any

from draftune.errors import DraftuneError
from draftune.published import PUBLISHED, variant, variant_of_pipeline, well_known
from draftune.registry.expression import Call, Sum, Value, parse
from draftune.utils.hub import is_hub_id
from draftune.utils.paths import user_path
from draftune.utils.processes import tell

# Clark et al., arXiv 2309.17400, section 5: Stable Diffusion 1.4, DDIM, AdamW, LoRA of rank 8.
PAPER: dict[str, Any] = {
    "reward": "aesthetic",
    "method": "draft-lv",
    "prompts": "animals",
    "eval_prompts": None,
    "held_out": None,
    "steps": 2000,
    # Steps and guidance are those of the model's family, in published.py.
    **PUBLISHED["stable-diffusion"]._asdict(),
    # The paper does not say; see docs/explanation/last-step.md for the measurement.
    "timestep_spacing": "trailing",
    "prefix_reuse": 1,
    "learning_rate": 4e-4,
    "sample_every": 100,
    "save_every": 50,
}
EMOJI: dict[str, Any] = {
    "reward": "emoji-aesthetic",
    # LV's copies did not make it learn sooner (RESULTS.md), and updates can share the steps before the last one
    # (docs/how-to/make-it-faster.md); another method has prefix_reuse 1.
    "method": "draft-k(k=1)",
    "prefix_reuse": 4,
    "prompts": "emoji",
    "eval_prompts": "emoji-common",
    "held_out": "emoji-judge-name + emoji-judge-style(style=3d)",
    "steps": 40,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "gradient_checkpointing": "no",  # graphs of pictures this small fit into any memory
    "learning_rate": 1e-3,
    "sample_every": 20,
    "save_every": 20,
}


SAMPLING = ("num_inference_steps", "guidance_scale")
told: set[str] = set()
"""Models of which it was said how they are drawn."""
METHOD_DEFAULTS: dict[str, dict[str, Value]] = {"draft-k": {"k": 1}, "draft-lv": {"n": 2}}
"""The default settings of the methods that are recommended, as their classes have them; those import torch."""


def same_method(first: str, second: str) -> bool:
    """Return whether two expressions name one method, with the defaults of the recommended ones filled in.

    An expression that cannot be read equals nothing but itself: `load_method` says what is wrong with it.
    """
    try:
        return filled_in(parse(first)) == filled_in(parse(second))
    except DraftuneError:
        return first == second


def filled_in(tree: Call | Sum) -> Call | Sum:
    """Return the expression of a method with all settings whose defaults are known here."""
    if isinstance(tree, Sum):
        return tree
    inner = None if tree.inner is None else filled_in(tree.inner)
    return Call(tree.name, METHOD_DEFAULTS.get(tree.name, {}) | tree.settings, inner)


def recommended(model: str) -> dict[str, Any]:
    """Return the settings for a model by its name, a folder or a hub id."""
    if model == "emoji":
        return EMOJI
    found = variant(model)
    return PAPER | (PUBLISHED[found]._asdict() if found else {})


def sampling_of(pipeline: Any, name: str) -> dict[str, Any]:
    """Return the sampling steps and the guidance scale for a loaded pipeline."""
    if name == "emoji":
        return {key: EMOJI[key] for key in SAMPLING}
    found = variant_of_pipeline(pipeline, name)
    return PUBLISHED[found or "stable-diffusion"]._asdict()


def tell_sampling(model: str) -> None:
    """Say once of a model how it is drawn unless set, where that is a guess."""
    if model in told or model == "emoji":
        return
    found = variant(model)
    steps, scale = PUBLISHED[found or "stable-diffusion"]
    values = f"{steps} steps and guidance {scale:g} (--num-inference-steps, --guidance-scale)"
    if found is None and is_hub_id(model) and not user_path(model).exists():
        tell(f"the kind of model that {model!r} is can't be known before it is downloaded: unless set, {values}")
    elif found == "few-step" and not well_known(model):
        tell(f"{model!r} is taken for a few-step model, by its scheduler: unless set, {values}")
    else:
        return
    told.add(model)
