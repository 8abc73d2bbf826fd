"""Expressions of rewards and methods: what they mean, their canonical form, and what is refused."""

from __future__ import annotations

import sys
from random import Random

import pytest

from draftune.errors import DraftuneError
from draftune.methods import DraftK, DraftLV, load_method
from draftune.registry.expression import Call, Sum, parse
from draftune.rewards import load_reward


def test_a_name_with_settings() -> None:
    assert parse("jpeg_compressibility(quality=80)") == Call("jpeg_compressibility", {"quality": 80})
    assert parse('clip(model="openai/clip-vit-large-patch14", scaled=True)') == Call(
        "clip", {"model": "openai/clip-vit-large-patch14", "scaled": True}
    )
    assert parse("a(x='two words', y=-1.5, z=None, basis=high_pass,)") == Call(
        "a", {"x": "two words", "y": -1.5, "z": None, "basis": "high_pass"}
    )


def test_a_sum_with_weights() -> None:
    tree = parse("hpsv2 + 0.1*aesthetic - jpeg_incompressibility(quality=80) - clip * 1e-2")
    assert tree == Sum(
        (
            (1.0, Call("hpsv2")),
            (0.1, Call("aesthetic")),
            (-1.0, Call("jpeg_incompressibility", {"quality": 80})),
            (-0.01, Call("clip")),
        )
    )
    assert parse("-clip") == Sum(((-1.0, Call("clip")),))
    assert parse("2*(a - 0.5*(b + c))") == Sum(((2.0, Call("a")), (-1.0, Call("b")), (-1.0, Call("c"))))
    assert parse("(a)") == parse("--a") == parse("\n a # a comment") == Call("a")


def test_an_expression_inside_another() -> None:
    tree = parse('0.5*sharpness_aware(clip + 0.1*"my/file.py:sharp"(k=3), rho=0.02)')
    inner = Sum(((1.0, Call("clip")), (0.1, Call("my/file.py:sharp", {"k": 3}))))
    assert tree == Sum(((0.5, Call("sharpness_aware", {"rho": 0.02}, inner)),))


@pytest.mark.parametrize(
    "text",
    [
        'sharpness_aware(clip + 0.1*"my/rewards.py:sharp"(k=3), rho=0.02)',
        'a(b(c), x="#ff 8", y=-1.5, z=None, e=1e-05, f=True, g=high_pass)',
        '"my dir/x.py:f"(k=1)',
        'a - 0.5*b + c(q="3d", r="say \\"hi\\"")',
    ],
)
def test_a_canonical_form_is_written_as_it_is_read(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize("path", ["my.py:f", "./a-b/my.py:f", "/x/[2]&y/my.py:f", "C:\\new\\my.py:f", "~/my.py:f"])
def test_a_function_in_a_file_needs_no_quotes_if_it_is_the_whole_expression(path: str) -> None:
    assert parse(path) == parse(f" {path} ") == Call(path)
    assert parse(str(parse(path))) == Call(path)


@pytest.mark.parametrize(
    ("text", "column", "piece"),
    [
        ("", 1, "its end"),
        ("a +", 4, "its end"),
        ("a b", 3, "b"),
        ("2", 1, "2"),
        ("True", 1, "True"),
        ("a(", 2, "("),
        ("a(1)", 3, "1"),
        ("a(x=1, b)", 9, ")"),
        ("a(b, c)", 6, "c"),
        # Python 3.12 names the argument without a value, earlier versions what stands in the value's place.
        ("a(x=)", *((3, "x=)") if sys.version_info >= (3, 12) else (5, ")"))),
        ("a * b", 1, "a"),
        ("é + a & b", 1, "é + a & b"),
        ("é + a.b", 5, "a.b"),
        ("*a", 1, "*a"),
        ("+a", 1, "+a"),
        ("a(b)(c)", 1, "a(b)(c)"),
        ("a[0]", 1, "a[0]"),
        ("a / 2", 1, "a / 2"),
        ("2 ** 3 * a", 1, "2 ** 3"),
        ("a(**x)", 3, "**x"),
        ("a(*x)", 3, "*x"),
        ("a(x=1, x=2)", 8, "x=2"),
        ("a(x=b(1))", 5, "b(1)"),
        ("a(x=1j)", 5, "1j"),
        ("a(x=b'c')", 5, "b'c'"),
        ("a(x=f'c')", 5, "f'c'"),
        ("a(x=[1])", 5, "[1]"),
        ("a(x=3d)", 5, "3d"),
        ("a(x=1e400)", 5, "1e400"),
        (f"a(x={10**200})", 5, "1000"),
        ("1e60*(1e60*a)", 1, "1e60*(1e60*a)"),
        ("a(x='b)", 5, "'b)"),
        (r"a(x='\d')", 5, r"'\\d')"),
        ("a if b else c", 1, "a if b else c"),
        ("(a := b)", 2, "a := b"),
        ("a - my.py:f", 10, ":f"),
    ],
)
def test_anything_else_is_refused_with_its_column_and_the_piece(text: str, column: int, piece: str) -> None:
    with pytest.raises(DraftuneError) as error:
        parse(text)
    message = str(error.value)
    assert f"column {column}:" in message
    assert piece in message.partition("column ")[2]


@pytest.mark.parametrize(
    "text",
    [
        "(" * 3000,
        "-" * 9000 + "a",
        "s(" * 300 + "a" + ")" * 300,
        "a+" * 4999 + "a",
        "9" * 5000 + "*a",
        "a\0",
        "'\ud800'",
        "word " * 20_000,
        "[" * 150 + "]" * 150,
        "a(x=" * 199,
        "lambda: " * 500 + "1",
        "\x1b[31m",
        "a;b",
        "a\nb",
        "\\",
    ],
)
def test_hostile_texts_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(DraftuneError) as error:
        parse(text)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "text", ["jpeg-compressibility", "2*jpeg-compressibility(quality=3)", "jpeg-compressibility(3d)"]
)
def test_a_name_with_hyphens_is_refused_with_the_underscore_form(text: str) -> None:
    with pytest.raises(DraftuneError, match="jpeg_compressibility"):
        load_reward(text)
    with pytest.raises(DraftuneError, match="draft_lv"):
        load_method("draft-lv(n=2)")
    assert load_reward("brightness-saturation").label == "brightness -saturation".replace(" -", " - ")


