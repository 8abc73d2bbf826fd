"""Shared by the recipes: device, learning-rate schedule, progress bar, checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import ResNetForImageClassification, ViTImageProcessor


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def to_float(images: np.ndarray) -> torch.Tensor:
    """Convert uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Return the learning rate: linear warmup to `peak`, then a cosine to 2% of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def uniform(count: int, low: float, high: float) -> torch.Tensor:
    """Sample a uniform random number for each of `count` images [count, 1, 1, 1]."""
    return torch.empty(count, 1, 1, 1).uniform_(low, high)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vertical and horizontal differences of neighboring pixels."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def edge_energy(images: torch.Tensor) -> float:
    """Return the mean squared difference of neighboring pixels."""
    return sum(difference.square().mean().item() for difference in edges(images))


@torch.no_grad()
def update_average(average: torch.nn.Module, module: torch.nn.Module, step: int) -> None:
    """Update the exponential moving average with a decay that grows to 0.999."""
    rate = 1 - min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), rate)


def percent(correct: torch.Tensor) -> str:
    """Format the fraction of true values."""
    return f"{100 * correct.float().mean():.1f} %"


def export_resnet(network: ResNetForImageClassification, folder: Path, size: int) -> None:
    """Save a network of square images in half precision with its image processor."""
    network.half().save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": size, "width": size}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    # Half precision is only for the file: transformers loads the dtype in the config.
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2) + "\n")


class Progress:
    """Iterate over the steps from `start` to `stop` with a progress bar of running means."""

    def __init__(self, start: int, stop: int) -> None:
        self.bar = tqdm(range(start, stop), initial=start, total=stop, mininterval=10)
        self.means: dict[str, float] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(self.bar)

    def show(self, **values: float) -> None:
        """Update the running means of these values in the bar."""
        for key, value in values.items():
            self.means[key] = 0.98 * self.means.get(key, value) + 0.02 * value
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in self.means.items()}, refresh=False)


def save_state(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, **more) -> None:
    """Write a checkpoint atomically. `more`: further values by name."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "state.pt.tmp"
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, **more}
    torch.save(state, temporary)
    os.replace(temporary, folder / "state.pt")


def load_state(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, **more) -> int:
    """Load a checkpoint and return the next step; 0 without a checkpoint. `more`: further modules by name."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for name, other in more.items():
        other.load_state_dict(state[name])
    return state["step"]
