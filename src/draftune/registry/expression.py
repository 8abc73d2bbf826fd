"""Parse the expressions that name rewards, methods and optimizers. An expression is a subset of Python.

    clip(model="./my/clip") + 0.1*aesthetic - jpeg_incompressibility(quality=80)
    sharpness_aware(clip + 0.1*"my/rewards.py:sharp"(k=3), rho=0.02)

A call has keyword settings: numbers, strings, True, False, None, or a bare name, which is text (`basis=high_pass`). Its
one positional argument is the expression that it wraps. A name in a user's own file is a string,
`"my/rewards.py:sharp"`; only where it is the whole expression may the quotes be left out. This module imports no torch.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from draftune.errors import DraftuneError

Value = str | float | int | bool | None
MAX_LENGTH = 10_000
"""Characters of an expression: Python's own parser may run out of stack on a longer one."""
MAX_NUMBER = 1e100
FILE = re.compile(r"""(?!-)[^\s"'()*+=,\0]+\.py:\w+""")
"""A function in a user's file, as the whole expression."""
HYPHENS = re.compile(r"(?<![\w/.-])[A-Za-z_]\w*(?:-[A-Za-z_]\w*)+(?![\w/.-])")
FILE_HINT = '; quote a function in a file: "my.py:name"(k=3)'
ALLOWED = "an expression has names, calls such as name(setting=1), numbers, + - * and strings in quotes"


@dataclass(frozen=True)
class Call:
    """A name with its settings and the expression that it wraps, if any."""

    name: str
    settings: dict[str, Value] = field(default_factory=dict)
    inner: Call | Sum | None = None

    def __str__(self) -> str:
        arguments = [] if self.inner is None else [str(self.inner)]
        arguments += [f"{key}={quoted(value)}" for key, value in self.settings.items()]
        return quoted(self.name) + (f"({', '.join(arguments)})" if arguments else "")


@dataclass(frozen=True)
class Sum:
    """A weighted sum of calls."""

    terms: tuple[tuple[float, Call], ...]

    def __str__(self) -> str:
        return written_sum([(weight, str(call)) for weight, call in self.terms])


def same_expression(first: str, second: str) -> bool:
    """Return whether two texts are the same expression, apart from how it is written."""
    try:
        return first == second or parse(first) == parse(second)
    except DraftuneError:
        return False  # a wrong one is reported where it is used


