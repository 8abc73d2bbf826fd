"""A check that a method without a reward gradient reaches the top of a reward with steps."""

from __future__ import annotations

import torch
from test_gradients import Gaussian, batch_of
from torch import Tensor

from draftune.methods import Method
from draftune.sampling.schedule import Schedule


def check_it_climbs(method: Method, schedule: Schedule, images_per_prompt: int) -> None:
    """Steps of a quarter with their top at 0.5, from a mean of 0.3 + 2: nothing here can be differentiated."""
    data = Gaussian()
    data.mu.data += 2.0
    optimizer, means = torch.optim.Adam([data.mu], lr=0.1), []

    def reward(x: Tensor) -> Tensor:
        score = -((4 * x.detach().flatten()).round() / 4 - 0.5).abs()
        means.append(float(score.mean()))
        return score

    for i in range(80):
        noise = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        batch = batch_of(data.denoise, schedule, None, noise, reward, i)
        batch.images_per_prompt, batch.parameters = images_per_prompt, {"mu": data.mu}
        for losses in method.losses_per_step([batch]):
            optimizer.zero_grad()
            for loss in losses:
                loss.backward()
            optimizer.step()
    assert means[0] < -1.5
    assert sum(means[-5:]) / 5 > -0.7  # what the spread of the images themselves leaves
    assert abs(float(data.mu.detach()) - 0.5) < 0.3
