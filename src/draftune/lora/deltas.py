"""LoRA algebra: what a LoRA adds to each layer's weight, scaled, summed, truncated, written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.lora.files import GRID_SAID, AdapterConfig, write_lora
from draftune.lora.names import TEXT_ENCODER


@dataclass(frozen=True)
class LoRADelta:
    """The change of one layer's weight, up @ down, with the LoRA's strength alpha / rank in `up`.

    down: [rank, in, ...], up: [out, rank, 1, ...], float32.
    """

    down: Tensor
    up: Tensor
    low_rank: bool = True
    """Whether a LoRA file can hold it. False for DoRA, whose change of a weight has full rank."""

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, [out, in, ...]."""
        return len(self.up), *self.down.shape[1:]

    @property
    def change(self) -> Tensor:
        """The change of the weight, [out, in, ...]."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(self.shape)

    @classmethod
    def from_change(cls, change: Tensor) -> LoRADelta:
        """Factorize a full-rank change of a weight exactly, with an identity as the larger of the two factors."""
        size, matrix, ones = change.shape, change.flatten(1), (1,) * (change.ndim - 2)
        if matrix.shape[0] <= matrix.shape[1]:
            return cls(change, torch.eye(size[0]).reshape(size[0], size[0], *ones), low_rank=False)
        identity = torch.eye(matrix.shape[1]).reshape(matrix.shape[1], *size[1:])
        return cls(identity, matrix.reshape(size[0], -1, *ones), low_rank=False)

    def scaled(self, scale: float) -> LoRADelta:
        return replace(self, up=scale * self.up)

    def padded(self, rank: int) -> LoRADelta:
        """Pad with ranks of zeros, which add nothing."""
        more = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(more, *self.down.shape[1:])])
        up = torch.cat([self.up, self.up.new_zeros(len(self.up), more, *self.up.shape[2:])], 1)
        return replace(self, down=down, up=up)

    def concat(self, other: LoRADelta) -> LoRADelta:
        """Add two changes of one weight exactly: the ranks are concatenated."""
        down, up = torch.cat([self.down, other.down]), torch.cat([self.up, other.up], 1)
        return LoRADelta(down, up, self.low_rank and other.low_rank)

    def truncated(self, rank: int) -> LoRADelta:
        """Return the best approximation of at most this rank in the Frobenius norm (truncated SVD).

        Each singular value is shared out evenly between down and up.
        """
        # Of two thin matrices, so that the whole change is never made.
        outer, up = torch.linalg.qr(self.up.flatten(1))
        inner, down = torch.linalg.qr(self.down.flatten(1).T)
        left, values, right = torch.linalg.svd(up @ down.T, full_matrices=False)
        root = values[:rank].sqrt()
        count = len(root)
        return LoRADelta(
            (root[:, None] * right[:rank] @ inner.T).reshape(count, *self.down.shape[1:]),
            (outer @ left[:, :rank] * root).reshape(len(self.up), count, *self.up.shape[2:]),
        )


@dataclass
class LoRADeltas:
    """The changes of all layers that a LoRA adapts, by PART.LAYER: "unet.conv_in", "text_encoder.….q_proj"."""

    layers: dict[str, LoRADelta]
    base_model: str | None = None
    grid: str = ""
    """The sampler settings in the file's metadata, as JSON."""

    def of_part(self, part: str) -> dict[str, LoRADelta]:
        """Return the changes of one network, by the layer's name in that network."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): d for name, d in self.layers.items() if name.startswith(prefix)}

    @property
    def parts(self) -> list[str]:
        """The networks that are adapted, such as "unet" and "text_encoder", the denoiser first."""
        return sorted({name.partition(".")[0] for name in self.layers}, key=lambda p: (p.startswith(TEXT_ENCODER), p))

    def scaled(self, scale: float) -> LoRADeltas:
        """Return the LoRA at this strength."""
        return replace(self, layers={name: layer.scaled(scale) for name, layer in self.layers.items()})

    def truncated(self, rank: int) -> LoRADeltas:
        """Return the best approximation of at most this rank, layer by layer."""
        return replace(self, layers={name: layer.truncated(rank) for name, layer in self.layers.items()})

    def padded(self, rank: int) -> LoRADeltas:
        """Pad every layer to this rank."""
        return replace(self, layers={name: layer.padded(rank) for name, layer in self.layers.items()})

    def plus(self, other: Mapping[str, LoRADelta]) -> LoRADeltas:
        """Add the changes of another LoRA of the same base model exactly."""
        layers = dict(self.layers)
        for name, layer in other.items():
            layers[name] = layers[name].concat(layer) if name in layers else layer
        return replace(self, layers=layers)

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
        """Return PART.LAYER.lora_A.weight and PART.LAYER.lora_B.weight, and the one rank of all layers.

        The rank equals alpha. That is what every reader understands: diffusers 0.35 mistakes the strength of layers
        whose ranks differ.

        Raises:
            DraftuneError: a change that no LoRA file holds, or a number that `dtype` can't hold.
        """
        if whole := [name for name, layer in self.layers.items() if not layer.low_rank]:
            raise DraftuneError(
                f"the LoRA is a DoRA in {len(whole)} layers, such as {whole[0]}: the change of a weight has full rank, "
                "which a LoRA file can't hold; export it with --format merged and go on from that model"
            )
        rank = max(layer.rank for layer in self.layers.values())
        tensors = {}
        for name, layer in self.padded(rank).layers.items():
            for half, tensor in (("A", layer.down), ("B", layer.up)):
                tensors[f"{name}.lora_{half}.weight"] = cast = tensor.to(dtype)
                if not cast.isfinite().all():
                    raise DraftuneError(f"the LoRA's weights of {name} are not finite in {cast.dtype}")
        return tensors, rank

    def write(self, folder: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
        """Write FOLDER/pytorch_lora_weights.safetensors in diffusers' format; returns its path."""
        tensors, rank = self.tensors(dtype)
        if self.base_model:
            metadata["base_model"] = self.base_model
        if self.grid:
            metadata[GRID_SAID] = self.grid
        configs = {}
        for part in self.parts:
            names = self.of_part(part)
            if part.startswith(TEXT_ENCODER):
                # By their ends: the names before those differ from version to version of transformers.
                names = {name.rpartition(".")[2]: delta for name, delta in names.items()}
            configs[part] = AdapterConfig(rank, rank, sorted(names))
        return write_lora(folder, tensors, configs, metadata)


def deltas_of_peft(tensors: Mapping[str, Tensor], scale: float) -> dict[str, LoRADelta]:
    """Convert LAYER.lora_A.weight and LAYER.lora_B.weight, which act at `scale`, to changes by LAYER."""
    names = sorted({key.rpartition(".lora_")[0] for key in tensors})
    halves = {name: [tensors[f"{name}.lora_{half}.weight"].detach().float().cpu() for half in "AB"] for name in names}
    return {name: LoRADelta(down, up).scaled(scale) for name, (down, up) in halves.items()}
