"""Measure an update of one and two processes on a CPU, and count what processes communicate at published sizes.

    python benchmarks/processes.py [--steps 8]

Table 1 trains the embedded model with DRaFT-1, 20 sampling steps and a batch of 4, with one thread a process, and shows
the seconds of an update after the first two. Table 2 is computed from the published configs, for LoRAs of rank 8 on the
recommended layers: bytes that an update averages over the processes, and bytes of the frozen denoiser in bf16, which
FSDP2 gathers T + K times.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model

from architectures import empty
from draftune.published import PUBLISHED
from draftune.runs.logs import METRICS, read_rows
from published_configs import MODELS, PARTS

WARM = 2
"""Updates before the timed ones."""
RANK = 8
COUNTED = {
    "CompVis/stable-diffusion-v1-4": "stable-diffusion",
    "stabilityai/stable-diffusion-xl-base-1.0": "stable-diffusion-xl",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}
"""Models, with the names of their recommended settings."""


def update_seconds(count: int, steps: int) -> float:
    """Return the seconds of an update with this number of processes."""
    with TemporaryDirectory() as folder:
        flags = ["--device", "cpu", "--method", "draft_k(k=1)", "--prefix-reuse-steps", "1", "--eval-prompts", ""]
        flags += ["--num-inference-steps", "20", "--batch-size", "4", "--steps", str(steps), "--num-log-prompts", "1"]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
        command = [sys.executable, *launcher, "-m", "draftune", "train", "--output", f"{folder}/run", *flags]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = [row["train_seconds"] for row in read_rows(Path(folder) / "run" / METRICS)]
    return float(seconds[-1] - seconds[WARM - 1]) / (steps - WARM)


def lora_size(model: str) -> tuple[int, int]:
    """Return the numbers and the tensors of a model's LoRA, on its recommended layers."""
    network, targets = empty(denoiser(model), torch.bfloat16), PUBLISHED[COUNTED[model]].lora_target_modules
    with init_empty_weights():
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=targets.split(",")), network)
    trained = [parameter.numel() for name, parameter in network.named_parameters() if ".lora_" in name]
    return sum(trained), len(trained)


def denoiser(model: str) -> str:
    """Return the name of a model's denoiser among the published networks."""
    networks = MODELS[model].networks
    return networks.get("unet") or networks["transformer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    print("| model | numbers of the LoRA | tensors | bytes averaged | bytes of the denoiser |\n|---|---|---|---|---|")
    for model in COUNTED:
        numbers, tensors = lora_size(model)
        weights = PARTS[denoiser(model)].parameters * torch.bfloat16.itemsize
        print(f"| {model} | {numbers} | {tensors} | {4 * (numbers + tensors)} | {weights} |", flush=True)
    print("\n| processes | seconds |\n|---|---|")
    for count in (1, 2):
        print(f"| {count} | {update_seconds(count, args.steps):.2f} |", flush=True)


if __name__ == "__main__":
    main()
