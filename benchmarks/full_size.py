"""Measure time and memory of an update at published model sizes, with random weights or with fake tensors.

    python benchmarks/full_size.py real sd14 mixed_precision=bf16 num_inference_steps=2
    python benchmarks/full_size.py count sdxl method='draft_k(k=5)' batch_size=4
    python benchmarks/full_size.py count flux --keep-text-encoders mixed_precision=bf16
    python benchmarks/full_size.py table sd14
    python benchmarks/full_size.py presets

Any setting of `draftune train` can be given. `real` runs updates with draftune's trainer. `count` runs the same trainer
on fake tensors (torch's FakeTensorMode): all operations are dispatched and live bytes are summed, but nothing is
computed, so a row takes seconds. Both count memory as `draftune preflight` does on a CPU. `count` frees the text
encoders before, as a run on a model's folder does. With `--keep-text-encoders` they stay, and every update encodes its
prompts.
`table` counts the rows of docs/explanation/memory-and-time.md, `presets` those of the presets.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import itertools
import json
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from diffusers import AutoencoderTiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from architectures import HUB, PIPELINES, ViTH
from draftune.models import DiffusionModel, load_model
from draftune.models.prompt_embeddings import PromptEmbeddings, mapped, text_encoders
from draftune.presets import PRESETS, read_yaml
from draftune.training.memory_count import MemoryCount, Numberless, network_bytes
from draftune.training.memory_count import count as counted
from draftune.training.trainer import Trainer
from draftune.utils.devices import DTYPES
from draftune.utils.memory import peak_memory
from draftune.utils.weightless import make_fake, without_weights

PROMPTS = ["cat face", "pizza", "red apple", "rocket"]
# Memory does not depend on the number of prefix steps, so that one is enough.
DEFAULTS: dict[str, Any] = {"method": "draft_k(k=1)", "batch_size": 1, "guidance_scale": 7.5, "num_inference_steps": 2}
SIZES = {"sd14": (512, 768, 1024), "sdxl": (768, 1024)}


@contextmanager
def trainer(model: str, fill: bool, settings: Mapping[str, Any], keep: bool = False) -> Iterator[Trainer]:
    """Yield a trainer for a model of PIPELINES. Default reward: ViT-H. Without `fill` no weights are written.

    `keep`: whether the text encoders stay in memory and encode the prompts of every update.
    """
    with TemporaryDirectory() as folder:
        values = {**DEFAULTS, "prompts": PROMPTS, **settings, "output": f"{folder}/run", "device": "cpu"}
        if values.get("tiny_decoder"):
            values["tiny_decoder"] = f"{folder}/small"
            AutoencoderTiny().save_pretrained(f"{folder}/small")
        reward = values.pop("reward", None) or ViTH(fill)
        dtype = DTYPES[values.get("mixed_precision", "no")] or torch.float32
        loaded = load_model(PIPELINES[model](dtype, fill))
        if not fill:
            loaded.embeddings = Kept(loaded) if keep else freed(loaded)
        made = Trainer(loaded, reward, **values)
        if keep:
            made.model.embeddings = None
        made.train_step.folder = None
        yield made


class Kept(PromptEmbeddings):
    """Encode nothing in advance."""

    def prepare(self, *args: Any, **options: Any) -> None:
        """Leave the text encoders where they are."""


def freed(model: DiffusionModel) -> PromptEmbeddings:
    """Return embeddings of zeros for a model, whose text encoders are removed, as in a run on a model's folder."""
    pipeline, encode, mode = model.pipeline, model.encode, FakeTensorMode()
    encoders = text_encoders(pipeline)
    with mode:
        for part in encoders.values():
            make_fake(part)

    def put(parts: Mapping[str, nn.Module]) -> None:
        for name, part in parts.items():
            setattr(pipeline, name, part)

    def zeros(*args: Any) -> Any:
        empty = text_encoders(pipeline)
        put(encoders)
        with mode, Numberless():
            condition = encode(*args)
        put(empty)
        return mapped(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), condition)

    put({name: nn.Module() for name in encoders})
    model.encode = zeros  # type: ignore[method-assign]
    return PromptEmbeddings(model, dict.fromkeys(encoders, nn.Module))


