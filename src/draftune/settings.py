"""Every setting of a run: one table for Python, YAML and the command line. Imports no torch."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.prompts import is_text
from draftune.recommended import SAMPLING, recommended, same_method, tell_sampling
from draftune.registry.factories import TYPE_NAMES
from draftune.utils.paths import user_path

PRECISIONS = ("no", "fp16", "bf16")
CHECKPOINTING = ("no", "blocks", "calls", "both")
PIXEL_CLAMPS = ("straight_through", "hard")
MOST = 2**63 - 1
SPACINGS = ("leading", "trailing", "linspace")


def setting(
    default: Any, help: str, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None
) -> Any:
    """A field with what the command line says of it, and the values that it may have."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass
class Settings:
    """What a training run is told. Where the default is None, the model's recommended value is taken.

    The defaults are those of the paper's small runs (Clark et al., arXiv 2309.17400) where it states them.
    Raises DraftuneError for a value out of range.
    """

    model: str = setting("emoji", "'emoji', the folder of a diffusers pipeline, or a hub id")
    reward: str = setting(
        None, "expression, such as 'clip + 0.1*jpeg_compressibility(quality=80)' or 'my/file.py:function'"
    )
    reward_batch_size: int = setting(
        1, "pictures that are decoded and scored at once; more take more memory and may be faster", low=1
    )
    normalize_reward: int = setting(
        0, "base pictures by whose spread each part of the reward is divided before its weight; 0: as it is", low=0
    )
    method: str = setting(None, "draft, draft_k(k=10), draft_lv(n=2), refl(m=20), … (see 'draftune list methods')")
    prompts: str = setting(
        None,
        "a named set (see 'draftune list prompts') or a file: .txt with one a line, .csv, .tsv, .json, .jsonl, .yaml",
    )
    output: str = setting("runs/draftune", "the run's folder; it must not hold another run")
    continue_from: str = setting(
        "", "a run, a LoRA file or its folder: another LoRA is trained on top of that one, which stays as it is"
    )
    skip_text_encoder_lora: bool = setting(False, "leave out the layers of text encoders in the continued LoRA")
    keep: str = setting(
        "", "prompts on which the continued model stays as it was: a named set or a file, best that of its own training"
    )
    keep_weight: float = setting(
        3.0, "how firmly: against a reward of spread 1, as --normalize-reward makes it; 0: not at all", low=0
    )
    resume: bool = setting(True, "go on with the run in that folder; --no-resume begins anew in one beside it")
    allow_changes: str = setting(
        "", "settings such as 'learning_rate,reward' in which a run that goes on may differ from what it was"
    )

    steps: int = setting(None, "updates", low=1)
    batch_size: int = setting(4, "pictures drawn for one backward pass, of all processes together", low=1)
    prefix_reuse: int = setting(
        None, "updates in a row that share a batch, whose steps without gradient are made for the first alone", low=1
    )
    prefix_stride: int = setting(1, "of the steps without gradient, how many training makes as one", low=1)
    gradient_accumulation_steps: int = setting(1, "batches for one update", low=1)
    optimizer: str = setting("adamw", "adamw, sgd(momentum=0.9), … (see 'draftune list optimizers')")
    gradient_filter: str = setting(
        "", "applied to the gradients of the LoRA's output channels (see 'draftune list filters'); '' for none"
    )
    learning_rate: float = setting(None, "of the optimiser", low=0)
    lr_warmup_steps: int = setting(0, "updates over which the learning rate rises", low=0)
    adam_beta1: float = setting(0.9, "of AdamW", low=0, high=0.9999)
    adam_beta2: float = setting(0.999, "of AdamW", low=0, high=0.9999)
    weight_decay: float = setting(0.1, "of AdamW", low=0)
    on_nonfinite: str = setting(
        "stop",
        "what an infinite or undefined reward or gradient does: end the run, or leave the update out",
        choices=("stop", "skip"),
    )
    signal_to_noise: bool = setting(False, "measure how much of the gradient is noise, from an update's batches")
    max_grad_norm: float = setting(1.0, "the gradient's norm is clipped to this; 0 clips nothing", low=0)
    seed: int = setting(0, "of the LoRA, the prompts' order and the noise", low=0)

    num_inference_steps: int = setting(None, "sampling steps T, in training too", low=1)
    guidance_scale: float = setting(None, "classifier-free guidance, in training too; at most 1 means none", low=0)
    negative_prompt: str = setting("", "what guidance leads away from")
    timestep_spacing: str | None = setting(None, "where the sampler's steps lie", choices=SPACINGS)
    set_alpha_to_one: bool | None = setting(None, "the last step leads to the clean latent; the model's own unless set")
    height: int | None = setting(None, "of the pictures in pixels; the model's own unless set", low=1)
    width: int | None = setting(None, "of the pictures in pixels; the model's own unless set", low=1)

    lora_rank: int = setting(8, "of the LoRA", low=1)
    lora_alpha: float | None = setting(None, "the LoRA acts at alpha / rank; the rank unless set", low=0)
    lora_targets: str = setting("to_q,to_k,to_v,to_out.0", "ends of the names of the layers to adapt")

    mixed_precision: str = setting("no", "of the frozen weights and the networks' arithmetic", choices=PRECISIONS)
    gradient_checkpointing: str | None = setting(
        None,
        "what the backward pass computes again: blocks of the networks, whole calls, or both; unless set, blocks, and "
        "both where a graph holds several calls",
        choices=CHECKPOINTING,
    )
    gradient_decoder: str | None = setting(
        None,
        "an AutoencoderTiny of the same latents, a folder or a hub id such as madebyollin/taesd: training decodes and "
        "scores by it, sample grids and evaluations by the model's own",
    )
    pixel_clamp: str = setting(
        "straight_through",
        "the reward's gradient at decoded pixels outside [0, 1]: passed on unchanged, or 0 as a clamp's is",
        choices=PIXEL_CLAMPS,
    )
    cpu: bool = setting(False, "train on the CPU even where there is a GPU")

    sample_every: int = setting(None, "updates between grids of sample pictures; 0: only first and last", low=0)
    sample_prompts: int = setting(8, "prompts in a grid of sample pictures", low=1)
    save_every: int = setting(None, "updates between checkpoints, from which the same command goes on", low=0)
    eval_prompts: str | None = setting(
        None, "prompts for the comparison of base and tuned at the end: a set or a file; '' for none"
    )
    eval_every: int = setting(0, "updates between evaluations on these prompts; 0: only first and last", low=0)
    best_by: str = setting(
        "", "columns of the evaluations whose sum picks the best LoRA, such as held-out/hpsv2; unless set --held-out"
    )
    patience: int = setting(0, "evaluations without a better one after which the run ends; 0: it goes on", low=0)
    eval_images: int = setting(2, "pictures of each of these prompts", low=1)
    held_out: str | None = setting(
        None, "rewards that are only measured in that comparison, not trained on; '' for none"
    )

    def __post_init__(self) -> None:
        self.model = checked(next(f for f in fields(self) if f.name == "model"), self.model)
        values = recommended(self.model)
        if isinstance(self.method, str) and not same_method(self.method, values["method"]):
            # What is recommended for one method may be nothing for another.
            values = values | {"prefix_reuse": 1}
        if any(getattr(self, name) is None for name in SAMPLING):
            tell_sampling(self.model)
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for f in fields(self):
            setattr(self, f.name, checked(f, getattr(self, f.name)))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from names and values. Raises DraftuneError that names the nearest known key."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise unknown("setting", str(key), known)
        return cls(**values)

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises DraftuneError if it is not a table of them."""
    import yaml

    path = user_path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise DraftuneError(f"cannot read the settings file {str(path)!r}: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise DraftuneError(f"{str(path)!r} is not YAML{line}: {getattr(error, 'problem', error)}") from error
    except (ValueError, RecursionError) as error:
        raise DraftuneError(f"{str(path)!r} holds a value that can't be read: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DraftuneError(f"{str(path)!r} must hold 'setting: value' lines")
    # YAML lets the last one win without a word.
    names = [key.value for key, _ in getattr(node, "value", ())]
    for key in names:
        if names.count(key) > 1:
            raise DraftuneError(f"{str(path)!r} says {key!r} twice")
    return values


def optional(f: Field[Any]) -> bool:
    """Whether its type allows None, where '' says none too."""
    return isinstance(hints()[f.name], types.UnionType)


@cache
def hints() -> dict[str, Any]:
    """The fields' types, which take a while to read."""
    return typing.get_type_hints(Settings)


