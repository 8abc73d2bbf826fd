"""A small network that learns beside the model: its weights and Adam's memory of them, in tensors alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call


def missed(expected: Tensor, scores: Tensor) -> Tensor:
    """sum over s of mean over b of (expected[b, s] - scores[b])^2, of what was expected [B, S] of scores [B]."""
    return (expected - scores[:, None]).square().mean(0).sum()


class Learner(nn.Module):
    """A network and torch's Adam on it, whose `state_dict` is all that it carries; it goes to a device as a whole.

    `network` gives random weights in its constructor, which are drawn from `seed` alone.
    """

    count: Tensor

    def __init__(self, network: Callable[[], nn.Module], learning_rate: float, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = network()
        # Copies, so that the running means are where the weights are.
        self.first, self.second = copy.deepcopy(self.network), copy.deepcopy(self.network)
        self.learning_rate = learning_rate
        self.register_buffer("count", torch.zeros(()))
        with torch.no_grad():
            for moment in (*self.first.parameters(), *self.second.parameters()):
                moment.zero_()
        self.requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the network says; gradient flows to the inputs alone."""
        found: Tensor = self.network(*inputs)
        return found

    def learn(self, loss: Callable[[Callable[..., Tensor]], Tensor]) -> float:
        """One step of Adam that makes the loss of the network smaller; what the loss was."""
        weights = {name: weight.detach().requires_grad_() for name, weight in self.network.named_parameters()}
        with torch.enable_grad():
            found = loss(lambda *inputs: functional_call(self.network, weights, inputs))
            gradients = torch.autograd.grad(found, list(weights.values()))
        own = list(self.network.parameters())
        moments = zip(self.first.parameters(), self.second.parameters(), strict=True)
        adam = torch.optim.Adam(own, self.learning_rate)
        for weight, gradient, (first, second) in zip(own, gradients, moments, strict=True):
            weight.grad = gradient
            adam.state[weight] = {"step": self.count.cpu().clone(), "exp_avg": first, "exp_avg_sq": second}
        adam.step()
        adam.zero_grad()
        self.count += 1
        return float(found.detach())
