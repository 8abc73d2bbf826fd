"""GGUF files of small random networks, and the same networks with the weights that these files stand for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from helpers.single_files import State, flux_of, state_of

Q4_K_BLOCK, Q4_K_BYTES = 256, 144
"""The weights of a block, and its bytes: two half-precision scales, 12 bytes of scales, 128 of 4-bit weights."""


def random_q4_k(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Random blocks of Q4_K, which the package gguf can read but not write, with weights of about 0.05."""
    blocks = shape[1] // Q4_K_BLOCK
    data = generator.integers(0, 256, (shape[0], blocks, Q4_K_BYTES), dtype=np.uint8)
    scales = generator.uniform(1e-4, 2e-4, (shape[0], blocks, 2)).astype(np.float16)
    data[..., :4] = scales.view(np.uint8).reshape(shape[0], blocks, 4)
    return data.reshape(shape[0], -1)


def write_gguf(path: Path, state: State, kinds: dict[str, str], default: str = "Q8_0") -> State:
    """Write a denoiser, and return the weights that the file stands for by gguf's own decoder.

    Args:
        path: The file.
        state: The denoiser in its original layout.
        kinds: The type of the tensors whose names end so.
        default: The type of the other matrices whose rows are long enough; the rest is F16, vectors are F32.
    """
    import gguf
    from gguf.quants import dequantize, quantize

    writer, generator = gguf.GGUFWriter(path, "flux"), np.random.default_rng(0)
    known = {}
    for name, tensor in state.items():
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), None)
        if kind is None:
            kind = "F32" if tensor.ndim < 2 else default if tensor.shape[-1] % 32 == 0 else "F16"
        values, type_ = tensor.numpy(), gguf.GGMLQuantizationType[kind]
        data = random_q4_k(tuple(values.shape), generator) if kind == "Q4_K" else quantize(values, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
        known[name] = torch.from_numpy(dequantize(data, type_).reshape(values.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return known


def as_folder(model: Path, target: Path, known: State) -> Path:
    """A copy of a saved FLUX.1 pipeline whose transformer has these weights, in the original layout."""
    shutil.copytree(model, target)
    weights = unstacked(state_of(model / "transformer"), known)
    save_file(weights, target / "transformer" / "diffusion_pytorch_model.safetensors")
    return target


def unstacked(plain: State, known: State) -> State:
    """Invert `flux_of`: find where each weight of the pipeline went by numbering them."""
    start, numbered = 1, {}
    for key, value in plain.items():
        numbered[key] = torch.arange(start, start + value.numel(), dtype=torch.float64).reshape(value.shape)
        start += value.numel()
    flat = torch.zeros(start, dtype=torch.float32)
    for key, places in flux_of(numbered).items():
        flat[places.long().flatten()] = known[key].float().flatten()
    return {key: flat[places.long()] for key, places in numbered.items()}
