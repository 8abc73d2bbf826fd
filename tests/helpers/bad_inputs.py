"""Bad inputs of every kind: what people type, edit, cut short and mix up. Each maker is one kind of badness."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

from draftune.cli import COMMANDS
from draftune.settings import Settings
from draftune.settings.field_checks import kind

SMALL = ["--steps", "1", "--num-inference-steps", "2", "--batch-size", "1", "--log-images-steps", "0"]
SMALL += ["--num-log-prompts", "1", "--guidance-scale", "2", "--reward", "brightness", "--prompts", "animals"]
HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Sign in to download</body></html>\n"
LONG = "word " * 20_000


@dataclass
class World:
    """What is good: a model, a run of it, a picture, prompts, and a LoRA of another model."""

    model: Path
    run: Path
    picture: Path
    prompts: Path
    other: Path


@dataclass
class Bad:
    """A command line with something wrong in it, and words of which the answer must have one."""

    argv: list[str]
    names: list[str]


@dataclass
class Making:
    """What a maker has at hand: random numbers, an empty folder, the good things, and a command to break."""

    random: Random
    here: Path
    world: World
    command: str

    def put(self, name: str, content: bytes | str) -> str:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def any(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def run(self) -> Path:
        """A copy of the run, to damage."""
        return Path(shutil.copytree(self.world.run, self.here / "run"))

    def good(self, *more: str, source: str | Path | None = None) -> list[str]:
        """A command line that would work; `more` comes last and wins, `source` takes the run's place."""
        run, out, world = str(source or self.world.run), str(self.here / "new"), self.world
        drawing = ["--num-inference-steps", "2", "--guidance-scale", "1"]
        measured = [
            "--prompts",
            str(world.prompts),
            "--reward",
            "brightness",
            "--eval-rewards",
            "",
            "--num-images",
            "1",
        ]
        lines = {
            "train": ["--model", str(world.model), "--output", out, *SMALL],
            "preflight": ["--model", str(world.model), "--output", out, *SMALL],
            "watch": [run, "--port", "0"],
            "ui": ["--folder", out, "--port", "0"],
            "report": [run, "--output", f"{out}.html"],
            "rate": [run, "--prompts", str(world.prompts), "--output", f"{out}.csv", "--port", "0", *drawing],
            "card": [run, "--output", out],
            "push": [run, "me/lora", "--dry-run"],
            "sample": [run, "--prompt", "cat", "--output", f"{out}.png", *drawing],
            "eval": [run, *measured, "--output", f"{out}.csv", *drawing],
            "sweep": [run, *measured, "--output", out, "--scales", "1", *drawing],
            "merge": [run, f"{world.run}@0.5", "--output", out],
            DISTILL: [run, *measured[:2], "--rank", "1", "--num-trajectories", "1", "--output", out],
            TUNE: [run, *measured[:4], "--steps", "1", "--batch-size", "1", "--output", out, *drawing],
            "export": [run, "--format", "diffusers", "--output", out],
            NOISE: [run, "--prompt", "a", "--reward", "brightness", "--steps", "1", "--output", f"{out}.png"],
            "score": [str(world.picture), "--reward", "brightness", "--output", f"{out}.csv"],
            "list": [],
            "env": [],
        }
        return [*self.command.split(), *lines[self.command], *more]


Maker = Callable[[Making], Bad]
MAKERS: dict[str, tuple[Maker, tuple[str, ...]]] = {}
TRAINING = ("train", "preflight")
TUNE, DISTILL, NOISE = "experimental tune-weights", "experimental distill", "optimize-noise"
OF_A_LORA = ("sample", "eval", "sweep", "merge", DISTILL, TUNE, "export", NOISE)
OF_A_RUN = ("report", "watch", "card", "push", "sample", "eval", "sweep", DISTILL, TUNE, "export", NOISE)


def bad(*commands: str) -> Callable[[Maker], Maker]:
    """Makes a maker known, for these commands."""

    def add(maker: Maker) -> Maker:
        MAKERS[maker.__name__] = maker, commands
        return maker

    return add


@bad(*(command.name for command in COMMANDS))
def words(m: Making) -> Bad:
    """Flags that are not there, and arguments too many or too few."""
    flag = m.any("--lerning-rate", "--outptu", "--h", "--Output", "--no-resum", "--\u00fcber", "--", "-x", "--\x1b[31m")
    if flag == "--":
        rest = [] if m.command == "merge" else ["a", "--b", "c", "d"]
        return Bad([*m.command.split(), "--", *rest], [m.command, "'a'", "--b", "'--'"])
    if m.random.random() < 0.3 and m.command not in (*TRAINING, "list", "env", "ui"):
        return Bad(m.command.split(), [m.command])
    if m.random.random() < 0.2:
        return Bad([m.any(m.command.upper(), f"{m.command}e", f" {m.command}", "")], [m.command])
    return Bad(m.good(flag), [flag.encode("ascii", "backslashreplace").decode(), flag, repr(flag)[1:-1]])


