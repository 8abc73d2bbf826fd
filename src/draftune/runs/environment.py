"""Versions of the software and properties of the machine, for environment.json and `draftune env`."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from draftune import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
VARIABLES = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
"""Environment variables that affect speed or which files can be loaded. None of them contains a path."""


def environment(device: torch.device) -> dict[str, str]:
    """Return the versions of the software and the properties of the machine.

    The values can be published in a bug report: they contain no path, user name or host name.

    Args:
        device: The device that a run uses, or would use.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "draftune": __version__,
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": f"{device.type} ({name})",
        "cpus": str(os.cpu_count()),
        "memory": total_memory(),
        "gpus": ", ".join(gpus()) or "none",
        "cuda": torch.version.cuda or "none",
        "rocm": torch.version.hip or "none",
        "mps": "yes" if torch.backends.mps.is_available() else "no",
        **{variable: os.environ.get(variable, "not set") for variable in VARIABLES},
    }


def total_memory() -> str:
    """Return the machine's memory, "unknown" without psutil."""
    try:
        import psutil
    except ImportError:
        return "unknown"
    return gibibytes(psutil.virtual_memory().total)


def installed(package: str) -> str:
    """Return the version of an installed package, "unknown" if it has no metadata."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def gpus() -> list[str]:
    """Return the name and the memory of each CUDA or ROCm GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [f"{gpu.name} ({gibibytes(gpu.total_memory)})" for gpu in properties]


def gibibytes(size: int) -> str:
    """Format a number of bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"
