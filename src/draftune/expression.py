"""The small language of rewards and methods: `name(key=value)`, sums of them, and numbers as factors.

    clip(model=./my/clip) + 0.1*aesthetic - jpeg-incompressibility(quality=80)
    robust(clip + 0.1*my/rewards.py:sharp(k=3), rho=0.02)

Names may hold hyphens, dots, slashes and colons, so a minus between two names needs a space on each side; one with
other characters stands in quotes.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from draftune.errors import DraftuneError, unknown

Value = str | float | int | bool | None
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}
T = TypeVar("T")

NAME = r"[\w./~][\w./:~@]*(?:-[\w./:~@]+)*"
TOKEN = re.compile(
    rf"""\s*(?:
        (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w/]))
      | (?P<string>"[^"]*"|'[^']*')
      | (?P<name>{NAME})
      | (?P<symbol>[-+*(),=])
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Call:
    """A name with its settings and, where it wraps another expression, that expression."""

    name: str
    settings: dict[str, Value] = field(default_factory=dict)
    inner: Call | Sum | None = None

    def __str__(self) -> str:
        arguments = [] if self.inner is None else [str(self.inner)]
        arguments += [f"{key}={written(value)}" for key, value in self.settings.items()]
        name = self.name if re.fullmatch(NAME, self.name) else f'"{self.name}"'
        return f"{name}({', '.join(arguments)})" if arguments else name

    def apply(self, function: Callable[..., T], kind: str, *given: Any) -> T:
        """`function(*given, **settings)`; a setting that it does not take is a DraftuneError naming the nearest."""
        parameters = dict(list(signature_of(function).parameters.items())[len(given) :])
        settings = dict(self.settings)
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for key, value in self.settings.items():
            if key not in parameters:
                if anything:
                    continue
                raise unknown(f"setting of {kind} {self.name}:", key, parameters)
            wanted = parameters[key].annotation
            if wanted is float and type(value) is int:
                settings[key] = float(value)
            elif wanted in NAMES and type(value) is not wanted:
                raise DraftuneError(f"{key} of {kind} {self.name} must be {NAMES[wanted]}, not {value!r}")
        for key, parameter in parameters.items():
            optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and not optional and key not in settings:
                raise DraftuneError(f"{kind} {self.name} wants {key}: {self.name}({key}=…)")
        return function(*given, **settings)


@dataclass(frozen=True)
class Sum:
    """A weighted sum of calls."""

    terms: tuple[tuple[float, Call], ...]

    def __str__(self) -> str:
        return written_sum([(weight, str(call)) for weight, call in self.terms])


def parse(text: str) -> Call | Sum:
    """Reads an expression. Raises DraftuneError that shows where it stopped making sense."""
    try:
        return Parser(text).expression()
    except RecursionError as error:
        raise DraftuneError("cannot read an expression that is nested so deeply") from error


class Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while text[position:].strip():
            match = TOKEN.match(text, position)
            if match is None:
                raise self.error(position)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self.tokens.append(("end", "", len(text)))

    def error(self, position: int) -> DraftuneError:
        return DraftuneError(f"cannot read {self.text!r}: stuck at {self.text[position:] or 'its end'!r}")

    def accept(self, *wanted: str) -> str | None:
        """The next token's text if it is one of these kinds or symbols."""
        kind, text, _ = self.tokens[0]
        if kind in wanted or (kind == "symbol" and text in wanted):
            self.tokens.pop(0)
            return text
        return None

    def expect(self, *wanted: str) -> str:
        text = self.accept(*wanted)
        if text is None:
            raise self.error(self.tokens[0][2])
        return text

    def expression(self) -> Call | Sum:
        tree = self.sum()
        self.expect("end")
        return tree

    def sum(self) -> Call | Sum:
        terms = [self.term(-1.0 if self.accept("-") else 1.0)]
        while sign := self.accept("+", "-"):
            terms.append(self.term(-1.0 if sign == "-" else 1.0))
        if len(terms) == 1 and terms[0][0] == 1.0:
            return terms[0][1]
        return Sum(tuple(terms))

    def term(self, sign: float) -> tuple[float, Call]:
        if self.tokens[0][0] == "number":
            weight = sign * self.number()
            self.expect("*")
            return weight, self.call()
        call = self.call()
        return (sign * self.number() if self.accept("*") else sign), call

    def number(self) -> int | float:
        position = self.tokens[0][2]
        text = self.expect("number")
        if not math.isfinite(float(text)):
            raise self.error(position)
        return int(text) if text.isdigit() else float(text)

    def call(self) -> Call:
        name = self.expect("name", "string").strip("\"'")
        settings: dict[str, Value] = {}
        inner: Call | Sum | None = None
        if self.accept("("):
            while not self.accept(")"):
                if self.tokens[0][0] == "name" and self.tokens[1][1] == "=":
                    key = self.expect("name")
                    self.expect("=")
                    settings[key] = self.value()
                elif inner is None and not settings:
                    inner = self.sum()
                else:
                    raise self.error(self.tokens[0][2])
                if not self.accept(","):
                    self.expect(")")
                    break
        return Call(name, settings, inner)

    def value(self) -> Value:
        if (string := self.accept("string")) is not None:
            return string[1:-1]
        if self.accept("-"):
            return -self.number()
        if self.tokens[0][0] == "number":
            return self.number()
        name = self.expect("name")
        return WORDS.get(name.lower(), name)


def wraps_another(factory: Callable[..., Any], kind: type) -> bool:
    """Whether what a factory makes is made around another of its kind: its first parameter is one."""
    parameters = list(signature_of(factory).parameters.values())
    return bool(parameters) and parameters[0].annotation in (kind, kind.__name__)


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """With the types where they can be had: a user's annotations may be there for a type checker alone."""
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:
        return inspect.signature(function)


def written_sum(terms: Sequence[tuple[float, str]], digits: int = 9) -> str:
    """Weights and names as they are written in an expression."""
    signed = (
        f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):.{digits}g}*'}{name}"
        for weight, name in terms
    )
    return " ".join(signed).removeprefix("+ ")


def written(value: Value) -> str:
    """A value as it is written in an expression."""
    if isinstance(value, str):
        plain = re.fullmatch(NAME, value) and not re.match(r"[\d.]", value) and value.lower() not in WORDS
        quote = "'" if '"' in value else '"'
        return value if plain else f"{quote}{value}{quote}"
    return str(value).lower()
