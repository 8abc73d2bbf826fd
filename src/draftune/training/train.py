"""From what a user says to a run: everything cheap is checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, gather, unknown
from draftune.methods import load_method
from draftune.methods.retention import Keep
from draftune.models import Model, load_model
from draftune.models.tiny_decoder import find_small_decoder, load_small_decoder
from draftune.prompts import load_prompts
from draftune.recommended import SAMPLING, same_method
from draftune.rewards import find_reward
from draftune.rewards.online import taught
from draftune.runs.run_dir import RunFolder
from draftune.settings import Settings
from draftune.training.continued import find_past
from draftune.training.distributed import accelerator, processes_of, tell_unheeded
from draftune.training.early_stopping import DENOISER_MSE, DIVERSITY, HELD_OUT, weights_of
from draftune.training.optim import check_optimizer
from draftune.training.trainer import Run, Trainer
from draftune.utils.processes import tell


def train(
    model: Any = None,
    reward: Any = None,
    *,
    settings: Settings | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    held_out: Any = None,
    **values: Any,
) -> Run:
    """Fine-tunes a LoRA on a reward through sampling; the model carries it afterwards.

    `model`, `reward` and `prompts` are names, paths and expressions, or ready objects; every other setting is a
    field of Settings, given by name or all at once as `settings`. Raises DraftuneError before anything is trained
    if something does not fit.
    """
    return prepare(model, reward, settings=settings, prompts=prompts, held_out=held_out, **values).run()


def prepare(
    model: Any = None,
    reward: Any = None,
    *,
    settings: Settings | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    held_out: Any = None,
    **values: Any,
) -> Trainer:
    """All that `train` does before it trains: everything is checked and loaded, and nothing is written."""
    if model is not None and not isinstance(model, (str, Path, Model)):
        model = load_model(model)  # a pipeline, whose family says what is recommended
    named = {"model": model, "reward": reward, "prompts": prompts, "held_out": held_out}
    values |= {key: describe(value) for key, value in named.items() if value is not None}
    given = asdict(settings) if settings else {}
    if settings is None and isinstance(model, Model):
        given = model.recommended  # its name may be that of no folder
    values = {name: value for name, value in values.items() if name not in SAMPLING or value is not None}
    if settings and not same_method(str(values.get("method", settings.method)), settings.method):
        given.pop("prefix_reuse")  # which is recommended by the method
    settings = Settings.from_mapping(given | values)
    # What is cheap to check is checked before anything is loaded.
    texts = load_prompts(settings.prompts if prompts is None or isinstance(prompts, (str, Path)) else list(prompts))
    if settings.patience and not (settings.eval_every and settings.eval_prompts):
        raise DraftuneError("patience counts evaluations: it wants --eval-prompts and --eval-every")
    weights = weights_of(settings.best_by) if settings.best_by else {}
    eval_texts = load_prompts(settings.eval_prompts) if settings.eval_prompts else None
    method = load_method(settings.method)
    if settings.mixed_precision == "fp16" and not method.half_precision:
        raise DraftuneError(f"the method {settings.method!r} does not work in fp16: use bf16 or no")
    check_optimizer(settings, method)
    images = settings.batch_size * settings.gradient_accumulation_steps
    if images < method.min_images_per_update:
        raise DraftuneError(
            f"the method {settings.method!r} compares the rewards of an update with each other: batch_size times "
            f"gradient_accumulation_steps must be at least {method.min_images_per_update}, not {images}"
        )
    past = find_past(settings)
    if past is not None and past.kept:
        method = Keep(method, settings.keep_weight)
        if not settings.normalize_reward:
            tell(
                f"--keep-weight {settings.keep_weight:g} is weighed against the reward's own scale: "
                "--normalize-reward 32 makes its spread 1"
            )
    for name in ("prefix_reuse", "prefix_stride"):
        if getattr(settings, name) > 1 and not method.has_prefix():
            raise DraftuneError(f"the method {settings.method!r} does not begin without gradient: {name} must be 1")
    if settings.prefix_reuse > 1 and not method.shares_prefix():
        raise DraftuneError(
            f"prefix_reuse={settings.prefix_reuse} does not work with the method {settings.method!r}: updates share "
            "steps without gradient only where these end at the same step in each update (Method.shares_prefix); "
            "prefix_reuse must be 1"
        )
    if settings.gradient_decoder and not method.needs_gradient:
        raise DraftuneError(f"the method {settings.method!r} takes no gradient of the reward: no gradient_decoder")
    judged = held_out or settings.held_out
    # Known to each other from here on: how transformers loads weights depends on it.
    processes = processes_of(accelerator(settings))
    tell_unheeded(settings)
    with processes.together():
        contents: dict[str, Sequence[str]] = {"prompts": texts, "eval_prompts": eval_texts or []}
        if past is not None:
            contents |= {"keep": past.kept, "continue_from": [past.checksum]}
        folder = RunFolder(settings, contents, processes)
        # Every reward's weights are found before any network is loaded.
        score, judge = gather(
            lambda: find_reward(settings.reward if reward is None else reward),
            lambda: find_reward(judged) if judged else None,
        )
        assert score is not None
        if settings.normalize_reward:
            taught(score)
        held = [f"{HELD_OUT}{label}" for label in judge.columns] if judge is not None else []
        kept = past.columns if past is not None else []
        for column in weights:
            if column not in (
                known := [score.label, *score.columns, *held, *kept, DIVERSITY, "distance", DENOISER_MSE]
            ):
                raise unknown("column of the evaluations", column, known)
        decoder = find_small_decoder(settings.gradient_decoder) if settings.gradient_decoder else None
        wanted = settings.model if model is None else model
        painter = model if isinstance(model, Model) else load_model(wanted, settings.mixed_precision)
        painter.small_decoder = load_small_decoder(decoder, painter) if decoder else None
    folder.agree()
    return Trainer(settings, folder, method, painter, score, judge, texts, eval_texts, past)


def describe(value: Any) -> str:
    """What the saved settings say of an object that was given ready-made."""
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"{len(value)} prompts given in Python"
    names = (getattr(value, attribute, None) for attribute in ("name", "expression", "label", "__name__"))
    return str(next(filter(None, names), "given"))
