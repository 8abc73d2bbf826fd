"""Every setting of a training run: one table for Python, YAML files and the command line. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.recommended import SAMPLING, fit_to_steps, recommended, tell_sampling, without_style
from draftune.registry.expression import same_expression
from draftune.sampling.step_range import StepRange
from draftune.settings.field_checks import checked, setting
from draftune.utils.model_options import ModelOptions

PRECISIONS = ("no", "fp16", "bf16")
QUANTIZATIONS = ("none", "bnb_4bit", "bnb_8bit", "torchao_int8", "torchao_float8")
REWARD_PRECISIONS = ("no", "bf16", "bnb_4bit")
CHECKPOINTING = ("none", "blocks", "denoiser", "both")
PIXEL_CLAMPS = ("straight_through", "hard")
SPACINGS = ("leading", "trailing", "linspace")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
"""Learning-rate schedules, by their names in `diffusers.optimization`."""
TRACKERS = ("tensorboard", "wandb", "trackio")
PROMPT = "{prompt}"
"""Placeholder of the prompt in `eval_prompt_template`."""
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
GROUPS = {
    "model": "model",
    "reward": "reward",
    "method": "method",
    "steps": "optimization",
    "lora_rank": "LoRA",
    "num_inference_steps": "sampling",
    "device": "device and memory",
    "eval_prompts": "evaluation and logging",
    "output": "output",
}
"""The first setting of each group of `draftune train --help`, and the group's title."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a training run. A default of None is replaced by the value recommended for the model.

    Other defaults are those of the small-scale runs of Clark et al., 2023, arXiv:2309.17400, where the paper states
    them.

    Raises:
        DraftuneError: a value has the wrong type, is out of range, or does not fit another setting.
    """

    model: str = setting(
        "emoji", "Base model: 'emoji', a diffusers pipeline folder, a hub id, or a file (.safetensors, .gguf)."
    )
    base_pipeline: str | None = setting(
        None, "Pipeline (folder or hub id) that completes a checkpoint file: configs, tokenizers, other networks."
    )
    revision: str | None = setting(None, "Branch, tag or commit of the hub id (default: main).")
    variant: str | None = setting(None, "Variant of the weights, such as fp16 (default: plain weights, if any).")
    prompts: str = setting(
        None,
        "Training prompts: a named set (see 'draftune list prompts'), a file (.txt with one prompt a line, .csv, .tsv, "
        ".json, .jsonl, .yaml, .parquet), a folder of captions, or hf://datasets/OWNER/NAME:COLUMN.",
    )
    init_lora: str = setting("", "Run or LoRA file to train a second LoRA on top of; it stays frozen.", resume="fixed")
    skip_text_encoder_lora: bool = setting(False, "Ignore the text encoder layers of --init-lora.", resume="fixed")

    reward: str = setting(None, "Reward, such as 'clip + 0.1*jpeg_compressibility(quality=80)' or 'file.py:function'.")
    reward_batch_size: int = setting(
        1, "Images that are decoded and scored at once; more need more memory.", low=1, resume="rounding"
    )
    reward_precision: str | None = setting(
        None,
        "Precision in which the linear layers of rewards are stored; scores are float32 (default: that of the reward, "
        "bf16 for hpsv3 and unifiedreward, else no).",
        choices=REWARD_PRECISIONS,
    )
    reward_normalization_samples: int = setting(
        0,
        "Images of the base model to normalize the reward with: each term is divided by its standard deviation over "
        "them; 0 does not normalize.",
        low=0,
    )
    rate_every: int = setting(
        0,
        "Updates after which training pauses for comparisons in the browser, to which the reward 'taste' is fitted "
        "again; 0 never asks.",
        low=0,
    )
    rate_comparisons: int = setting(20, "Pairs of images of each pause of --rate-every.", low=1)
    pixel_clamp: str = setting(
        "straight_through",
        "Gradient of the reward at decoded pixels outside [0, 1]: passed on unchanged, or 0 (the gradient of a clamp).",
        choices=PIXEL_CLAMPS,
    )

    method: str = setting(
        None, "Training method, such as 'draft_k(k=10)' or 'refl(m=20)' (see 'draftune list methods')."
    )
    prefix_reuse_steps: int = setting(
        1,
        "Consecutive updates that train on one batch; its prefix, the sampling steps before truncation, is sampled "
        "for the first of them only.",
        low=1,
    )
    prefix_reuse_cosine: float = setting(
        0.0,
        "Lowest cosine between the gradients from a reused and from a new prefix, such as 0.95: --prefix-reuse-steps "
        "is then the first number, and doubles or halves to meet it; 0 fixes the number.",
        low=0,
        high=0.999,
    )
    prefix_stride: int = setting(1, "Sampling steps of the prefix that training merges into one.", low=1)
    prefix_cache: str = setting(
        "",
        "Cache that predicts some denoiser calls of the prefix: 'taylorseer(interval=2)' for every model, "
        "'first_block_cache(threshold=0.05)' for some transformers; '' for none.",
    )
    prefix_precision: str = setting(
        "same", "Precision in which the prefix is computed; the weights stay as they are.", choices=("same", "bf16")
    )
    prefix_compile: bool = setting(
        False,
        "Compile the denoiser with torch.compile for the prefix alone, which has no graph and fixed shapes.",
        resume="rounding",
    )
    prefix_batches: int = setting(
        1,
        "Batches of --gradient-accumulation-steps whose prefix is sampled in one call; more need more memory.",
        low=1,
        resume="rounding",
    )
    retain_prompts: str = setting(
        "",
        "Prompts on which the fine-tuned model must match the model of --init-lora, best those of that training: "
        "a named set or a file.",
    )
    retain_weight: float = setting(
        3.0, "Weight of the loss on --retain-prompts, relative to a reward with standard deviation 1.", low=0
    )

    steps: int = setting(None, "Number of updates.", low=1, resume="free")
    batch_size: int = setting(4, "Images of one backward pass, over all processes.", low=1)
    gradient_accumulation_steps: int = setting(1, "Batches of one update.", low=1)
    num_images_per_prompt: int = setting(
        1, "Images of each prompt in an update, side by side: the groups that some methods compare.", low=1
    )
    optimizer: str = setting(
        "adamw", "Optimizer, such as 'adamw', 'adamw_8bit' or 'sgd(momentum=0.9)' (see 'draftune list optimizers')."
    )
    gradient_filter: str = setting(
        "", "Filter for the gradients of the LoRA's output channels (see 'draftune list filters'); '' for none."
    )
    learning_rate: float = setting(None, "Peak learning rate.", low=0)
    lr_scheduler: str = setting(None, "Learning-rate schedule (names of diffusers).", SCHEDULERS)
    lr_warmup_steps: int = setting(0, "Updates over which the learning rate rises linearly to its peak.", low=0)
    lr_num_cycles: int = setting(1, "Number of cycles of cosine_with_restarts.", low=1)
    lr_power: float = setting(1.0, "Exponent of the polynomial schedule.", low=0)
    adam_beta1: float = setting(0.9, "Decay rate of AdamW's first moment.", low=0, high=0.9999)
    adam_beta2: float = setting(0.999, "Decay rate of AdamW's second moment.", low=0, high=0.9999)
    weight_decay: float = setting(0.1, "Weight decay of AdamW.", low=0)
    max_grad_norm: float = setting(1.0, "Norm that the gradient is clipped to; 0 does not clip.", low=0)
    ema_decay: float = setting(
        0.0,
        "Decay of an exponential moving average of the LoRA, which is then evaluated and saved; 0 keeps no average.",
        low=0,
        high=0.99999,
    )
    nonfinite_action: str = setting(
        "stop",
        "Action when a reward or a gradient is not finite: end the run, or skip the update.",
        ("stop", "skip"),
        resume="free",
    )
    seed: int = setting(
        0,
        "Random seed of the LoRA's initial weights, the order of prompts, and the noise.",
        low=0,
        high=2**32 - 1,
        resume="fixed",
    )

    lora_rank: int = setting(8, "Rank of the LoRA.", low=1, resume="fixed")
    lora_alpha: float | None = setting(None, "LoRA alpha; the scale is alpha / rank (default: the rank).", low=0)
    lora_target_modules: str = setting(None, "Suffixes of the names of the layers with a LoRA.", resume="fixed")
    lora_steps: str = setting(
        "", "Range of the sampling steps with the LoRA, such as 0.0-0.4 (0: the noise, 1: the image); '' for all steps."
    )

    num_inference_steps: int = setting(None, "Sampling steps, in training and evaluation.", low=1)
    guidance_scale: float = setting(
        None, "Scale of classifier-free guidance, in training and evaluation; values up to 1 turn it off.", low=0
    )
    negative_prompt: str = setting("", "Negative prompt of classifier-free guidance.")
    timestep_spacing: str | None = setting(None, "Spacing of the sampling steps.", choices=SPACINGS)
    set_alpha_to_one: bool | None = setting(
        None, "Whether the last sampling step ends at the clean latent (default: as in the model's scheduler)."
    )
    height: int | None = setting(None, "Height of the images in pixels (default: the model's own).", low=1)
    width: int | None = setting(None, "Width of the images in pixels (default: the model's own).", low=1)

    device: str = setting("auto", "Device: auto (a GPU if there is one), cpu, mps, cuda or cuda:N.", resume="rounding")
    mixed_precision: str = setting(None, "Precision of the frozen weights and of autocast.", choices=PRECISIONS)
    quantization: str = setting(
        "none", "Backend that stores the linear layers of the frozen denoiser in 8 or 4 bits.", choices=QUANTIZATIONS
    )
    offload: bool = setting(
        False,
        "Store the denoiser's linear layers in main memory, and copy each weight when it is used.",
        resume="rounding",
    )
    gradient_checkpointing: str | None = setting(
        None,
        "What gradient checkpointing recomputes in the backward pass: the networks' blocks, whole denoiser calls, or "
        "both (default: blocks, or both for methods that backpropagate through several denoiser calls).",
        choices=CHECKPOINTING,
        resume="rounding",
    )
    tiny_decoder: str | None = setting(
        None,
        "Tiny decoder (AutoencoderTiny) for the reward's gradient, a folder or a hub id such as madebyollin/taesd; "
        "sample images and evaluations use the model's own decoder.",
    )
    compile: bool = setting(False, "Compile the denoiser with torch.compile.", resume="rounding")

    eval_prompts: str | None = setting(
        None,
        "Evaluation prompts, as --prompts, or how many of --prompts to hold out; '' for no evaluations.",
        resume="fixed",
    )
    eval_rewards: str | None = setting(
        None, "Evaluation rewards: an expression that is measured but not trained on; '' for none.", resume="fixed"
    )
    eval_prompt_template: str | None = setting(
        None,
        "Template of prompts for a further evaluation of the base model, such as 'a professional photo of {prompt}': "
        "what other words reach without training; '' for none.",
        resume="fixed",
    )
    validation_steps: int = setting(
        0, "Updates between evaluations; 0 evaluates only before and after training.", low=0, resume="free"
    )
    num_validation_images: int = setting(2, "Images of each evaluation prompt.", low=1, resume="fixed")
    metric_for_best_model: str = setting(
        "",
        "Evaluation columns whose sum selects the best LoRA, such as eval/hpsv2 (default: the sum of --eval-rewards, "
        "else the reward).",
        resume="fixed",
    )
    early_stopping_patience: int = setting(
        0,
        "Early stopping: evaluations without improvement after which the run ends; 0 never stops early.",
        low=0,
        resume="free",
    )
    log_images_steps: int = setting(
        None, "Updates between grids of sample images; 0 samples only before and after training.", low=0, resume="free"
    )
    num_log_prompts: int = setting(8, "Number of prompts in a grid of sample images.", low=1, resume="free")
    log_gradient_snr: bool = setting(
        False, "Log the signal-to-noise ratio of the gradient over an update's batches.", resume="free"
    )
    report_to: str | None = setting(
        None,
        "Trackers, separated by commas: tensorboard, wandb, trackio, or none (default: tensorboard if installed).",
        resume="free",
    )

    output: str = setting("runs/draftune", "Folder of the run; it must not contain another run.", resume="free")
    checkpointing_steps: int = setting(
        None, "Updates between checkpoints, from which the same command resumes.", low=0, resume="free"
    )
    resume: bool = setting(
        True, "Resume the run in --output; --no-resume starts a new one in a folder beside it.", resume="free"
    )
    allow_changes: str = setting(
        "",
        "Settings that may differ from those of the run that is resumed, such as 'learning_rate,reward'.",
        resume="free",
    )

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        first = ("model", *ModelOptions._fields)
        values |= {f.name: checked(f, values[f.name]) for f in fields(self) if f.name in first}
        options = ModelOptions.of(values)
        options.check(values["model"])
        defaults = recommended(values["model"], options)
        if self.reward is not None and not same_expression(self.reward, defaults["reward"]):
            defaults = without_style(defaults)
        if any(values[name] is None for name in SAMPLING):
            tell_sampling(values["model"], options)
        values |= {name: value for name, value in defaults.items() if values[name] is None}
        if self.method is None:
            values["method"] = fit_to_steps(values["method"], values["num_inference_steps"])
        for f in fields(self):
            object.__setattr__(self, f.name, checked(f, values[f.name]))
        if not DEVICE.fullmatch(self.device):
            raise DraftuneError(f"device must be auto, cpu, mps, cuda or cuda:N, not {self.device!r}")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            other = f"lr_warmup_steps=0 instead of {self.lr_warmup_steps}"
            raise DraftuneError(f"lr_scheduler=constant has no warmup: use constant_with_warmup, or {other}")
        StepRange.parse(self.lora_steps).indices(self.num_inference_steps)
        if self.eval_prompt_template and PROMPT not in self.eval_prompt_template:
            raise DraftuneError(
                f"eval_prompt_template must contain {PROMPT}, which stands for each evaluation prompt, not "
                f"{self.eval_prompt_template!r}"
            )
        for name in self.trackers:
            if name not in TRACKERS:
                raise unknown("tracker in report_to", name, [*TRACKERS, "none"])

    @property
    def trackers(self) -> list[str]:
        """Return the names in `report_to`; none for "none" and while it is unset."""
        names = [name.strip() for name in (self.report_to or "none").split(",")]
        return [] if names == ["none"] else names

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings of a mapping by name. Raises DraftuneError that suggests the nearest known name."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise unknown("setting", str(key), known)
        return cls(**values)

    def to_yaml(self) -> str:
        """Return the settings as a YAML document."""
        import yaml

        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
