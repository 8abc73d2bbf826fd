"""An experiment on two rewards one after the other, for prompts of two kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from draftune.evaluation.metrics import evaluate
from draftune.experimental.distill import distill_lora
from draftune.figures import figure, legend
from draftune.lora import FILE_NAME
from draftune.prompts import load_prompts
from draftune.reproduce.lab import GUIDANCE, NAMED, ONE, REWARD, Lab, Scale, Work, slug
from draftune.reproduce.loras import ORANGE, at_reward
from draftune.reproduce.report import Claim, Experiment, Report, compared, spread
from draftune.rewards import load_reward
from draftune.runs.logs import METRICS, read_rows
from draftune.runs.merge import merge_loras
from draftune.training import train
from draftune.utils.paths import written_whole

FACE = "face"
"""In the names on which the first reward is to be kept; the second is asked of all the others."""
WEIGHTS = (0.1, 1.0)
"""For a reward whose spread over a batch is 0.03: 3 and 30 of its spreads."""
RANK, PATHS = 8, 20
BASE, FIRST, PLAIN, HALF = "no training", "first alone", "second, plainly", "half of that"
ADDED, AT_ONCE = "two added", "both at once"
NORMALIZED = 16
"""Pictures by whose spread two rewards in one run are divided, so that they compare."""
SMALL = f"kept at {WEIGHTS[0]:g}, rank {RANK}"
STYLE, COLOR = "3D of faces", "orange of things"
"""The reward that was trained first where it is to be kept, the second where it was asked for."""
Row = dict[str, Any]


def kept_at(weight: float) -> str:
    return f"kept at {weight:g}"


def first_work(seed: int, scale: Scale) -> Work:
    # Of seeds whose runs no other experiment makes longer: the LoRA is that of the last update.
    return Work(ONE, scale.steps, seed + 1)


def second_work(scale: Scale) -> list[Work]:
    """What goes on from these is made with the report."""
    return [first_work(seed, scale) for seed in range(scale.seeds)]


def groups(names: Sequence[str], count: int) -> dict[str, list[str]]:
    """As many faces and things, spread over the names."""
    faces = [name for name in names if FACE in name.split()]
    things = [name for name in names if name not in faces]
    return {key: some[:: max(1, len(some) // count)][:count] for key, some in (("faces", faces), ("things", things))}


def trained(lab: Lab, way: str, seed: int, prompts: Sequence[str], reward: str, steps: int, **values: Any) -> Path:
    """The folder of a run, made or taken up again where it is not finished."""
    folder = lab.folder / called(way, seed)
    rows = read_rows(folder / METRICS)
    if not (rows and rows[-1]["step"] == steps and (folder / "lora" / FILE_NAME).is_file()):
        train(
            "emoji",
            reward,
            prompts=list(prompts),
            method=ONE,
            steps=steps,
            seed=seed + 1,
            output=str(folder),
            eval_prompts="",
            num_inference_steps=lab.scale.num_inference_steps,
            sample_every=0,
            sample_prompts=1,
            prefix_reuse=1,
            gradient_checkpointing="no",
            **values,
        )
    return folder


def mixed(lab: Lab, way: str, seed: int, *sources: tuple[Path, float]) -> Path:
    folder = lab.folder / called(way, seed)
    merge_loras(sources, folder)
    return folder


def called(way: str, seed: int) -> str:
    return slug(f"second-reward {way} seed={seed}")


def scored(lab: Lab, made: Callable[[], Path | None]) -> Row:
    """Both rewards, and the share of names that the judge reads, on faces and things that were not trained on."""
    lora = made()
    model = lab.model() if lora is None else lab.tuned({"default": lora})
    schedule, reward = model.schedule(lab.scale.num_inference_steps), lab.reward + load_reward(ORANGE)
    row: Row = {}

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return model.generate(prompts, seeds, schedule, GUIDANCE, batch_size=4)

    for group, names in groups(load_prompts("emoji-common"), lab.scale.eval_prompts).items():
        found = evaluate(draw, reward, lab.judges, names, 1).scores
        row |= {
            f"3D of {group}": found[REWARD],
            f"orange of {group}": found["color"],
            f"names of {group}": found[NAMED],
        }
    return row


class Ways:
    """The ways to two rewards, with the random numbers of a seed; each is trained and scored once."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.seed, self.steps = lab, seed, lab.scale.steps
        names = groups(load_prompts("emoji"), lab.scale.train_prompts)
        self.faces, self.things = names["faces"], names["things"]
        self.first = lab.lora(first_work(seed, lab.scale))

    def second(self, way: str, **values: Any) -> Path:
        """A run of the second reward."""
        return trained(self.lab, way, self.seed, self.things, ORANGE, self.steps, **values)

    def plain(self) -> Path:
        return self.second(PLAIN, continue_from=str(self.first))

    def half(self) -> Path:
        return mixed(self.lab, HALF, self.seed, (self.first, 0.5), (self.plain(), 0.5))

    def kept(self, weight: float) -> Path:
        faces = self.lab.folder / "second-reward-faces.txt"
        with written_whole(faces) as temporary:
            temporary.write_text("\n".join(self.faces) + "\n", encoding="utf-8")
        return self.second(kept_at(weight), continue_from=str(self.first), keep=str(faces), keep_weight=weight)

    def small(self) -> Path:
        kept, folder = self.kept(WEIGHTS[0]), self.lab.folder / called(SMALL, self.seed)
        made = distill_lora(
            str(kept), [self.things, self.faces], folder, RANK, paths=min(PATHS, self.steps), seed=self.seed
        )
        self.lab.measured(f"{folder.name}-differences", lambda: made.differences)
        return folder

    def added(self) -> Path:
        return mixed(self.lab, ADDED, self.seed, (self.first, 1.0), (self.second("second alone"), 1.0))

    def at_once(self) -> Path:
        prompts, reward = [*self.lab.prompts, *self.things], f"{REWARD} + {ORANGE}"
        count = min(NORMALIZED, len(prompts))
        return trained(self.lab, AT_ONCE, self.seed, prompts, reward, 2 * self.steps, normalize_reward=count)

    def rows(self) -> list[Row]:
        found: dict[str, Callable[[], Path | None]] = {
            BASE: lambda: None,
            FIRST: lambda: self.first,
            PLAIN: self.plain,
            HALF: self.half,
            **{kept_at(weight): partial(self.kept, weight) for weight in WEIGHTS[: self.lab.scale.weights]},
            SMALL: self.small,
            ADDED: self.added,
            AT_ONCE: self.at_once,
        }
        rows = []
        for way, lora in found.items():
            name = called(f"{way} scores", self.seed)
            scores = self.lab.measured(name, partial(scored, self.lab, lora))
            rows.append({"way": way, "seed": self.seed, **scores})
        return rows


