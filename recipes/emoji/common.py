"""What the recipes share: device, schedule, progress, checkpoints, averaged weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def uniform(count: int, low: float, high: float) -> torch.Tensor:
    """One random number for each of `count` pictures, [count, 1, 1, 1]."""
    return torch.empty(count, 1, 1, 1).uniform_(low, high)


def percent(right: torch.Tensor) -> str:
    return f"{100 * right.float().mean():.1f} %"


class Progress:
    """Steps from `start` to `stop` with a bar and a running mean of what `show` is given."""

    def __init__(self, start: int, stop: int) -> None:
        self.bar = tqdm(range(start, stop), initial=start, total=stop, mininterval=10)
        self.means: dict[str, float] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(self.bar)

    def show(self, **values: float) -> None:
        for key, value in values.items():
            self.means[key] = 0.98 * self.means.get(key, value) + 0.02 * value
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in self.means.items()}, refresh=False)


def save_state(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "state.pt.tmp"
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, **more}
    torch.save(state, temporary)
    os.replace(temporary, folder / "state.pt")


def load_state(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, **more) -> int:
    """The step to go on from; 0 without a checkpoint. `more` are modules saved beside the first."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for name, other in more.items():
        other.load_state_dict(state[name])
    return state["step"]