def test_an_unquoted_file_with_settings_is_refused_with_the_quoted_form() -> None:
    with pytest.raises(DraftuneError, match=r'"my\.py:name"'):
        parse("my.py:f(k=3)")


def test_methods_by_name() -> None:
    assert load_method("draft_k(k=10)") == DraftK(10)
    assert load_method("draft_lv") == DraftLV(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draft_kk", "'draft_k'"),
        ("draft_k(n=2)", "draft_k.*'n'"),
        ("draft_k(k=0)", "k.*at least 1"),
        ("draft_k(k=1.5)", "k.*whole number.*1.5"),
        ("draft_k(k=True)", "k.*whole number.*True"),
        ("draft_lv(n=-1)", "n.*at least 0"),
        ("refl(m=None)", "m.*whole number.*None"),
        ("draft + refl", "draft \\+ refl"),
        ("draft(refl)", "draft.*refl"),
        ("kl", "kl.*inside"),
    ],
)
def test_methods_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(DraftuneError, match=message):
        load_method(text)


def random_tree(random: Random, depth: int = 0) -> Call | Sum:
    """Return a tree whose names and values hold any characters."""

    def text() -> str:
        return "".join(
            random.choice("ab3.-/:~@_ +*(),=[]&\\'\"\n\r\t\0\x1b\u2028{}%#é→👍") for _ in range(random.randrange(9))
        )

    def value() -> str | float | int | bool | None:
        words = ["true", "None", "True", "3d", "-", "1e5", ".5", "", "007", "if", "high_pass", "ﬁ"]
        numbers = [random.randrange(-99, 99), random.uniform(-1e-7, 1e7), 1e22, -1e-300, True, False, None]
        return random.choice([text(), text(), random.choice(words), random.choice(numbers)])

    def call() -> Call:
        name = random.choice([text(), text(), f"{text()}.py:{random.choice('fg')}", "2", "clip", "", "lambda"])
        settings = {key: value() for key in random.sample(["x", "rho", "a_b", "é"], random.randrange(4))}
        return Call(name, settings, random_tree(random, depth + 1) if depth < 3 and random.random() < 0.4 else None)

    if random.random() < 0.5:
        return call()
    weights = [random.choice([1.0, -1.0, 0.1, -2.0, random.uniform(-3, 3)]) for _ in range(random.randrange(1, 4))]
    return call() if weights == [1.0] else Sum(tuple((weight, call()) for weight in weights))


def test_the_canonical_form_parses_to_the_same_tree() -> None:
    random = Random(0)
    for _ in range(2000):
        tree = random_tree(random)
        assert parse(str(tree)) == tree, str(tree)
        assert str(parse(str(tree))) == str(tree)
