"""What the two processes of tests/test_devices.py do together: updates by several methods, alone or sharded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from draftune.errors import DraftuneError
from draftune.lora import save_lora
from draftune.models import load_model
from draftune.training.state import train_state
from draftune.training.trainer import Trainer
from draftune.utils.images import save_image, to_pil
from draftune.utils.processes import message_for_rank, rank_and_world_size, shutdown
from helpers.pipelines import add_random_lora

PROMPTS = ["a cat", "a dog", "a bird"]
SETTINGS: dict[str, Any] = {
    "reward": "brightness + 0.5*saturation",
    "prompts": PROMPTS,
    "batch_size": 4,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "learning_rate": 0.01,
    "max_grad_norm": 0.0,
    "steps": 3,
    "device": "cpu",
}
# The networks in float64, where what differs is no rounding; but for one case.
PARALLEL: dict[str, dict[str, Any]] = {
    "float32": {"method": "draft_lv(n=1)", "dtype": torch.float32},
    "draft_lv": {"method": "draft_lv(n=1)", "gradient_accumulation_steps": 2, "prefix_batches": 2},
    "ddpo": {"method": "ddpo(min_count=2, inner_epochs=2)"},
    # Groups in both processes, over two batches, in one batch, and each in a process of its own.
    "diffusion_nft": {
        "method": "diffusion_nft(inner_epochs=2)",
        "num_images_per_prompt": 4,
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "online_dpo": {"method": "online_dpo(pairs=2)", "num_images_per_prompt": 4},
    "flow_grpo": {"method": "mix_grpo(window=1)", "num_images_per_prompt": 4, "batch_size": 8},
    "kept": {"method": "draft_k(k=1)", "init_lora": "FIRST", "retain_prompts": "animals"}
    | {"prefix_reuse_steps": 1, "prefix_reuse_cosine": 0.9},
    # A critic and a value network compute in float32.
    "float32 critic": {
        "method": "sft_pg(generator_steps=2)",
        "reward": "discriminator(folder=EXAMPLES, width=4, size=16)",
        "gradient_accumulation_steps": 2,
    },
}
SHARDED: dict[str, dict[str, Any]] = {
    "two calls": {"method": "kl(draft_k(k=2), beta=0.1)"},
    "earliest cut": {"method": "alignprop(cut=uniform, m=3)"},
    "adjoint": {"method": "adjoint_matching(k=2)"},
    "kept": {"method": "draft_k(k=2)", "init_lora": "FIRST", "retain_prompts": "animals"},
    "blocks": {"method": "kl(draft_k(k=1), beta=0.1)", "gradient_checkpointing": "blocks"},
    "both": {"method": "draft_k(k=2)", "gradient_checkpointing": "both"},
}
TRAFFIC: dict[str, dict[str, Any]] = {
    f"k={k}, {mode}": {"method": f"draft_k(k={k})", "gradient_checkpointing": mode}
    for k, mode in ((1, "none"), (1, "blocks"), (2, "denoiser"), (2, "both"))
}
"""Runs whose communication is counted."""
UPDATES = 2


def examples(folder: Path) -> Path:
    """A folder of pictures."""
    pictures = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, picture in enumerate(to_pil(pictures)):
        save_image(picture, folder / f"{i}.png")
    return folder


def first_lora(model: str, folder: Path, dtype: torch.dtype) -> str:
    """The folder of a LoRA that does something."""
    painter = load_model(StableDiffusionPipeline.from_pretrained(model).to(dtype))
    add_random_lora(painter)
    save_lora(painter, folder)
    return str(folder)


def updated(
    model: str, output: Path, dtype: torch.dtype = torch.float64, **values: Any
) -> tuple[Trainer, list[dict[str, float]]]:
    """A trainer after some updates, and their rows."""
    painter = load_model(StableDiffusionPipeline.from_pretrained(model).to(dtype))
    values = SETTINGS | values
    if "EXAMPLES" in str(values["reward"]):
        values["reward"] = values["reward"].replace("EXAMPLES", f"'{examples(output.parent / 'examples')}'")
    if "init_lora" in values:
        values["init_lora"] = first_lora(model, output.parent / "first", dtype)
    trainer = Trainer(painter, output=str(output), **values)
    return trainer, [trainer.train_step.run(step) for step in range(1, UPDATES + 1)]


def learned(trainer: Trainer) -> dict[str, Tensor]:
    """The LoRA and the last update's gradient."""
    found = {}
    for name, parameter in trainer.train_step.parameters.items():
        assert parameter.grad is not None
        found[name], found[f"gradient/{name}"] = parameter.detach().clone(), parameter.grad.clone()
    return found


