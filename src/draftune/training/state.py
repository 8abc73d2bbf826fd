"""Save and restore the state of the updates, so that a resumed run continues bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.rewards.online import carried
from draftune.runs.checkpoint import MAX_CHECKPOINTS, checkpoints, load_optimizer, optimizer_tensors
from draftune.runs.resuming import COMPUTED
from draftune.training.data import pending_state, read_pending
from draftune.training.gradient_check import AUDITED, GradientCheck
from draftune.training.step import TrainStep

METHOD_STATE = {"model", "reward", "reward_normalization_samples", "method", "height", "width"}
METHOD_STATE |= {"num_inference_steps", "timestep_spacing", "set_alpha_to_one", "lora_steps"}
"""Settings that a method's state depends on: statistics of the reward, value networks of the sampling steps."""


def train_state(train_step: TrainStep) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state of the updates for a checkpoint. Every process must call it.

    Returns:
        Values for JSON, and tensors by name. The LoRA's tensors are the trained ones, not their moving average.
    """
    context, parameters = train_step.context, train_step.parameters
    scaler, method = context.accelerator.scaler, context.method.state_dict()
    tensors = {f"lora/{name}": parameter.detach() for name, parameter in parameters.items()}
    if train_step.ema is not None:
        tensors |= {
            f"ema/{name}": average for name, average in zip(parameters, train_step.ema.shadow_params, strict=True)
        }
    tensors |= optimizer_tensors(train_step.optimizer, list(parameters))
    tensors |= carried(context.reward)
    tensors |= {f"method/{key}": value for key, value in method.items() if isinstance(value, Tensor)}
    tensors["generator"] = train_step.generator.get_state()
    pending, latents = pending_state(train_step.pending, context.processes)
    tensors |= latents
    return {
        **pending,
        "prefix_reuse": train_step.reuse.state_dict(),
        "retain_prompts_order": train_step.retain_sampler.queue,
        "reward_queries": train_step.scorer.queries,
        "train_seconds": train_step.seconds,
        "nonfinite_steps": [train_step.skipped, train_step.skipped_in_a_row, train_step.overflows],
        "prompts": train_step.prompt_sampler.queue,
        "weights": [weight for weight, _ in context.reward.terms],
        "method": {key: value for key, value in method.items() if not isinstance(value, Tensor)},
        "scaler": scaler.state_dict() if scaler else None,
        "ema_step": train_step.ema.optimization_step if train_step.ema is not None else 0,
    }, tensors


def load_train_state(
    train_step: TrainStep, state: Mapping[str, Any], tensors: Mapping[str, Tensor], changed: Collection[str] = ()
) -> None:
    """Restore the state that `train_state` returned.

    Args:
        train_step: The updates of the resumed run.
        state: Values from JSON.
        tensors: Tensors by name.
        changed: Names of settings that differ from the earlier run's; state that depends on them is not restored.

    Raises:
        DraftuneError: the LoRA belongs to another network.
    """
    context, parameters = train_step.context, train_step.parameters
    for name, parameter in parameters.items():
        saved = tensors.get(f"lora/{name}")
        if saved is None or saved.shape != parameter.shape:
            problem = "no such layer" if saved is None else f"the shape {tuple(saved.shape)} there"
            raise DraftuneError(
                f"the LoRA of the run does not fit {context.model.name!r}: {name} has {problem}; give another folder "
                "(--output)"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"lora/{name}"])
        if train_step.ema is not None:
            # A run that was made without an average begins it at its present weights.
            for average, (name, parameter) in zip(train_step.ema.shadow_params, parameters.items(), strict=True):
                average.copy_(tensors.get(f"ema/{name}", parameter))
            train_step.ema.optimization_step = state["ema_step"]
    if "optimizer" not in changed:
        load_optimizer(train_step.optimizer, list(parameters), tensors)
    same_reward = not {"reward", "reward_normalization_samples"} & set(changed)
    for name, learned in carried(context.reward).items() if same_reward else ():
        learned.resize_as_(tensors[name]).copy_(tensors[name])
    if train_step.context.folder.done >= AUDITED:
        train_step.gradient_check = GradientCheck({})  # the first updates had gradients
    train_step.generator.set_state(tensors["generator"])
    train_step.scorer.queries, train_step.seconds = state["reward_queries"], state["train_seconds"]
    train_step.skipped, train_step.skipped_in_a_row, train_step.overflows = state["nonfinite_steps"]
    if not {"prompts", "num_images_per_prompt"} & set(changed):
        train_step.prompt_sampler.queue = state["prompts"]
    if "retain_prompts" not in changed:
        train_step.retain_sampler.queue = state.get("retain_prompts_order", [])
    if not set(changed) & set(COMPUTED):
        # Started batches depend on nearly all settings: after a change, fresh ones are started.
        stride = context.settings.prefix_stride
        train_step.pending = read_pending(state, tensors, context.processes, context.model.device, stride)
        train_step.reuse.load_state_dict(train_step.reuse.state_dict() | state.get("prefix_reuse", {}))
    lost = {"model", "method"} if context.method.state_is_of_lora else METHOD_STATE
    if not lost & set(changed):
        own = {k.removeprefix("method/"): v for k, v in tensors.items() if k.startswith("method/")}
        context.method.load_state_dict(state["method"] | own)
    if context.accelerator.scaler and state["scaler"]:
        context.accelerator.scaler.load_state_dict(state["scaler"])


def disk_bytes(train_step: TrainStep) -> int:
    """Return the bytes of the checkpoints and LoRAs that the run will write; AdamW stores two moments a weight."""
    lora = sum(parameter.nbytes for parameter in train_step.parameters.values())
    learned = sum(tensor.nbytes for tensor in carried(train_step.context.reward).values())
    copies = 4 if train_step.ema is not None else 3
    coming = max(1, MAX_CHECKPOINTS + 2 - len(checkpoints(train_step.context.folder.path / "checkpoints")))
    return coming * (copies * lora + learned) + 2 * lora