def real(model: str, settings: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Return the first update's peak memory, the process's peak, and wall and CPU seconds of each update."""
    with trainer(model, True, settings) as made:
        result: dict[str, Any] = {"held": network_bytes(made), "rss_before": rss()}
        start = time.perf_counter(), time.process_time()
        result["peak"] = peak_memory(lambda: made.train_step.run(1))
        times = []
        for i in range(rounds):
            if i:
                made.train_step.run(1 + i)
            now = time.perf_counter(), time.process_time()
            times.append([round(b - a, 1) for a, b in zip(start, now, strict=True)])
            start = now
        return {**result, "rss": rss(), "times": times}


def count(model: str, settings: Mapping[str, Any], keep: bool = False) -> dict[str, Any]:
    """Return the bytes of the networks, the peaks of an update and of sampling a batch, and the optimizer state."""
    with trainer(model, False, settings, keep) as made, without_weights() as mode:
        return counted(made, mode)._asdict()


def rss() -> int:
    """Return the peak resident set size of this process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(what: str, model: str, settings: Mapping[str, Any], rounds: int = 1, keep: bool = False) -> dict[str, Any]:
    """Measure one row and print it as a line of JSON."""
    try:
        result = real(model, settings, rounds) if what == "real" else count(model, settings, keep)
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps({"what": what, "model": model, **settings, **result}), flush=True)
    return result


def table(model: str, keep: bool = False) -> None:
    """Count every row of one model's tables."""
    for cell in cells(model):
        measure("count", model, {"mixed_precision": "bf16", **cell}, keep=keep)


def cells(model: str) -> Iterator[dict[str, Any]]:
    """Yield the settings of each row; mixed_precision is bf16 unless given."""
    for size, batch in itertools.product(SIZES[model], (1, 4)):
        yield {"height": size, "width": size, "batch_size": batch}
        if batch == 1:
            yield {"height": size, "width": size, "gradient_checkpointing": "none"}
    yield {"mixed_precision": "no"}
    yield {"mixed_precision": "no", "batch_size": 4}
    yield {"batch_size": 4, "reward_batch_size": 4}
    yield {"batch_size": 4, "gradient_checkpointing": "none"}
    yield {"tiny_decoder": "small"}
    for mode in ("none", "blocks", "denoiser", "both"):
        yield {"method": "draft_k(k=5)", "num_inference_steps": 6, "gradient_checkpointing": mode}
    yield {"method": "draft", "num_inference_steps": 50, "gradient_checkpointing": "denoiser"}


def presets() -> None:
    """Count every preset with a ViT-H reward, and print its share of the preset's device memory."""
    for name, path in PRESETS.items():
        values = read_yaml(path)
        model = HUB[values.pop("model")]
        left_out = ("reward", "prompts", "num_inference_steps")
        settings = {key: value for key, value in values.items() if key not in left_out}
        result = measure("count", model, settings)
        if "update" in result:
            total = result["networks"] + MemoryCount(**{name: result[name] for name in MemoryCount._fields}).peak
            room = int(name.rpartition("-")[2].removesuffix("gb")) * 2**30
            print(f"{name}: {total / 1e9:.2f} GB, {total / room:.0%} of {room / 2**30:.0f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "count", "table", "presets"))
    parser.add_argument("model", choices=PIPELINES, nargs="?", default="sd14")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--rounds", type=int, default=1, help="updates of `real`")
    parser.add_argument("--keep-text-encoders", action="store_true", help="count them, and encoding in every update")
    args = parser.parse_intermixed_args()
    if args.what == "table":
        table(args.model, args.keep_text_encoders)
    elif args.what == "presets":
        presets()
    else:
        given = (setting.partition("=") for setting in args.settings)
        settings = {name: yaml.safe_load(value) for name, _, value in given}
        measure(args.what, args.model, settings, args.rounds, args.keep_text_encoders)


if __name__ == "__main__":
    main()
