"""Check of the LoRA's gradient in the first updates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from draftune.errors import DraftuneError

AUDITED = 3
"""Updates after which every LoRA tensor must have had a gradient. In the first one A has none, since B is 0."""


class GradientCheck:
    """Check that every trainable tensor gets a gradient in the first updates.

    Args:
        parameters: The trainable tensors by name.
        updates: Number of updates after which none may be left.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], updates: int = AUDITED) -> None:
        self.waiting = dict(parameters)
        self.remaining = updates

    def check(self) -> None:
        """Check the gradients after a backward pass. Raises DraftuneError that names tensors without gradient."""
        if not self.waiting:
            return
        self.waiting = {n: p for n, p in self.waiting.items() if p.grad is None or not p.grad.any()}
        self.remaining -= 1
        if self.waiting and self.remaining <= 0:
            names = ", ".join(list(self.waiting)[:3])
            raise DraftuneError(
                f"{len(self.waiting)} trainable tensors got no gradient in the first updates, such as {names}: the "
                "image does not depend on them, or a layer stops the gradient (see lora_target_modules)"
            )
