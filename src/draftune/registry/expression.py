"""The small language of rewards and methods: `name(key=value)`, sums of them, and numbers as factors.

    clip(model=./my/clip) + 0.1*aesthetic - jpeg-incompressibility(quality=80)
    robust(clip + 0.1*my/rewards.py:sharp(k=3), rho=0.02)

A value is all that stands between its `=` and the next comma or the parenthesis that closes the call, so that a path
may hold spaces, plus signs and parentheses in pairs. A name may hold hyphens, dots, slashes and colons, so a minus
between two names needs a space on each side; one that ends in `.py:NAME` may hold spaces and whatever else is no sign
of this language. In quotes, single or double, everything is taken as it is; the quote itself is written twice.
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
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
FILE = r"""(?:(?!\s-|-\s)[^+*(),="'\n])*?\.py:\w[\w.]*(?=\s*(?:$|[-+*(),]))"""
"""A name in a user's file, spaces included; a sign of this language in it makes it ambiguous, and calls for quotes."""
STRING = r""""(?:[^"]|"")*"|'(?:[^']|'')*'"""
FACTOR = re.compile(rf"{NUMBER}(?![\w/])")
QUOTES = "put a name or path with spaces or signs in it in quotes"
KEY = re.compile(rf"({NAME})\s*=")


@dataclass(frozen=True)
class Call:
    """A name with its settings and, where it wraps another expression, that expression."""

    name: str
    settings: dict[str, Value] = field(default_factory=dict)
    inner: Call | Sum | None = None

    def __str__(self) -> str:
        arguments = [] if self.inner is None else [str(self.inner)]
        arguments += [f"{key}={written(value)}" for key, value in self.settings.items()]
        plain = re.fullmatch(NAME, self.name) and not FACTOR.match(self.name)
        name = self.name if plain else in_quotes(self.name)
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
    """Reads an expression from its start to its end, without going back."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    def error(self, position: int | None = None) -> DraftuneError:
        rest = self.text[self.position if position is None else position :].strip()
        return DraftuneError(f"cannot read {self.text!r}: stuck at {rest or 'its end'!r}; {QUOTES}")

    def accept(self, pattern: str | re.Pattern[str]) -> re.Match[str] | None:
        """What comes next, after spaces, if it is of this pattern."""
        while self.text[self.position : self.position + 1].isspace():
            self.position += 1
        match = re.compile(pattern).match(self.text, self.position)
        if match is not None:
            self.position = match.end()
        return match

    def expression(self) -> Call | Sum:
        tree = self.sum()
        if self.text[self.position :].strip():
            raise self.error()
        return tree

    def sum(self) -> Call | Sum:
        terms = [self.term(-1.0 if self.accept("-") else 1.0)]
        while sign := self.accept(r"[-+]"):
            terms.append(self.term(-1.0 if sign.group() == "-" else 1.0))
        if len(terms) == 1 and terms[0][0] == 1.0:
            return terms[0][1]
        return Sum(tuple(terms))

    def term(self, sign: float) -> tuple[float, Call]:
        # First of all: the names of folders may begin with numbers.
        name = self.accept(FILE)
        if name is None and (factor := self.accept(FACTOR)):
            weight = sign * self.number(factor.group(), factor.start())
            if not self.accept(r"\*"):
                raise self.error()
            return weight, self.call()
        call = self.call(name.group() if name else None)
        if not self.accept(r"\*"):
            return sign, call
        if not (factor := self.accept(FACTOR)):
            raise self.error()
        return sign * self.number(factor.group(), factor.start()), call

    def number(self, text: str, position: int) -> int | float:
        if not math.isfinite(float(text)):
            raise self.error(position)
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)

    def name(self) -> str:
        if string := self.accept(STRING):
            return unquoted(string.group())
        if name := self.accept(FILE) or self.accept(NAME):
            return name.group()
        raise self.error()

    def call(self, name: str | None = None) -> Call:
        name = self.name() if name is None else name
        settings: dict[str, Value] = {}
        inner: Call | Sum | None = None
        if self.accept(r"\("):
            while not self.accept(r"\)"):
                if key := self.accept(KEY):
                    if key.group(1) in settings:
                        raise DraftuneError(f"cannot read {self.text!r}: it gives {key.group(1)!r} twice")
                    settings[key.group(1)] = self.value()
                elif inner is None and not settings:
                    inner = self.sum()
                else:
                    raise self.error()
                if not self.accept(","):
                    if not self.accept(r"\)"):
                        raise self.error()
                    break
        return Call(name, settings, inner)

    def value(self) -> Value:
        if string := self.accept(rf"({STRING})(?=\s*[,)])"):
            return unquoted(string.group(1))
        if self.accept("[\"']"):
            raise self.error(self.position - 1)
        start, end, depth = self.position, self.position, 0
        while end < len(self.text) and (depth or self.text[end] not in ",)"):
            depth += {"(": 1, ")": -1}.get(self.text[end], 0)
            end += 1
        text = self.text[start:end].strip()
        if end == len(self.text) or not text:
            raise self.error(start)
        self.position = end
        if re.fullmatch(f"-?{NUMBER}", text):
            return self.number(text, start)
        return WORDS.get(text.lower(), text)


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


def written_sum(terms: Sequence[tuple[float, str]], digits: int | None = None) -> str:
    """Weights and names as they are written in an expression; with as many digits as it takes, unless given."""

    def factor(weight: float) -> str:
        short = f"{weight:.{digits or 9}g}"
        return "" if weight == 1 else f"{short if digits or float(short) == weight else repr(weight)}*"

    signed = (f"{'-' if weight < 0 else '+'} {factor(abs(weight))}{name}" for weight, name in terms)
    return " ".join(signed).removeprefix("+ ")


def written(value: Value) -> str:
    """A value as it is written in an expression."""
    if isinstance(value, str):
        plain = re.fullmatch(NAME, value) and not re.match(r"[\d.]", value) and value.lower() not in WORDS
        return value if plain else in_quotes(value)
    return str(value).lower()


def in_quotes(text: str) -> str:
    """A text in quotes: those that it does not hold, or double ones, where each of its own is written twice."""
    if '"' in text and "'" not in text:
        return f"'{text}'"
    return '"' + text.replace('"', '""') + '"'


def unquoted(string: str) -> str:
    """What stands in quotes."""
    quote = string[0]
    return string[1:-1].replace(2 * quote, quote)
