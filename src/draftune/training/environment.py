"""What a run was made with, so that it can be made again."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from draftune import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def environment(device: torch.device) -> dict[str, str]:
    """The versions of everything that takes part, and the device."""
    found = {"draftune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {**found, "platform": platform.platform(), "device": f"{device.type} ({name})"}