def wrong_value(m: Making, name: str, in_yaml: bool) -> Any:
    """A value that this setting can't have; as text for the command line, as it is for YAML."""
    f = next(f for f in fields(Settings) if f.name == name)
    wanted, low, choices = kind(f), f.metadata["low"], f.metadata["choices"]
    if choices:
        return m.any("Trailing", "fp-16", " ", "\u200b", "skipp")
    values: dict[type, list[Any]] = {
        int: ["three", "1.5", "1e3", "", "0x10", "--", "9" * 40, "1,000", "\x00", "½"],
        float: ["abc", "nan", "inf", "-inf", "1e400", "", "1,5", "0.1.2"],
        str: [],
        bool: [],
    }
    found = values[wanted]
    if low is not None:
        found = [*found, str(int(low) - 1), "-1e30" if wanted is float else "-" + "9" * 30]
    if in_yaml:
        odd: list[Any] = [[1], {"a": 1}, [], {}, [[["x"]]]]
        own: dict[type, list[Any]] = {
            int: [1.5, True, "3 ", 10**30],
            float: [True, float("nan"), float("inf"), 10**400],
            str: [1, 2.5, True],
            bool: ["maybe", 1, 0, "true"],
        }
        found = [*(v for v in found if v not in ("--", "\x00")), *odd, *own[wanted]]
        if f.default is not None:
            found.append(None)
    return m.any(*(v for v in found if in_yaml or "\x00" not in v))


@bad(*TRAINING)
def flag_value(m: Making) -> Bad:
    f = m.any(*(f for f in fields(Settings) if kind(f) in (int, float) or f.metadata["choices"]))
    flag = "--" + f.name.replace("_", "-")
    return Bad(m.good(f"{flag}={wrong_value(m, f.name, False)}"), [f.name, flag])


@bad(*TRAINING)
def empty_setting(m: Making) -> Bad:
    name = m.any("model", "reward", "method", "prompts", "output", "lora_target_modules")
    return Bad(m.good(f"--{name.replace('_', '-')}", m.any("", " ", "\t")), [name, "prompt"])


@bad(*TRAINING)
def yaml_value(m: Making) -> Bad:
    import yaml

    name = m.any(*(f.name for f in fields(Settings)))
    config = m.put("settings.yaml", yaml.safe_dump({name: wrong_value(m, name, True)}, allow_unicode=True))
    argv = m.good("--config", config)
    flag = "--" + name.replace("_", "-")
    if flag in argv:  # or it would win
        del argv[argv.index(flag) : argv.index(flag) + 2]
    return Bad(argv, [name, name.replace("_", "-")])


BROKEN_YAML: dict[str, bytes] = {
    "tab": b"steps:\n\t- 1\n",
    "open": b"steps: [1\n",
    "list": b"- steps: 1\n",
    "text": b"just words\n",
    "number": b"3\n",
    "date": b"2024-01-01\n",
    "nul": b"steps: 1\n\x00\n",
    "utf-16": "steps: 1\nnegative_prompt: é\n".encode("utf-16"),
    "latin-1": b"negative_prompt: caf\xe9\n",
    "python": b"steps: !!python/object/apply:os.system ['true']\n",
    "alias": b"steps: *nothing\n",
    "anchors": b"a: &x 1\nb: &x 2\nsteps: [*x]\n",
    "itself": b"steps: &a [*a]\n",
    "deep": b"steps: " + b"[" * 5000,
    "colon": b"negative_prompt: a: b\n",
    "quote": b'negative_prompt: "open\n',
    "unknown": b"leraning_rate: 1\n",
    "number-key": b"1: 2\n",
    "null-key": b"null: 2\n",
    "list-key": b"[1, 2]: 3\n",
    "two": b"steps: 1\n---\nsteps: 2\n",
    "twice": b"steps: 1\nsteps: 2\n",
    "merge": b"<<: 3\n",
    "json": b'{"steps": 1,, }',
    "html": HTML,
    "pickle": pickle.dumps({"steps": 1}),
    "nul-path": b'output: "a\\0b"\n',
    "control": b'model: "\\e[31mred\\a"\n',
}


@bad(*TRAINING)
def yaml_file(m: Making) -> Bad:
    name, content = m.any(*BROKEN_YAML.items())
    argv = m.good("--config", m.put(f"{name}.yaml", content))
    for flag in ("--steps", "--output", "--model"):
        if flag == "--steps" or name in ("nul-path", "control"):  # flags win over the file
            del argv[argv.index(flag) : argv.index(flag) + 2]
    return Bad(argv, [f"{name}.yaml", "steps", "output", "model"])


