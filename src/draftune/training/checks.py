"""Check of the LoRA's gradient in the first updates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from draftune.errors import DraftuneError

AUDITED = 3
"""Updates after which there is no excuse: a LoRA's A has no gradient at the very first, since its B is zero there."""


class GradientAudit:
    """Follows the first updates until every trainable tensor has had a gradient."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], updates: int = AUDITED) -> None:
        self.waiting = dict(parameters)
        self.remaining = updates

    def check(self) -> None:
        """To be called after each backward pass. Raises DraftuneError that names the tensors left behind."""
        if not self.waiting:
            return
        self.waiting = {n: p for n, p in self.waiting.items() if p.grad is None or not p.grad.any()}
        self.remaining -= 1
        if self.waiting and self.remaining <= 0:
            names = ", ".join(list(self.waiting)[:3])
            raise DraftuneError(
                f"{len(self.waiting)} trainable tensors got no gradient in the first updates, such as {names}: they "
                "do not take part in the image, or the gradient is cut before them (see lora_targets)"
            )
