"""A small network that is trained beside the model, with Adam's state in its `state_dict`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from draftune.utils.devices import fork_rng


def value_loss(expected: Tensor, scores: Tensor) -> Tensor:
    """Return sum over s of mean over b of (expected[b, s] - scores[b])^2, for expected [B, S] and scores [B]."""
    return (expected - scores[:, None]).square().mean(0).sum()


class OnlineModule(nn.Module):
    """A network with torch's Adam, whose running means are parameters: they are saved and moved with the weights.

    Args:
        network: Builds the network; its random weights depend on `seed` only.
        learning_rate: Learning rate of Adam.
        seed: Seed of the random weights.
    """

    count: Tensor

    def __init__(self, network: Callable[[], nn.Module], learning_rate: float, seed: int = 0) -> None:
        super().__init__()
        with fork_rng():
            torch.manual_seed(seed)
            self.network = network()
        # Adam's running means of gradients and squared gradients, with the names and shapes of the weights.
        self.first, self.second = copy.deepcopy(self.network), copy.deepcopy(self.network)
        self.learning_rate = learning_rate
        self.register_buffer("count", torch.zeros(()))
        with torch.no_grad():
            for moment in (*self.first.parameters(), *self.second.parameters()):
                moment.zero_()
        self.requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the network's output; the gradient flows to the inputs only."""
        output: Tensor = self.network(*inputs)
        return output

    def learn(self, loss: Callable[[Callable[..., Tensor]], Tensor]) -> float:
        """Make one step of Adam on `loss(network)` and return the loss before it."""
        weights = {name: weight.detach().requires_grad_() for name, weight in self.network.named_parameters()}
        with torch.enable_grad():
            value = loss(lambda *inputs: functional_call(self.network, weights, inputs))
            gradients = torch.autograd.grad(value, list(weights.values()))
        own = list(self.network.parameters())
        moments = zip(self.first.parameters(), self.second.parameters(), strict=True)
        adam = torch.optim.Adam(own, self.learning_rate)
        for weight, gradient, (first, second) in zip(own, gradients, moments, strict=True):
            weight.grad = gradient
            adam.state[weight] = {"step": self.count.cpu().clone(), "exp_avg": first, "exp_avg_sq": second}
        adam.step()
        adam.zero_grad()
        self.count += 1
        return float(value.detach())