def odd_path(m: Making, suffix: str = "") -> str:
    """A path that leads to no file: missing, a folder, a loop of links, inside a file, too long."""
    name = m.any(
        "missing", "folder", "loop", "inside", "long", "~no-such-user/x", "new\nline", "\x1b[1m", "..", "dangling"
    )
    path = m.here / f"{name}{suffix}" if name.isalpha() else Path(f"{name}{suffix}")
    if name == "folder":
        path.mkdir()
    if name == "loop":
        path.symlink_to(path)
    if name == "dangling":
        path.symlink_to(m.here / "gone")
    if name == "inside":
        return str(Path(m.put("plain", "x")) / f"x{suffix}")
    return str(path) if name != "long" else str(m.here / ("x" * 300 + suffix))


def quoted(path: str) -> list[str]:
    """The path as an answer may have it, or its beginning."""
    return [path, repr(path)[1:-1], repr(path)[1:60], repr(str(Path(path)))[1:60]]


BROKEN_PROMPTS: dict[str, tuple[str, bytes]] = {
    "empty": (".txt", b""),
    "blank": (".txt", b" \n\t\n\r\n"),
    "bom-only": (".txt", b"\xef\xbb\xbf"),
    "utf-16": (".txt", "a cat\na dog\n".encode("utf-16")),
    "latin-1": (".txt", b"un caf\xe9\n"),
    "nul": (".txt", b"a cat\x00\n"),
    "escape": (".txt", b"\x1b[31ma cat\n"),
    "picture": (".txt", b"\x89PNG\r\n\x1a\n\x00\x00"),
    "header": (".csv", b"prompt\n"),
    "no-column": (".csv", b"title,style\na cat,3d\n"),
    "no-header": (".csv", b"a cat\na dog\n"),
    "semicolons": (".csv", b"id;prompt\n1;a cat\n"),
    "short-row": (".csv", b"style,prompt\n3d\n"),
    "csv-nul": (".csv", b"prompt\na\x00b\n"),
    "csv-16": (".csv", "prompt\na cat\n".encode("utf-16")),
    "csv-huge": (".csv", b"prompt\n" + b"x" * 200_000 + b"\n"),
    "csv-empty": (".csv", b""),
    "csv-blank": (".csv", b"prompt,style\n,3d\n ,3d\n"),
    "bracket": (".jsonl", b'{"prompt": "a cat"\n'),
    "array": (".jsonl", b'["a cat"]\n'),
    "whole-array": (".jsonl", b'[\n{"prompt": "a cat"}\n]\n'),
    "word": (".jsonl", b"a cat\n"),
    "no-key": (".jsonl", b'{"title": "a cat"}\n'),
    "number": (".jsonl", b'{"prompt": 3}\n'),
    "null": (".jsonl", b'{"prompt": null}\n'),
    "list": (".jsonl", b'{"prompt": ["a"]}\n'),
    "deep": (".jsonl", b"[" * 100_000 + b"\n"),
    "digits": (".jsonl", b'{"prompt": ' + b"9" * 6000 + b"}\n"),
    "surrogate": (".jsonl", b'{"prompt": "\\ud800"}\n'),
    "jsonl-blank": (".jsonl", b'{"prompt": ""}\n'),
    "jsonl-empty": (".jsonl", b"\n"),
    "ending": (".md", b"a cat\na dog\n"),
    "json-in-text": (".txt", b'["a cat"]\n'),
    "lines-in-text": (".txt", b'{"prompt": "a cat"}\n'),
    "list-in-text": (".txt", b"- a cat\n- a dog\n"),
    "table-in-text": (".txt", b"prompt\ttarget\na cat\t3\n"),
    "unquoted": (".csv", b"prompt\na cat, asleep\n"),
    "open-quote": (".csv", b'prompt\n"a cat\na dog\n'),
    "json-object": (".json", b'{"prompt": "a cat"}\n'),
    "json-number": (".json", b'["a cat", 3]\n'),
    "json-cut": (".json", b'["a cat", "a do'),
    "yaml-map": (".yaml", b"prompt: a cat\n"),
    "yaml-itself": (".yml", b"- &a [*a]\n"),
    "invisible": (".txt", "\u200b\n\ufeff\n\u00ad\n".encode()),
}


@bad(*TRAINING, "eval", "sweep", DISTILL, TUNE)
def prompt_file(m: Making) -> Bad:
    name, (suffix, content) = m.any(*BROKEN_PROMPTS.items())
    flag = m.any("--prompts", "--eval-prompts") if m.command in TRAINING else "--prompts"
    suffix = suffix.upper() if m.random.random() < 0.15 else suffix
    return Bad(m.good(flag, m.put(name + suffix, content)), [f"{name}{suffix}'"])


@bad(*TRAINING, "eval", "sweep", DISTILL, TUNE)
def prompts_missing(m: Making) -> Bad:
    flag = m.any("--prompts", "--eval-prompts") if m.command in TRAINING else "--prompts"
    path = m.any("animal", "Emoji", "emoji ", "a cat", LONG)
    if m.random.random() < 0.7:
        path = odd_path(m, m.any(".txt", ".csv", ".jsonl"))
    return Bad(m.good(flag, path), [*quoted(path)])
