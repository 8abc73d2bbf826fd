"""Sample grids and evaluations during training, always with the same prompts and seeds, and the best LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from draftune.evaluation.criterion import DENOISER_MSE, EVAL_PREFIX, PIXEL_L1, default_criterion
from draftune.evaluation.metrics import (
    RETAINED_PREFIX,
    Comparison,
    Evaluation,
    denoiser_mse_by_prompt,
    evaluate,
    score_batches,
)
from draftune.lora import lora_parameters, save_lora
from draftune.rewards import Reward
from draftune.rewards.base import sub_rewards
from draftune.rewards.online import OnlineReward
from draftune.runs.checkpoint import load_random_state, preserve_rng, random_state
from draftune.runs.logs import CHANGE, EVALUATIONS, SAMPLES, TEMPLATE
from draftune.training.callbacks import Samples
from draftune.training.context import TrainContext
from draftune.training.early_stopping import EarlyStopping
from draftune.training.optim import UP
from draftune.training.trackers import installed_trackers
from draftune.utils.images import grid, save_image, to_pil
from draftune.utils.logging import logger


class Validation:
    """Sample images and evaluate the model during training. The random numbers of training are not affected.

    Attributes:
        shown: Prompts of the sample grids.
        evaluations: The first and the last evaluation, by update.
        last_shown: Update of the last sample grid, -1 before the base model's.
    """

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.shown = context.log_prompts
        self.evaluations: dict[int, Evaluation] = {}
        self.last_shown = -1
        self.random_at_start = random_state()

    @property
    def base_comes_first(self) -> bool:
        """Return whether the base model is evaluated before the first update, not with the first evaluation after it.

        A reward that changes during training scores the base model as it is at the start. Hosted trackers refuse a step
        that is lower than the last one.
        """
        s, parts = self.context.settings, sub_rewards(self.context.reward).values()
        changes = any(isinstance(part, OnlineReward) or type(part).on_step is not Reward.on_step for part in parts)
        return bool(s.rate_every) or changes or installed_trackers(s) not in ([], ["tensorboard"])

    @preserve_rng()
    def log_samples(self, step: int) -> Samples | None:
        """Write the sample grid of an update, its single images, and their scores as a line of samples.jsonl.

        Returns:
            The images with their prompts and scores; None if this update's grid was written before.
        """
        if step == self.last_shown:
            return None
        context, folder = self.context, self.context.folder
        images = context.sample_images(self.shown, range(len(self.shown)))
        self.last_shown = step
        with context.processes.raise_on_all_ranks():
            scores = score_batches(context.reward, images, self.shown, context.model.device)[0].tolist()
        samples = Samples(to_pil(images), self.shown, scores)
        resumed = step == 0 and folder.done > 0
        if not context.processes.main:
            return None if resumed else samples
        captions = [f"{score:.3g}" for score in scores]
        if step == 0:
            self.base_images, self.base_captions = images, captions
        path = folder.sample_path(step)
        save_image(grid([images], [], self.shown, [captions]), path)
        for i, image in enumerate(samples.images):
            save_image(image, path.with_suffix("") / f"{i:02d}.png")
        if resumed:
            return None  # it has a newer before_after.png
        folder.log(SAMPLES, {"step": step, "prompts": list(map(str, self.shown)), "scores": scores})
        rows = [self.base_images, images]
        sheet = grid(rows, ["before", "after"], self.shown, [self.base_captions, captions])
        save_image(sheet, folder.path / "before_after.png")
        return samples

    def evaluate(self, step: int, counted: Mapping[str, float]) -> list[dict[str, Any]]:
        """Evaluate the model on the evaluation prompts, if there are any, and save the LoRA if it is the best so far.

        The first time, the base model is evaluated before it.

        Args:
            step: Number of updates so far.
            counted: Further columns of the row, such as the seconds of training.

        Returns:
            The new rows of evaluations.jsonl; none for an update that was evaluated before.
        """
        if not self.context.eval_prompts or step in self.evaluations:
            return []
        rows = []
        if step and 0 not in self.evaluations:
            count = len(self.context.eval_prompts) * self.context.settings.num_validation_images
            logger.info(f"update {step}: the base model is evaluated first, on {count} images")
            with self.base_model():
                rows.append(self.evaluate_now(0, {name: type(value)() for name, value in counted.items()}))
        rows.append(self.evaluate_now(step, counted))
        return [row for row in rows if row is not None]

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Set the LoRA to 0 inside the block, and the global random generators to their states at the start."""
        ups = [tensor for name, tensor in lora_parameters(self.context.model).items() if UP in name]
        trained = [tensor.detach().clone() for tensor in ups]
        with preserve_rng(), torch.no_grad():
            load_random_state(*self.random_at_start)
            for tensor in ups:
                tensor.zero_()
            try:
                yield
            finally:
                for tensor, values in zip(ups, trained, strict=True):
                    tensor.copy_(values)

    @preserve_rng()
    def evaluate_now(self, step: int, counted: Mapping[str, float]) -> dict[str, Any] | None:
        """Evaluate the model. Return the row of `evaluate`, None if the log has one of this update."""
        context, s, device = self.context, self.context.settings, self.context.model.device
        assert context.eval_prompts
        evaluation = evaluate(
            context.sample_images,
            context.reward,
            context.eval_rewards,
            context.eval_prompts,
            s.num_validation_images,
            device,
        )
        evaluation.values |= self.retention_scores(evaluation)
        # Images take memory: only the first and the last evaluation are compared in the end.
        self.evaluations = {0: self.evaluations.get(0, evaluation), step: evaluation}
        distance = float((evaluation.images - self.evaluations[0].images).abs().mean())
        moved = {PIXEL_L1: distance, DENOISER_MSE: self.denoiser_mse(context.eval_prompts[: s.batch_size])}
        stderr = {name: error for name, error in evaluation.stderr.items() if math.isfinite(error)}
        measured = {"step": step, **counted, **evaluation.scores, **moved, "stderr": stderr}
        if step:
            measured[CHANGE] = Comparison(self.evaluations[0], evaluation).bounds()
        elif not context.folder.rows[EVALUATIONS]:  # a resumed run has them
            measured |= self.template_scores()
        # Processes may differ in the last digits, but must decide alike.
        row = context.processes.broadcast(measured)
        guard = self.guard
        if any(row["step"] == old["step"] for old in guard.rows):
            return None
        row["best"] = guard.update(row)
        context.folder.log(EVALUATIONS, row)
        if row["best"] and context.processes.main:
            save_lora(context.model, context.folder.path / "best")
        if warning := guard.warning():
            logger.warning(warning)
        return dict(row)

    def template_scores(self) -> dict[str, dict[str, float]]:
        """Score the base model's images for the prompts of `eval_prompt_template`, by column, under "template".

        Scores that are not finite are left out. The rewards are given the evaluation prompts, as for all evaluations.
        """
        context, s = self.context, self.context.settings
        words = dict(zip(context.eval_prompts or (), context.template_prompts, strict=False))
        if not words:
            return {}

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return context.sample_images([words[prompt] for prompt in prompts], seeds)

        evaluation = evaluate(
            draw, context.reward, context.eval_rewards, list(words), s.num_validation_images, context.model.device
        )
        return {TEMPLATE: {name: score for name, score in evaluation.scores.items() if math.isfinite(score)}}

    @cached_property
    def guard(self) -> EarlyStopping:
        """Return early stopping, with the evaluations before the checkpoint that the run is resumed from."""
        context = self.context
        rule = default_criterion(context.settings.metric_for_best_model, context.eval_rewards)
        label, judged = context.reward.label, context.eval_rewards
        terms = judged.named_terms if judged is not None else {}
        guard = EarlyStopping(
            rule or {label: 1.0},
            context.settings.early_stopping_patience,
            label,
            {f"{EVAL_PREFIX}{name}": weight for name, (weight, _) in terms.items()},
        )
        for row in context.folder.rows[EVALUATIONS]:
            if row["step"] <= context.folder.reward_since:
                row = {name: value for name, value in row.items() if name != label}  # of another reward
            if all(name in row for name in guard.weights):
                guard.update(row)
        return guard

    def retention_scores(self, evaluation: Evaluation) -> dict[str, Tensor]:
        """Score the earlier training's reward on its own evaluation prompts, by column (`retained/...`)."""
        context, past = self.context, self.context.continued_run
        if past is None or past.reward is None:
            return {}
        sample = context.sample_images
        if list(past.prompts) == list(context.eval_prompts or ()):
            sample = lambda *_: evaluation.images  # noqa: E731 - these images exist already
        scores = evaluate(
            sample, past.reward, None, past.prompts, context.settings.num_validation_images, context.model.device
        ).values
        return {f"{RETAINED_PREFIX}{label}": values for label, values in scores.items()}

    def denoiser_mse(self, prompts: Sequence[str]) -> float:
        """Compute `denoiser_mse_from_base` over the prompts, which are divided among the processes."""
        context, s = self.context, self.context.settings
        own = context.processes.shard_padded(list(enumerate(prompts)))
        texts, seeds = [prompt for _, prompt in own], [seed for seed, _ in own]
        errors = denoiser_mse_by_prompt(
            context.model, texts, seeds, context.schedule, s.guidance_scale, s.negative_prompt
        )
        return float(context.processes.gather(errors)[: len(prompts)].mean())

    @property
    def best(self) -> int | None:
        """Return the update of the best evaluation. Before the first one that is the base model."""
        return int(self.guard.best["step"]) if self.guard.best else 0 if self.context.eval_prompts else None

    @property
    def should_stop(self) -> bool:
        """Return whether early stopping ends the run."""
        return self.guard.should_stop

    def comparison(self) -> Comparison | None:
        """Return the base model's evaluation and the last one; None without evaluations."""
        if not self.evaluations:
            return None
        template = self.context.folder.rows[EVALUATIONS][0].get(TEMPLATE, {})
        return Comparison(self.evaluations[0], self.evaluations[max(self.evaluations)], template)
