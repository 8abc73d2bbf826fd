"""Count the memory of a run from the configs of its model and its rewards alone, without weights and arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from draftune.settings import Settings
from draftune.training.trainer import Trainer
from draftune.utils.memory import PeakMemory, tensors
from draftune.utils.tensors import stored_tensors
from draftune.utils.weightless import make_fake, without_weights

aten = torch.ops.aten
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
"""Operations whose second argument is a list of indices."""


class MemoryCount(NamedTuple):
    """Bytes of a run.

    Attributes:
        networks: All networks that are on the device during training, the LoRA included.
        optimizer: The two moments of AdamW for each LoRA tensor.
        update: Peak of an update.
        sampling: Peak of sampling a batch for a grid.
    """

    networks: int
    optimizer: int
    update: int
    sampling: int

    @property
    def peak(self) -> int:
        """The largest number of bytes beside the networks."""
        return self.optimizer + max(self.update, self.sampling)


def count_run(settings: Settings) -> MemoryCount:
    """Count a run. Of models and rewards on the hub only the configs and tokenizers are downloaded.

    All networks are built from their configs with fake tensors (torch's FakeTensorMode). All operations of an update
    are dispatched and live bytes are summed, but nothing is computed.

    Raises:
        DraftuneError: as `train` would.
    """
    with without_weights() as mode:
        plain: dict[str, Any] = {"compile": False, "prefix_compile": False, "prefix_cache": ""}
        if settings.mixed_precision == "fp16":
            plain["mixed_precision"] = "bf16"  # of the same size; a CPU does not train in fp16
        trainer = Trainer(settings=replace(settings, device="cpu", **plain))
        return count(trainer, mode)


def count(trainer: Trainer, mode: Any) -> MemoryCount:
    """Count the updates of a trainer whose networks have fake or real tensors; all become fake tensors of the mode."""
    steps, s = trainer.train_step, trainer.settings
    steps.folder = None
    networks = network_bytes(trainer)
    moments = 2 * sum(parameter.nbytes for parameter in steps.parameters.values())
    with mode, Numberless() as memory:
        for network in trainer_networks(trainer):
            make_fake(network)
        steps.parameters = {n: p for n, p in trainer.model.denoiser.named_parameters() if p.requires_grad}
        steps.optimizer.param_groups[0]["params"] = list(steps.parameters.values())
        # A generator on fake tensors draws no numbers.
        needed = s.batch_size * s.gradient_accumulation_steps * s.prefix_reuse_steps
        steps.prompt_sampler.queue = list(islice(cycle(range(len(trainer.prompts))), needed))
        memory.live = memory.peak = 0
        steps.run(1)
        update, before = memory.peak, memory.live
        memory.peak = before
        prompts = list(islice(cycle(trainer.prompts), s.batch_size))
        trainer.context.sample_images(prompts, range(s.batch_size))
        return MemoryCount(networks, moments, update, memory.peak - before)


def trainer_networks(trainer: Trainer) -> list[nn.Module]:
    """Return every network of a training run: the model's and those of its rewards."""
    c = trainer.context
    earlier = c.continued_run.reward if c.continued_run is not None else None
    return [*c.model.all_modules, *filter(None, [c.reward, c.eval_rewards, earlier])]


def network_bytes(trainer: Trainer) -> int:
    """Return the bytes of every network on the device during training, the LoRA included."""
    # The type alone: a tensor's device has an index that accelerate's device lacks.
    device = trainer.context.accelerator.device.type
    return storage_bytes(
        tensor
        for network in trainer_networks(trainer)
        for parameter in (*network.parameters(), *network.buffers())
        for tensor in stored_tensors(parameter)
        if tensor.device.type == device
    )


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Numberless(PeakMemory):
    """Count memory, and return 1 where a number of a fake tensor is read: all values are finite, no gradient is 0.

    Operations on real tensors alone are computed, and so are tables of integers: positions and the lengths of prompts,
    by which some networks slice. A mask of what differs from a number is real, and true everywhere.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = list(tensors((args, kwargs)))
        if func is aten.ne.Scalar and isinstance(args[0], FakeTensor):
            inputs, func, args, kwargs = [], aten.ones.default, (list(args[0].shape),), {"dtype": torch.bool}
        if not any(isinstance(tensor, FakeTensor) for tensor in inputs) and (
            inputs or makes_integers(func, args, kwargs)
        ):
            with unset_fake_temporarily():
                return super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        if func.overloadpacket in INDEXED:
            args = args[0], [index for mask in args[1] for index in places(mask)], *args[2:]
        return super().__torch_dispatch__(func, types, args, kwargs)


def places(index: Any) -> Sequence[Any]:
    """Return what a tensor is indexed by instead of a mask of real values, which fake tensors do not take."""
    if not isinstance(index, torch.Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)


def makes_integers(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Return whether an operation without input tensors makes a table of integers or booleans."""
    dtype = (kwargs or {}).get("dtype")
    if dtype is None:
        return func.overloadpacket is aten.arange and all(isinstance(n, int) for n in args)
    return not (dtype.is_floating_point or dtype.is_complex)
