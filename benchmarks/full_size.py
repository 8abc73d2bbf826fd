"""Measure time and memory of an update at published model sizes, with random weights or with fake tensors.

    python benchmarks/full_size.py real sd14 mixed_precision=bf16 num_inference_steps=2
    python benchmarks/full_size.py count sdxl method='draft_k(k=5)' batch_size=4
    python benchmarks/full_size.py count flux mixed_precision=bf16 quantization=bnb_4bit
    python benchmarks/full_size.py table sd14
    python benchmarks/full_size.py presets zimage-16gb

Any setting of `draftune train` can be given. `real` runs updates with draftune's trainer, with `device=cuda` on a GPU.
`count` writes a folder with the published configs and counts a run on it as `draftune preflight --count` does: all
operations are dispatched on fake tensors and live bytes are summed, but nothing is computed. Both count memory as
`draftune preflight` does on a CPU. A count also has the bytes of the text encoders, which are freed before an update.
`table` counts the rows of docs/explanation/memory-and-time.md, `presets` all presets or those that are named.
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from diffusers import AutoencoderTiny

from architectures import ViTH, empty, pipeline, write_clip, write_folder, write_tiny_decoder
from draftune.presets import PRESETS, read_yaml
from draftune.recommended import recommended
from draftune.settings import Settings
from draftune.training.memory_check import seconds
from draftune.training.memory_count import MemoryCount, count_run, network_bytes
from draftune.training.trainer import Trainer
from draftune.utils.devices import DTYPES
from draftune.utils.memory import peak_memory
from published_configs import MODELS, PARTS, SHORT, TINY_DECODERS
from quantized_update import quantized

PROMPTS = ["cat face", "pizza", "red apple", "rocket"]
# Memory does not depend on the number of prefix steps, so that one is enough.
DEFAULTS: dict[str, Any] = {"method": "draft_k(k=1)", "batch_size": 1, "guidance_scale": 7.5, "num_inference_steps": 2}
SIZES = {"sd14": (512, 768, 1024), "sdxl": (768, 1024)}
LONG = " ".join(["cat"] * 300)
"""A prompt with more tokens than any text encoder reads: some models have as many embeddings as tokens."""
FEWER_STEPS: dict[str, dict[str, Any]] = {
    "draft_lv": {"num_inference_steps": 2},
    "refl": {"num_inference_steps": 2, "method": "refl(m=1)"},
}
"""Fewer prefix steps for a count of presets, by the name of the method: the peak is in the steps with gradient."""


@contextmanager
def trainer(model: str, settings: Mapping[str, Any]) -> Iterator[Trainer]:
    """Yield a trainer for a model of SHORT with random weights, built on its device. Default reward: ViT-H."""
    with TemporaryDirectory() as folder:
        values = {"device": "cpu", **DEFAULTS, "prompts": PROMPTS, **settings, "output": f"{folder}/run"}
        device, name = values["device"], SHORT[model]
        if decoder := values.get("tiny_decoder"):
            values["tiny_decoder"] = f"{folder}/small"
            AutoencoderTiny(latent_channels=TINY_DECODERS[decoder]).save_pretrained(f"{folder}/small")
        reward = values.pop("reward", None) or ViTH(device)
        dtype = DTYPES[values.get("mixed_precision", "no")] or torch.float32
        networks = {}
        if (quantization := values.pop("quantization", "none")) != "none":
            network = empty(MODELS[name].networks["transformer"], dtype)
            networks["transformer"], _ = quantized(network, quantization, device)
        made = Trainer(pipeline(name, dtype, device, **networks), reward, **values)
        made.train_step.folder = None
        yield made


def real(model: str, settings: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Return the first update's peak memory, and wall and CPU seconds of each update.

    Of the CPU also the process's peak, of a GPU also the peaks of the bytes that are allocated and reserved in all.
    """
    with trainer(model, settings) as made:
        device = made.model.device
        result: dict[str, Any] = {"held": network_bytes(made), "rss_before": rss()}
        times: list[list[float]] = []

        def update() -> None:
            start = time.process_time()
            wall = seconds(lambda: made.train_step.run(1 + len(times)), device)
            times.append([round(wall, 4), round(time.process_time() - start, 4)])

        result["peak"] = peak_memory(update, device)
        for _ in range(rounds - 1):
            update()
        if device.type == "cuda":
            result["allocated"] = torch.cuda.max_memory_allocated(device)
            result["reserved"] = torch.cuda.max_memory_reserved(device)
        return {**result, "rss": rss(), "times": times}