def save(folder: Path, name: str, trainer: Trainer, rows: list[dict[str, float]]) -> None:
    """What this process learned, by its number: all are to have learned the same."""
    index, _ = rank_and_world_size()
    save_file(learned(trainer), folder / f"{name}-{index}.safetensors")
    state = train_state(trainer.train_step)[0]
    (folder / f"{name}-{index}.json").write_text(json.dumps({"rows": rows, "method": state["method"]}))


def sizes(trainer: Trainer) -> dict[str, dict[str, int]]:
    """Numbers that this process holds, and all of them, of each network."""
    found = {}
    for part in trainer.model.modules:
        frozen = [parameter for parameter in part.parameters() if not parameter.requires_grad]
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)
        found[type(part).__name__] = {"held": held, "all": sum(p.numel() for p in frozen)}
    return found


@contextmanager
def counted_traffic() -> Iterator[dict[str, int]]:
    """Count what this process hands to collectives inside the block, in bytes by their names.

    `all_gather_single` is FSDP's; its bytes are those of the gathered tensor. The others are counted by their input.
    """
    traffic, patch = {"all_reduce": 0, "all_gather": 0, "all_gather_single": 0}, pytest.MonkeyPatch()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(first: Any, *others: Any, **options: Any) -> Any:
            traffic[name] += (others[0] if isinstance(first, list) else first).nbytes
            return original(first, *others, **options)

        return collective

    for name in traffic:
        patch.setattr(distributed, name, counting(name, getattr(distributed, name)))
    with patch.context():
        yield traffic
    patch.undo()


def update_traffic(model: str, output: Path, **values: Any) -> dict[str, int]:
    """Return the traffic of an update, with what it depends on: bytes of the UNet, numbers and tensors of the LoRA."""
    trainer, _ = updated(model, output, **values)
    parameters = trainer.train_step.parameters.values()
    frozen = [p for p in trainer.model.denoiser.parameters() if not p.requires_grad]
    with counted_traffic() as traffic:
        trainer.train_step.run(UPDATES + 1)
    sizes = {"numbers": sum(p.numel() for p in parameters), "tensors": len(parameters)}
    return traffic | sizes | {"weights": sum(p.numel() * p.element_size() for p in frozen)}


def picky(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that fails in the second process alone, and at training's first pictures alone."""
    if rank_and_world_size()[0] == 1 and torch.is_grad_enabled() and len(prompts) == 1:
        raise ValueError("no such picture")
    return images.mean((1, 2, 3))


def undefined(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Not a number in the second process alone."""
    return images.mean((1, 2, 3)) * (torch.nan if rank_and_world_size()[0] == 1 else 1)


def said(model: str, output: Path, **values: Any) -> list[str | None]:
    """The error of a run, and what this process would print of it."""
    with pytest.raises(DraftuneError) as found:
        updated(model, output, **values)
    return [str(found.value), message_for_rank(found.value)]


def main(model: str, folder: Path) -> None:
    index, count = rank_and_world_size()
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"count": count}
    for name, values in PARALLEL.items():
        trainer, rows = updated(model, folder / "run", **values)
        save(folder, f"parallel {name}", trainer, rows)
    facts["whole"] = sizes(trainer)
    facts["traffic"] = {name: update_traffic(model, folder / "run", **values) for name, values in TRAFFIC.items()}
    facts["alone"] = said(model, folder / "run", reward=picky, reward_batch_size=1)
    facts["undefined"] = said(model, folder / "undefined", reward=undefined, nonfinite_action="stop")
    facts["uneven"] = said(model, folder / "run", batch_size=3)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    facts["fsdp1"] = said(model, folder / "run")
    os.environ |= {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for name, values in SHARDED.items():
        trainer, rows = updated(model, folder / "run", **values)
        save(folder, f"sharded {name}", trainer, rows)
    facts["sharded"] = sizes(trainer)
    facts["sharded traffic"] = {
        name: update_traffic(model, folder / "run", **values) for name, values in TRAFFIC.items()
    }
    (folder / f"facts-{index}.json").write_text(json.dumps(facts))
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
