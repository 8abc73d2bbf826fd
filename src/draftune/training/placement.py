"""Put the networks of a run on their device, and undo it after training."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from draftune.errors import out_of_memory
from draftune.lora import add_lora
from draftune.models.prompt_embeddings import PromptEmbeddings, text_encoders
from draftune.rewards.precision import load_in_precision
from draftune.training.context import TrainContext
from draftune.utils.devices import fork_rng
from draftune.utils.logging import logger
from draftune.utils.weightless import fake_mode

COMPILE_BACKEND = "inductor"
"""Backend of torch.compile."""


def to_device(context: TrainContext, sharded: bool) -> None:
    """Encode the prompts, load the rewards' weights, move all networks to the device, and add the LoRA to the model.

    Args:
        context: The run.
        sharded: Whether FSDP will shard the model: it then stays on the CPU, since no device may have room for it.
    """
    s, model, device = context.settings, context.model, context.accelerator.device
    encoders = text_encoders(model.pipeline).values()
    if model.embeddings is None and encoders and not any(hasattr(part, "peft_config") for part in encoders):
        model.embeddings = PromptEmbeddings(model)
    # First in place, for the precision: a device may have no room for the text encoders beside the other networks.
    model.to(model.device, s.mixed_precision)
    model.cache_prompts(context.all_prompts, s.negative_prompt, s.guidance_scale, device)
    model.to("cpu" if sharded else device, s.mixed_precision, s.offload)
    model.set_checkpointing(
        s.gradient_checkpointing or ("both" if context.method.backprops_multiple_calls() else "blocks")
    )
    first = context.continued_run.ready(device, s.reward_precision) if context.continued_run is not None else None
    for reward in (context.reward, context.eval_rewards, first):
        if reward is not None:
            load_in_precision(reward, s.reward_precision)
            reward.to(device)
            reward.set_chunk_size(s.reward_batch_size)
    with fork_rng(), fake_mode() or nullcontext():
        torch.manual_seed(s.seed)
        add_lora(model, s.lora_rank, s.lora_alpha, s.lora_target_modules.split(","))
        for module in model.denoiser.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.to(model.device)  # peft puts a LoRA where the weight of its layer is stored
    if s.compile:
        # In place, unlike torch.compile(module): the names of layers and LoRA tensors stay as they are.
        model.denoiser.compile(backend=COMPILE_BACKEND)


def release_model(context: TrainContext) -> None:
    """Undo what training changed in the model, except the LoRA: tiny decoder, pixel clamp, compilation, encoders."""
    model = context.model
    if model.embeddings is not None and not model.embeddings.loaders:
        try:
            model.load_text_encoders()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            logger.warning("the text encoders stay in main memory: the device has no room for them")
    model.tiny_decoder, model.pixel_clamp = None, context.pixel_clamp
    if context.settings.compile:
        model.denoiser._compiled_call_impl = None