def kind(f: Field[Any]) -> type:
    """str, int, float or bool: what a field holds where it is not None."""
    hint = hints()[f.name]
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    assert isinstance(hint, type)
    return hint


def checked(f: Field[Any], value: Any) -> Any:
    """The value in the field's type. Raises DraftuneError if it has another, or is out of range."""
    if value is None:
        if f.default is None or f.default is MISSING:
            return None
        raise DraftuneError(f"{f.name} must have a value")
    wanted = kind(f)
    if value is False and "no" in f.metadata["choices"]:
        value = "no"  # as YAML 1.1 reads it
    if wanted is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as text.
        with suppress(ValueError, OverflowError):
            value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise DraftuneError(f"{f.name} must be {TYPE_NAMES[wanted]}, not {value!r}")
    if isinstance(value, str) and not (value.strip() or f.default == "" or optional(f)):
        raise DraftuneError(f"{f.name} must not be empty")
    if isinstance(value, str) and ("\0" in value or not is_text(value)):
        raise DraftuneError(f"{f.name} must be text that can be written, not {value!r}")
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if high is None and wanted is int:
        high = MOST
    if low is not None and not value >= low:
        raise DraftuneError(f"{f.name} must be at least {low:g}, not {value!r}")
    if high is not None and not value <= high:
        raise DraftuneError(f"{f.name} must be at most {high:g}, not {value!r}")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise DraftuneError(f"{f.name} must be finite")
    if choices and value not in choices:
        raise unknown(f.name, str(value), choices)
    return value
