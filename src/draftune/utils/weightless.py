"""Build networks from their configs alone: their tensors are fake, take no memory, and have shapes but no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

_mode: ContextVar[FakeTensorMode | None] = ContextVar("weightless", default=None)


def main_memory() -> torch.device:
    """Return the device of tensors that are stored in main memory: in a count, where the CPU is the device, "meta"."""
    return torch.device("cpu" if fake_mode() is None else "meta")


@contextmanager
def without_weights() -> Iterator[FakeTensorMode]:
    """Let all functions that load networks build them from their configs, with fake tensors of one mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    token, apply = _mode.set(mode), nn.Module._apply
    # torch's own replaces a parameter by swapping it with another one, which it refuses for fake tensors.
    nn.Module._apply = apply_to_tables  # type: ignore[method-assign]
    try:
        yield mode
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]
        _mode.reset(token)


def apply_to_tables(network: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace all parameters and buffers of a network by the function's results, as `nn.Module._apply` does."""
    replaced: dict[int, Tensor] = {}  # tied weights stay tied
    for module in network.modules():
        tables: Any = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    with torch.no_grad():
                        new = function(tensor)
                    wrapped = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if wrapped else new
                table[name] = replaced[id(tensor)]
    return network


def fake_mode() -> FakeTensorMode | None:
    """Return the mode of the fake tensors inside `without_weights`, else None."""
    return _mode.get()


def from_config(cls: Any, folder: Path) -> nn.Module:
    """Build a network of diffusers or transformers from the config in a folder, without its weights."""
    if hasattr(cls, "load_config"):  # diffusers
        network: nn.Module = cls.from_config(cls.load_config(folder))
        return network
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    # Some initializations read values, which fake tensors don't have.
    with no_init_weights():
        if cls.config_class is None:  # transformers' Auto classes
            from transformers import AutoConfig

            network = cls.from_config(AutoConfig.from_pretrained(folder))
        else:
            network = cls(cls.config_class.from_pretrained(folder))
    return network


def make_fake(network: nn.Module) -> None:
    """Replace all parameters and buffers of a network by fake tensors; call inside a FakeTensorMode."""
    apply_to_tables(network, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device))


def without_computation(encoder: Any) -> Any:
    """Let a text encoder of transformers return zeros of the right shapes, and return it.

    Text encoders run on real token ids while their weights are fake.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    config = encoder.config.get_text_config()
    projection = getattr(encoder, "text_projection", None)

    def forward(input_ids: Tensor, *args: Any, **options: Any) -> Any:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(1, dtype=encoder.dtype).expand(*shape)

        hidden = zeros(*input_ids.shape, config.hidden_size)
        states = (hidden,) * (config.num_hidden_layers + 1)
        if projection is None:
            pooled = zeros(len(input_ids), config.hidden_size)
            return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, hidden_states=states)
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        embeds = zeros(len(input_ids), config.projection_dim)
        return CLIPTextModelOutput(text_embeds=embeds, last_hidden_state=hidden, hidden_states=states)

    encoder.forward = forward
    return encoder
