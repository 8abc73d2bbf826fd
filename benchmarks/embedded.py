"""Settings of the embedded model in the benchmarks: sampling and training as with a model that is not distilled.

By default the embedded model samples in two steps without guidance, which has hardly a prefix to measure.
"""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "gradient_checkpointing": "blocks",
}


def settings_for(model: str) -> dict[str, Any]:
    """Return the settings of a benchmark for a model: its recommended ones, except for the embedded model."""
    return SETTINGS if model == "emoji" else {}
