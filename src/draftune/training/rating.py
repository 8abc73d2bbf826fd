"""Ask for comparisons during training, and fit the reward `taste` to them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from draftune.errors import DraftuneError
from draftune.evaluation.rating import Pair, pair_settings, pairs, sampler, shuffled
from draftune.rewards import Reward
from draftune.rewards.base import sub_rewards
from draftune.rewards.comparisons import SKIP, Comparison, comparison, moved, read_comparisons, write_comparisons
from draftune.rewards.taste import Taste
from draftune.runs.checkpoint import preserve_rng
from draftune.settings import Settings
from draftune.utils.logging import logger

if TYPE_CHECKING:
    from draftune.report.rating import RatingServer
    from draftune.training.context import TrainContext
    from draftune.training.trainer import Trainer

RATINGS = "taste.csv"
"""File of the comparisons in a run's folder: those that the reward was built from, and those of the run."""

WAITING = "Training continues. The next pairs will appear here."


class RunRating:
    """Pauses training every `rate_every` updates for `rate_comparisons` pairs of the images that the run has reached.

    The same pairs are asked at the same update of a resumed run, unless the file has their answers.
    """

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.path = context.folder.path / RATINGS
        self.name = context.folder.path.name
        self.server: RatingServer | None = None

    def ask(self, trainer: Trainer, stop_requested: threading.Event) -> None:
        """Ask and fit the reward, if it is due before the next update.

        A reward that no longer predicts the answers ends the run.

        Raises:
            KeyboardInterrupt: `stop_requested` was set, and the answers and the present update are saved.
        """
        s, step = self.context.settings, trainer.global_step
        if not (s.rate_every and step and step % s.rate_every == 0):
            return
        with preserve_rng(), trainer.train_step.averaged():
            rows = self.answers(step, stop_requested)
        if stop_requested.is_set():
            trainer.save_checkpoint()
            raise KeyboardInterrupt(f"after update {step}; the same command resumes from there")
        try:
            self.learn(step, rows)
        except DraftuneError as error:
            logger.warning(f"update {step}: {error}; training ends")
            trainer.should_stop = True

    def answers(self, step: int, stop_requested: threading.Event) -> list[Comparison]:
        """Serve the page until all pairs of this update have answers; return all rows of the file."""
        from draftune.report.rating import RatingSession

        if not self.path.is_file():
            source = find_taste(self.context.reward).ratings
            rows = [replace(row, model=self.other(row.model)) for row in read_comparisons(source)]
            write_comparisons(self.path, moved(rows, source, self.path))
        s = self.context.settings
        known = pair_settings(s)

        def describe(pair: Pair, choice: str) -> Comparison:
            return comparison(pair.prompt, choice, self.name, step, pair.seeds, known)

        asked = pairs(prompts_at(step, self.context.prompts, s), s.rate_comparisons, seed=2 * step)
        title = f"{self.name}, update {step}"
        sample = sampler(self.context.model, s, [pair.prompt for pair in asked])
        session = RatingSession(self.path, asked, describe, sample, title)
        if not session.finished:
            server = self.serve()
            logger.info(f"update {step}: compare {len(session.open_rows)} pairs at {server.address}; training waits")
            server.session = session
            session.run(stop_requested.is_set)
            server.session = None
        return session.rows

    def learn(self, step: int, rows: Sequence[Comparison]) -> None:
        """Fit the reward to the comparisons up to this update. Raises DraftuneError if it is not above chance."""
        taste = find_taste(self.context.reward)
        decided = [row for row in rows if row.choice != SKIP and not self.is_own(row, step + 1)]
        new = [row for row in decided if self.is_own(row, step)]
        if new:
            logger.info(f"update {step}: the reward predicted {taste.predict(self.path, new)} of the new comparisons")
        taste.learn_comparisons(self.path, decided)

    def is_own(self, row: Comparison, first: int) -> bool:
        """Return whether a comparison is of this run, after update `first` or later."""
        return row.model == self.name and row.update.isdecimal() and int(row.update) >= first

    def other(self, model: str) -> str:
        """Return the name of another source of images, which is not that of this run, as of an earlier run there."""
        return f"{model} (earlier)" if model == self.name else model

    def serve(self) -> RatingServer:
        """Return the server, which stays at one address during the run."""
        from draftune.report.rating import PORT, RatingServer

        if self.server is None:
            try:
                self.server = RatingServer(PORT, WAITING)
            except DraftuneError:
                self.server = RatingServer(0, WAITING)  # another run has the port
        return self.server

    def close(self) -> None:
        """End the server."""
        if self.server is not None:
            self.server.server_close()
            self.server = None


def find_taste(reward: Reward) -> Taste:
    """Return the part of a reward that is fitted during training.

    Raises:
        DraftuneError: there is not exactly one.
    """
    found = [part for part in sub_rewards(reward).values() if isinstance(part, Taste)]
    if len(found) != 1:
        raise DraftuneError(f"rate_every needs one taste(ratings=FILE) in the reward, which has {len(found)}")
    return found[0]


def check_rating(settings: Settings, reward: Reward, num_processes: int) -> None:
    """Raise DraftuneError if `rate_every` does not fit the reward, or the number of processes."""
    if settings.rate_every:
        find_taste(reward)
        if num_processes > 1:
            raise DraftuneError(f"rate_every={settings.rate_every} works in one process, not in {num_processes}")


def prompts_at(step: int, prompts: Sequence[str], settings: Settings) -> list[str]:
    """Return the prompts that are asked about at an update: the next ones of the training prompts, shuffled."""
    count, prompts = settings.rate_comparisons, shuffled(prompts, settings.seed)
    first = (step // settings.rate_every - 1) * count
    return [prompts[(first + i) % len(prompts)] for i in range(min(count, len(prompts)))]


def asked_prompts(prompts: Sequence[str], settings: Settings) -> list[str]:
    """Return the prompts of all pauses of a run, each once."""
    steps = range(settings.rate_every, settings.steps, settings.rate_every) if settings.rate_every else ()
    return list(dict.fromkeys(prompt for step in steps for prompt in prompts_at(step, prompts, settings)))