def count(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes of a run: text encoders, networks without them, optimizer state, update, sampling a batch.

    Args:
        settings: Settings of `draftune train`. The model is a hub id of MODELS, the tiny decoder one of TINY_DECODERS,
            the reward `hpsv2`, `pickscore` or none that has files.
    """
    with TemporaryDirectory() as root:
        folder, values = Path(root), {"reward": "pickscore", **settings}
        model, decoder = values["model"], values.get("tiny_decoder")
        texts = [name for part, name in MODELS[model].networks.items() if part.startswith("text_encoder")]
        values["model"] = str(write_folder(model, folder / "model"))
        if decoder:
            values["tiny_decoder"] = str(write_tiny_decoder(decoder, folder / "decoder"))
        if values["reward"] in ("hpsv2", "pickscore"):
            clip = write_clip(folder / "clip")
            files = {"hpsv2": f'weights="none", tokenizer="{clip}"', "pickscore": f'model="{clip}"'}
            values["reward"] = f"{values['reward']}({files[values['reward']]})"
        (folder / "prompts.txt").write_text(LONG)
        asked = Settings(**{**values, "prompts": str(folder / "prompts.txt"), "output": str(folder / "run")})
        width = (DTYPES[asked.mixed_precision] or torch.float32).itemsize
        encoders = width * sum(PARTS[name].parameters for name in texts)
        return {"text_encoders": encoders, **count_run(asked)._asdict()}


def rss() -> int:
    """Return the peak resident set size of this process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(what: str, model: str, settings: Mapping[str, Any], rounds: int = 1) -> dict[str, Any]:
    """Measure one row and print it as a line of JSON."""
    try:
        if what == "real":
            result = real(model, settings, rounds)
        else:
            result = count({**DEFAULTS, "model": SHORT[model], **settings})
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps({"what": what, "model": model, **settings, **result}), flush=True)
    return result


def table(model: str) -> None:
    """Count every row of one model's tables."""
    for cell in cells(model):
        measure("count", model, {"mixed_precision": "bf16", **cell})


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
    yield {"tiny_decoder": {"sd14": "madebyollin/taesd", "sdxl": "madebyollin/taesdxl"}[model]}
    for mode in ("none", "blocks", "denoiser", "both"):
        yield {"method": "draft_k(k=5)", "num_inference_steps": 6, "gradient_checkpointing": mode}
    yield {"method": "draft", "num_inference_steps": 50, "gradient_checkpointing": "denoiser"}


def preset_settings(name: str) -> dict[str, Any]:
    """Return the settings of a preset for an update of one batch, with few steps: its peak is that of all steps."""
    values = read_yaml(PRESETS[name])
    method = values.get("method") or recommended(values["model"])["method"]
    return {**values, **FEWER_STEPS.get(method.partition("(")[0], {}), "gradient_accumulation_steps": 1}


def preset_count(name: str) -> tuple[MemoryCount, float]:
    """Return the count of a preset, and its share of the device's memory."""
    result = count(preset_settings(name))
    if read_yaml(PRESETS[name]).get("gradient_accumulation_steps", 1) > 1:
        # All batches of an update but the first one find the gradients of another one in memory.
        result["update"] += result["optimizer"] // 2
    counted = MemoryCount(**{field: result[field] for field in MemoryCount._fields})
    room = int(name.rpartition("-")[2].removesuffix("gb")) * 2**30
    return counted, (counted.networks + counted.peak) / room


def presets(names: list[str]) -> None:
    """Count presets, and print the numbers of their comments."""
    for name in names:
        counted, share = preset_count(name)
        networks, update = counted.networks / 1e9, counted.peak / 1e9
        total = networks + update
        print(f"{name}: networks {networks:.2f} GB, an update {update:.2f} GB, {total:.2f} GB, {share:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "count", "table", "presets"))
    parser.add_argument(
        "names", nargs="*", metavar="MODEL, PRESET or SETTING=VALUE", help=f"models: {', '.join(SHORT)}"
    )
    parser.add_argument("--rounds", type=int, default=1, help="updates of `real`")
    args = parser.parse_args()
    names = [name for name in args.names if "=" not in name]
    settings = {name: yaml.safe_load(value) for name, _, value in (s.partition("=") for s in args.names if "=" in s)}
    if args.what == "presets":
        presets(names or list(PRESETS))
    elif args.what == "table":
        table(names[0])
    else:
        measure(args.what, names[0], settings, args.rounds)


if __name__ == "__main__":
    main()
