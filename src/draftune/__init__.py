"""draftune: fine-tunes diffusion and flow image models on a reward, through sampling."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftune.distilling import distill_lora
    from draftune.errors import DraftuneError
    from draftune.export import export_lora
    from draftune.guides import sample_guided
    from draftune.knobs import tune_knobs
    from draftune.lora import load_lora, save_lora
    from draftune.methods import load_method
    from draftune.mixing import mix_loras
    from draftune.models import load_model
    from draftune.reno import optimize_noise
    from draftune.report import write_report
    from draftune.rewards import Reward, load_reward
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
    "mix_loras",
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
    "distill_lora": "distilling",
    "export_lora": "export",
    "load_lora": "lora",
    "load_method": "methods",
    "load_model": "models",
    "load_reward": "rewards",
    "mix_loras": "mixing",
    "optimize_noise": "reno",
    "sample_guided": "guides",
    "save_lora": "lora",
    "train": "training",
    "tune_knobs": "knobs",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'draftune' has no attribute {name!r}")
    return getattr(import_module(f"draftune.{HOMES[name]}"), name)