def second(lab: Lab) -> Report:
    seeds = lab.scale.seeds
    rows = [row for seed in range(seeds) for row in Ways(lab, seed).rows()]
    names = list(dict.fromkeys(row["way"] for row in rows))

    def of(way: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["way"] == way]

    keys = [key for key in rows[0] if key not in ("way", "seed")]
    table = [{"way": way, **{key: mean(of(way, key)) for key in keys}} for way in names]
    at = {row["way"]: row for row in table}

    drawn, axes = figure(1, 2)
    for way in names:
        line = axes[0, 0].plot(at[way][COLOR], at[way][STYLE], "o", label=way)[0]
        axes[0, 0].plot(of(way, COLOR), of(way, STYLE), ".", color=line.get_color(), alpha=0.5)
        axes[0, 1].plot(at[way]["orange of faces"], at[way][STYLE], "o", color=line.get_color())
    axes[0, 0].set(xlabel="second reward, of things", ylabel="first reward, of faces")
    axes[0, 1].set(xlabel="second reward, of faces", ylabel="first reward, of faces")
    legend(drawn, axes[0, 0])

    def left(way: str) -> list[float]:
        """How much of the first reward is left on faces, for each seed, as a share of what the first run gained."""
        gained = zip(of(way, STYLE), of(FIRST, STYLE), of(BASE, STYLE), strict=True)
        return [(value - base) / (first - base) if first != base else 0.0 for value, first, base in gained]

    def reached(way: str) -> list[float]:
        """How much of the second reward is reached on things, as a share of what plain going on gains."""
        gained = zip(of(way, COLOR), of(PLAIN, COLOR), of(FIRST, COLOR), strict=True)
        return [(value - first) / (plain - first) if plain != first else 0.0 for value, plain, first in gained]

    def told(way: str) -> str:
        return f"{mean(left(way)):.0%} and {mean(reached(way)):.0%}"

    dial = [{"reward": mean(reached(way)), "left": mean(left(way))} for way in (FIRST, HALF, PLAIN)]
    for row in table:
        row |= {"first left": mean(left(row["way"])), "second reached": mean(reached(row["way"]))}
        row["beside the dial"] = row["first left"] - at_reward(dial, row["second reached"], "left")
        row["std of first left"] = spread(left(row["way"]))
    best = kept_at(WEIGHTS[0])
    both = {way: [(a + b) / 2 for a, b in zip(left(way), reached(way), strict=True)] for way in names}
    count = lab.scale.train_prompts
    text = (
        f"First {REWARD} on {count} names, then {ORANGE} on {count} names of things, while names of faces are to stay "
        f"as they were; {lab.scale.steps} updates each, of {ONE}. Told are the share of the first reward's gain that "
        "is left on faces, and of the second's, as far as going on plainly takes it, on things; all names of the "
        f"comparison are new. Plainly: {told(PLAIN)}. With half of the plain second LoRA: {told(HALF)}. "
        + " ".join(
            f"{kept_at(weight).capitalize()}: {told(kept_at(weight))}."
            for weight in WEIGHTS
            if kept_at(weight) in names
        )
        + f" That at {WEIGHTS[0]:g} distilled to rank {RANK}: {told(SMALL)}. A LoRA of the second reward alone, added "
        f"to the first: {told(ADDED)}. Both rewards in one run of {2 * lab.scale.steps} updates, which asks both of "
        f"all names: {told(AT_ONCE)}. The last column of the table tells how much more of the first is left than by "
        "going on plainly and then drawing with less of the second LoRA, so much less that it reaches as much of the "
        "second reward."
    )
    more = [a - b for a, b in zip(left(best), left(PLAIN), strict=True)]
    average = [a - b for a, b in zip(both[best], both[PLAIN], strict=True)]
    compressed = [a - b for a, b in zip(both[SMALL], both[best], strict=True)]
    claims = [
        Claim(
            "FOSTER: what was learned first is forgotten less than by going on plainly",
            f"{mean(left(best)):.0%} of the first gain is left on faces, plainly {mean(left(PLAIN)):.0%}",
            compared(mean(more), spread(more)),
        ),
        Claim(
            "and the average of old and new is higher (on its toy by 0.12)",
            f"the mean of both shares differs by {mean(average):+.2f}",
            compared(mean(average), spread(average), 0.08),
        ),
        Claim(
            "both compressed to one of the old size lose little (on its toy 0.05)",
            f"the mean of both shares differs by {mean(compressed):+.2f}",
            "confirmed" if mean(compressed) > -0.08 else "weaker",
        ),
    ]
    return Report(rows, table, drawn, text, claims, seeds)


SECOND_REWARD = Experiment(
    "A second reward", "Can a second reward be learned without losing the first?", second_work, second
)
