"""Low-rank algebra: scale, add, pad, truncate and write the weight changes of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.lora.files import AdapterConfig, write_lora
from draftune.lora.metadata import SAMPLER_METADATA, steps_metadata
from draftune.lora.names import TEXT_ENCODER
from draftune.sampling.step_range import StepRange
from draftune.utils.model_options import NO_OPTIONS, ModelOptions


@dataclass(frozen=True)
class LoRADelta:
    """The change of one layer's weight: dW = up @ down.

    Attributes:
        down: A, `[rank, in, ...]`, float32.
        up: (alpha / rank) * B, `[out, rank, 1, ...]`, float32.
        low_rank: Whether a LoRA file can represent the change. False for DoRA, whose changes have full rank.
    """

    down: Tensor
    up: Tensor
    low_rank: bool = True

    @property
    def rank(self) -> int:
        """The rank."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, `[out, in, ...]`."""
        return len(self.up), *self.down.shape[1:]

    @property
    def change(self) -> Tensor:
        """The change of the weight, `[out, in, ...]`."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(self.shape)

    @classmethod
    def from_change(cls, change: Tensor) -> LoRADelta:
        """Represent a full-rank change exactly, with an identity matrix as one factor."""
        size, matrix, ones = change.shape, change.flatten(1), (1,) * (change.ndim - 2)
        if matrix.shape[0] <= matrix.shape[1]:
            return cls(change, torch.eye(size[0]).reshape(size[0], size[0], *ones), low_rank=False)
        identity = torch.eye(matrix.shape[1]).reshape(matrix.shape[1], *size[1:])
        return cls(identity, matrix.reshape(size[0], -1, *ones), low_rank=False)

    def scaled(self, scale: float) -> LoRADelta:
        """Return scale * dW."""
        return replace(self, up=scale * self.up)

    def padded(self, rank: int) -> LoRADelta:
        """Pad both factors with zeros to this rank; dW does not change."""
        more = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(more, *self.down.shape[1:])])
        up = torch.cat([self.up, self.up.new_zeros(len(self.up), more, *self.up.shape[2:])], 1)
        return replace(self, down=down, up=up)

    def concat(self, other: LoRADelta) -> LoRADelta:
        """Return the exact sum of two changes of one weight: the factors are concatenated along the rank."""
        down, up = torch.cat([self.down, other.down]), torch.cat([self.up, other.up], 1)
        return LoRADelta(down, up, self.low_rank and other.low_rank)

    def truncated(self, rank: int) -> LoRADelta:
        """Return the best approximation of at most this rank in the Frobenius norm (truncated SVD).

        Both factors are scaled by the square roots of the singular values.
        """
        # QR of the two factors, so that the full matrix is never computed.
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
    """The weight changes of all layers of a LoRA.

    Attributes:
        layers: By PART.LAYER, such as "unet.conv_in" or "text_encoder.….q_proj".
        base_model: The name of the base model, if known.
        grid: The timestep settings of the file's metadata, as JSON; "" if there are none.
        lora_steps: The sampling steps on which the LoRA is active.
        base_options: Where the base model's files come from.

    Raises:
        DraftuneError: The LoRA is active on a range of steps and adapts a text encoder, which runs before all steps.
    """

    layers: dict[str, LoRADelta]
    base_model: str | None = None
    grid: str = ""
    lora_steps: StepRange = field(default_factory=StepRange)
    base_options: ModelOptions = NO_OPTIONS

    def __post_init__(self) -> None:
        if not self.lora_steps.is_all and any(part.startswith(TEXT_ENCODER) for part in self.parts):
            raise DraftuneError(
                f"the LoRA is active on the steps {self.lora_steps} only (lora_steps), but its text encoder layers act "
                "on all steps: leave them out (--skip-text-encoder-lora)"
            )

    def of_part(self, part: str) -> dict[str, LoRADelta]:
        """Return the changes of one network, by the layer's name in that network."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): d for name, d in self.layers.items() if name.startswith(prefix)}

    @property
    def parts(self) -> list[str]:
        """The names of the adapted networks, such as "unet" and "text_encoder", the denoiser first."""
        return sorted({name.partition(".")[0] for name in self.layers}, key=lambda p: (p.startswith(TEXT_ENCODER), p))

    def scaled(self, scale: float) -> LoRADeltas:
        """Return the LoRA with all changes multiplied by `scale`."""
        return replace(self, layers={name: layer.scaled(scale) for name, layer in self.layers.items()})

    def truncate_rank(self, rank: int) -> LoRADeltas:
        """Return the best approximation of at most this rank, layer by layer."""
        return replace(self, layers={name: layer.truncated(rank) for name, layer in self.layers.items()})

    def padded(self, rank: int) -> LoRADeltas:
        """Pad every layer to this rank."""
        return replace(self, layers={name: layer.padded(rank) for name, layer in self.layers.items()})

    def add(self, other: Mapping[str, LoRADelta]) -> LoRADeltas:
        """Return the exact sum with another LoRA of the same base model."""
        layers = dict(self.layers)
        for name, layer in other.items():
            layers[name] = layers[name].concat(layer) if name in layers else layer
        return replace(self, layers=layers)

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
        """Convert to the tensors of a LoRA file, with one rank for all layers.

        Layers are padded to the largest rank, and alpha = rank: diffusers 0.35 applies a wrong scale to layers whose
        ranks differ.

        Returns:
            The tensors by PART.LAYER.lora_A.weight and PART.LAYER.lora_B.weight, and the rank.

        Raises:
            DraftuneError: See `factors`.
        """
        rank = max(layer.rank for layer in self.layers.values())
        return self.padded(rank).factors(dtype), rank

    def factors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return both factors of every layer, by PART.LAYER.lora_A.weight and PART.LAYER.lora_B.weight.

        Raises:
            DraftuneError: A change has full rank, or a value overflows in `dtype`.
        """
        if full_rank := [name for name, layer in self.layers.items() if not layer.low_rank]:
            raise DraftuneError(
                f"the LoRA is a DoRA in {len(full_rank)} layers, such as {full_rank[0]}: its change of a weight has "
                "full rank, which a LoRA file can't represent; export it with --format merged and continue from that "
                "model"
            )
        tensors = {}
        for name, layer in self.layers.items():
            for half, tensor in (("A", layer.down), ("B", layer.up)):
                tensors[f"{name}.lora_{half}.weight"] = cast = tensor.to(dtype)
                if not cast.isfinite().all():
                    raise DraftuneError(f"the LoRA's weights of {name} are not finite in {cast.dtype}")
        return tensors

    def write(self, folder: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
        """Write FOLDER/pytorch_lora_weights.safetensors in diffusers' format and return its path."""
        tensors, rank = self.tensors(dtype)
        if self.base_model:
            metadata |= {"base_model": self.base_model, **self.base_options.metadata()}
        if self.grid:
            metadata[SAMPLER_METADATA] = self.grid
        metadata |= steps_metadata(self.lora_steps)
        configs = {}
        for part in self.parts:
            names = self.of_part(part)
            if part.startswith(TEXT_ENCODER):
                # Only the last part of the name: the rest differs between versions of transformers.
                names = {name.rpartition(".")[2]: delta for name, delta in names.items()}
            configs[part] = AdapterConfig(rank, rank, sorted(names))
        return write_lora(folder, tensors, configs, metadata)


def deltas_of_peft(tensors: Mapping[str, Tensor], scale: float) -> dict[str, LoRADelta]:
    """Convert peft's tensors LAYER.lora_A.weight and LAYER.lora_B.weight with this scale to changes by LAYER."""
    names = sorted({key.rpartition(".lora_")[0] for key in tensors})
    pairs = {name: [tensors[f"{name}.lora_{half}.weight"].detach().float().cpu() for half in "AB"] for name in names}
    return {name: LoRADelta(down, up).scaled(scale) for name, (down, up) in pairs.items()}