def parse(text: str) -> Call | Sum:
    """Parse an expression; `str` of the result is its canonical form, which parses to an equal result.

    Raises:
        DraftuneError: for anything that is not allowed in an expression, with its column and the piece of text.
    """
    if FILE.fullmatch(text.strip()):
        return Call(text.strip())
    if re.fullmatch(r"[^\s'\"()*+=,]+\.py", text.strip()):
        raise DraftuneError(
            f"cannot read {text.strip()!r}: name a function of the file, such as {text.strip()}:my_name"
        )
    if len(text) > MAX_LENGTH:
        raise DraftuneError(f"cannot read {shortened(text)!r}: more than {MAX_LENGTH} characters")
    parser = Parser(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as "\d", which later versions of Python may refuse
            tree = ast.parse(parser.text, mode="eval")
        return parser.sum(tree.body)
    except (RecursionError, MemoryError) as error:
        raise DraftuneError(f"cannot read {shortened(text)!r}: it is nested too deeply") from error
    except SyntaxError as error:
        start = (error.offset or len(parser.text) + 1) - 1  # 0 at the end of the text
        raise parser.error(start, parser.text[start:], error.msg) from error
    except ValueError as error:  # null bytes and lone surrogates
        raise DraftuneError(f"cannot read {shortened(text)!r}: {error}") from error


class Parser:
    """Converts Python's syntax tree of a text to calls and sums; refuses every other kind of node."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"[\r\n]", " ", text).strip()

    def error(self, start: int, piece: str, problem: str) -> DraftuneError:
        where = f"at column {start + 1}: {shortened(piece) or 'its end'!r}"
        hints = underscore_hint(self.text) + (FILE_HINT if ".py" in self.text else "")
        return DraftuneError(f"cannot read {shortened(self.text)!r}: {problem} {where}; {ALLOWED}{hints}")

    def refused(self, node: ast.expr | ast.keyword, problem: str) -> DraftuneError:
        start = len(self.text.encode()[: node.col_offset].decode())  # ast counts bytes
        return self.error(start, ast.get_source_segment(self.text, node) or "", problem)

    def sum(self, node: ast.expr) -> Call | Sum:
        terms = self.terms(node)
        return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Sum(tuple(terms))

    def terms(self, node: ast.expr) -> list[tuple[float, Call]]:
        """Return the weighted calls of a sum; a number before or after parentheses multiplies each call in them."""
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return self.terms(left) + self.terms(right)
            case ast.BinOp(left, ast.Sub(), right):
                return self.terms(left) + [(-weight, call) for weight, call in self.terms(right)]
            case ast.UnaryOp(ast.USub(), operand):
                return [(-weight, call) for weight, call in self.terms(operand)]
            case ast.BinOp(left, ast.Mult(), right):
                number, other = (right, left) if is_number(right) else (left, right)
                factor = self.number(number)
                terms = [(factor * weight, call) for weight, call in self.terms(other)]
                if any(abs(weight) > MAX_NUMBER for weight, _ in terms):
                    raise self.refused(node, "the product is too large")
                return terms
        return [(1.0, self.call(node))]

    def call(self, node: ast.expr) -> Call:
        match node:
            case ast.Name(name) | ast.Constant(str(name)):
                return Call(name)
            case ast.Call(ast.Name(name) | ast.Constant(str(name)), arguments, keywords):
                if len(arguments) > 1:
                    raise self.refused(arguments[1], "expected name=value")
                settings: dict[str, Value] = {}
                for setting in keywords:
                    if setting.arg is None or setting.arg in settings:
                        raise self.refused(
                            setting, f"{setting.arg!r} is set twice" if setting.arg else "expected name=value"
                        )
                    settings[setting.arg] = self.value(setting.value)
                return Call(name, settings, self.sum(arguments[0]) if arguments else None)
        raise self.refused(node, "expected a name or a call")

    def value(self, node: ast.expr) -> Value:
        match node:
            case ast.Name(name) | ast.Constant(str(name)):
                return name
            case ast.Constant(True | False | None as constant):
                return constant
        if not is_number(node):
            raise self.refused(node, "expected a number, a word or text in quotes, as for a path")
        return self.number(node)

    def number(self, node: ast.expr) -> int | float:
        if not is_number(node):
            raise self.refused(node, "expected a number")
        number: int | float = ast.literal_eval(node)
        if abs(number) > MAX_NUMBER:
            raise self.refused(node, "the number is too large")
        return number


def underscore_hint(text: str) -> str:
    """Return a hint where a text has a name with hyphens, which Python reads as a difference."""
    names = [] if FILE.fullmatch(text.strip()) else HYPHENS.findall(re.sub(r"\"[^\"]*\"|'[^']*'", "", text))
    return f"; names have underscores: {names[0].replace('-', '_')}" if names else ""


def shortened(text: str, length: int = 100) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def is_number(node: ast.expr) -> bool:
    """Return whether a node is a real number, with one minus at most."""
    node = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def with_defaults(tree: Call | Sum, defaults: Mapping[str, Mapping[str, Value]]) -> Call | Sum:
    """Add default settings, by the names of calls, to a call and to the calls inside it. Sums are left as they are."""
    if isinstance(tree, Sum):
        return tree
    inner = None if tree.inner is None else with_defaults(tree.inner, defaults)
    return Call(tree.name, {**defaults.get(tree.name, {}), **tree.settings}, inner)


def written_sum(terms: Sequence[tuple[float, str]], digits: int | None = None) -> str:
    """Write weights and names as a sum; the weights are exact, or have so many digits."""

    def factor(weight: float) -> str:
        short = f"{weight:.{digits or 9}g}"
        return "" if weight == 1 else f"{short if digits or float(short) == weight else repr(weight)}*"

    signed = (f"{'-' if weight < 0 else '+'} {factor(abs(weight))}{name}" for weight, name in terms)
    return " ".join(signed).removeprefix("+ ")


def quoted(value: Value) -> str:
    """Write a value or a name; text has quotes unless it is a plain identifier."""
    if not isinstance(value, str):
        return str(value)
    plain = value.isascii() and value.isidentifier() and not keyword.iskeyword(value)
    return value if plain else json.dumps(value, ensure_ascii=False)
