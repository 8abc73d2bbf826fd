"""What is looked at while a run goes on: the same prompts and seeds every time, beside the base model's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from draftune.evaluation.criterion import DENOISER_MSE, PIXEL_L1, rule_of
from draftune.evaluation.metrics import (
    KEPT_COLUMN,
    Comparison,
    Evaluation,
    denoiser_mse_by_prompt,
    evaluate,
    score_batches,
)
from draftune.lora import save_lora
from draftune.models import Model
from draftune.rewards import Reward
from draftune.runs.checkpoint import undisturbed
from draftune.runs.logs import EVALUATIONS, SAMPLES
from draftune.runs.run_dir import RunFolder
from draftune.sampling.schedule import Schedule
from draftune.settings import Settings
from draftune.training.continued import Past
from draftune.training.early_stopping import Guard
from draftune.utils.images import grid, save_image, to_pil
from draftune.utils.processes import tell


class Watch:
    """Grids of samples, evaluations and the best LoRA of one run; training draws the same numbers without it."""

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        model: Model,
        schedule: Schedule,
        reward: Reward,
        held_out: Reward | None,
        prompts: Sequence[str],
        eval_prompts: Sequence[str] | None,
        past: Past | None = None,
    ) -> None:
        self.settings, self.folder, self.model, self.schedule = settings, folder, model, schedule
        self.reward, self.held_out, self.eval_prompts = reward, held_out, eval_prompts
        self.past, self.processes = past, folder.processes
        shown = eval_prompts or prompts
        count = min(settings.sample_prompts, len(shown))
        self.shown = [shown[i * len(shown) // count] for i in range(count)]
        self.evaluations: dict[int, Evaluation] = {}
        self.guard: Guard | None = None
        self.last_shown = -1

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures [N, 3, H, W] on the CPU, of which each process draws as many."""
        s, processes = self.settings, self.processes
        own = processes.padded_share(list(zip(prompts, seeds, strict=True)))
        pictures = self.model.generate(
            [prompt for prompt, _ in own],
            [seed for _, seed in own],
            self.schedule,
            s.guidance_scale,
            s.negative_prompt,
            s.batch_size // processes.count,
            progress=processes.main,
        )
        return processes.gather(pictures)[: len(prompts)]

    @undisturbed()
    def show(self, step: int) -> None:
        """The grid of samples at this update, the single pictures, and a line of samples.jsonl with their scores."""
        if step == self.last_shown:
            return
        pictures = self.draw(self.shown, range(len(self.shown)))
        self.last_shown = step
        with self.processes.together():
            scores = score_batches(self.reward, pictures, self.shown, self.model.device)[0].tolist()
        if not self.processes.main:
            return
        captions = [f"{score:.3g}" for score in scores]
        if step == 0:
            self.base_pictures, self.base_captions = pictures, captions
        path = self.folder.sample_path(step)
        save_image(grid([pictures], [], self.shown, [captions]), path)
        for i, picture in enumerate(to_pil(pictures)):
            save_image(picture, path.with_suffix("") / f"{i:02d}.png")
        if step == 0 and self.folder.done:
            return  # a run that goes on has its sheet
        self.folder.log(SAMPLES, {"step": step, "prompts": list(map(str, self.shown)), "scores": scores})
        rows = [self.base_pictures, pictures]
        sheet = grid(rows, ["before", "after"], self.shown, [self.base_captions, captions])
        save_image(sheet, self.folder.path / "before_after.png")

    @undisturbed()
    def evaluate(self, step: int, counted: Mapping[str, float]) -> None:
        """The scores of the held-out prompts' pictures, where the run has any: a line of evaluations.jsonl."""
        if not self.eval_prompts or step in self.evaluations:
            return
        s, device = self.settings, self.model.device
        found = evaluate(self.draw, self.reward, self.held_out, self.eval_prompts, s.eval_images, device)
        found.values |= self.remembered(found)
        # Only the first and the last are compared in the end; pictures take memory.
        self.evaluations = {0: self.evaluations.get(0, found), step: found}
        distance = float((found.images - self.evaluations[0].images).abs().mean())
        moved = {PIXEL_L1: distance, DENOISER_MSE: self.denoiser_mse(self.eval_prompts[: s.batch_size])}
        measured = {"step": step, **counted, **found.scores, **moved, "stderr": found.stderr}
        # The others may have measured something else in the last digits, and all are to decide alike.
        row = self.processes.of_main(measured)
        if self.guard is None:
            rule = rule_of(s.best_by, self.held_out)
            self.guard = Guard(rule or {self.reward.label: 1.0}, s.patience, self.reward.label)
            for old in self.folder.rows[EVALUATIONS]:
                # Evaluations before a change of the reward (`allow_changes`) do not compare with those after it.
                if rule or self.reward.label in old:
                    self.guard.see(old)
        if any(row["step"] == old["step"] for old in self.guard.rows):
            return  # measured again because the run goes on
        best = self.guard.see(row)
        self.folder.log(EVALUATIONS, {**row, "best": best})
        if best and self.processes.main:
            save_lora(self.model, self.folder.path / "best")
        if warning := self.guard.warning():
            tell(warning)

    def remembered(self, found: Evaluation) -> dict[str, Tensor]:
        """How the reward of an earlier training fares on its own prompts, by column."""
        if self.past is None or self.past.reward is None:
            return {}
        reward, prompts = self.past.reward, self.past.prompts
        # The pictures of the same prompts are there already.
        draw = (lambda *_: found.images) if list(prompts) == list(self.eval_prompts or ()) else self.draw
        kept = evaluate(draw, reward, None, prompts, self.settings.eval_images, self.model.device)
        return {f"{KEPT_COLUMN}{label}": values for label, values in kept.values.items()}

    def denoiser_mse(self, prompts: Sequence[str]) -> float:
        """Compute `denoiser_mse_from_base` over these prompts; each process measures a part of them."""
        s, own = self.settings, self.processes.padded_share(list(enumerate(prompts)))
        texts, seeds = [prompt for _, prompt in own], [seed for seed, _ in own]
        found = denoiser_mse_by_prompt(self.model, texts, seeds, self.schedule, s.guidance_scale, s.negative_prompt)
        return float(self.processes.gather(found)[: len(prompts)].mean())

    @property
    def best(self) -> int | None:
        """The update of the best evaluation."""
        return int(self.guard.best["step"]) if self.guard and self.guard.best else None

    @property
    def exhausted(self) -> bool:
        """Whether the evaluations have stopped getting better for as long as patience allows."""
        return self.guard is not None and self.guard.exhausted

    def comparison(self) -> Comparison | None:
        """The base model against the last evaluation."""
        if not self.evaluations:
            return None
        return Comparison(self.evaluations[0], self.evaluations[max(self.evaluations)])
