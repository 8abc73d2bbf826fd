"""draftune: fine-tunes diffusion and flow image models on a reward, through sampling."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftune.errors import DraftuneError
    from draftune.experimental.distill import distill_lora
    from draftune.experimental.tune_weights import tune_knobs
    from draftune.guidance.methods import sample_guided
    from draftune.guidance.noise_optimization import optimize_noise
    from draftune.lora import load_lora, save_lora
    from draftune.methods import load_method
    from draftune.models import load_model
    from draftune.report import write_report
    from draftune.rewards import Reward, load_reward
    from draftune.runs.export import export_lora
    from draftune.runs.merge import merge_loras
    from draftune.training import train

__version__ = "0.1.0"
__all__ = [
    "DraftuneError",
    "Reward",
    "distill_lora",
    "export_lora",
    "load_lora",
    "load_method",
    "load_model",
    "load_reward",
    "merge_loras",
    "optimize_noise",
    "sample_guided",
    "save_lora",
    "train",
    "tune_knobs",
    "write_report",
]

# Imported when first asked for, so that `draftune --help` need not wait for torch.
HOMES = {
    "DraftuneError": "errors",
    "Reward": "rewards",
    "distill_lora": "experimental.distill",
    "export_lora": "runs.export",
    "load_lora": "lora",
    "load_method": "methods",
    "load_model": "models",
    "load_reward": "rewards",
    "merge_loras": "runs.merge",
    "optimize_noise": "guidance.noise_optimization",
    "sample_guided": "guidance.methods",
    "save_lora": "lora",
    "train": "training",
    "tune_knobs": "experimental.tune_weights",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'draftune' has no attribute {name!r}")
    return getattr(import_module(f"draftune.{HOMES[name]}"), name)
