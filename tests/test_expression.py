"""The language of rewards and methods."""

from __future__ import annotations

import pytest

from draftune.errors import DraftuneError
from draftune.expression import Call, Sum, parse
from draftune.methods import DraftK, DraftLV, load_method


def test_a_name_with_settings() -> None:
    assert parse("jpeg-compressibility(quality=80)") == Call("jpeg-compressibility", {"quality": 80})
    assert parse("clip(model=openai/clip-vit-large-patch14, scaled=true)") == Call(
        "clip", {"model": "openai/clip-vit-large-patch14", "scaled": True}
    )
    assert parse("a(x='two words', y=-1.5, z=none, style=3d,)") == Call(
        "a", {"x": "two words", "y": -1.5, "z": None, "style": "3d"}
    )


def test_a_sum_with_weights() -> None:
    tree = parse("hpsv2 + 0.1*aesthetic - jpeg-incompressibility(quality=80) - clip * 1e-2")
    assert tree == Sum(
        (
            (1.0, Call("hpsv2")),
            (0.1, Call("aesthetic")),
            (-1.0, Call("jpeg-incompressibility", {"quality": 80})),
            (-0.01, Call("clip")),
        )
    )
    assert parse("-clip") == Sum(((-1.0, Call("clip")),))


def test_an_expression_inside_another() -> None:
    tree = parse("0.5*robust(clip + 0.1*my/file.py:sharp(k=3), rho=0.02)")
    inner = Sum(((1.0, Call("clip")), (0.1, Call("my/file.py:sharp", {"k": 3}))))
    assert tree == Sum(((0.5, Call("robust", {"rho": 0.02}, inner)),))


@pytest.mark.parametrize(
    "text",
    [
        "robust(clip + 0.1*my/rewards.py:sharp(k=3), rho=0.02)",
        'a(b(c), x="#ff 8", y=-1.5, z=none, e=1e-05, f=true)',
        '"my dir/x.py:f"(k=1)',
        'a - 0.5*b + c(q="3d", r=\'say "hi"\')',
    ],
)
def test_what_is_written_reads_the_same(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "a +", "a b", "2", "a(", "a(1)", "a(x=1, b)", "a(b, c)", "a(x=)", "a * b", "a(x=1", "a & b", "*a", "+a"],
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(DraftuneError, match="cannot read"):
        parse(text)


def test_methods_by_name() -> None:
    assert load_method("draft-k(k=10)") == DraftK(10)
    assert load_method("draft-lv") == DraftLV(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draft-kk", "did you mean 'draft-k'"),
        ("draft-k(n=2)", "setting of method draft-k"),
        ("draft-k(k=0)", "at least 1"),
        ("draft-k(k=1.5)", "whole number"),
        ("draft-k(k=true)", "whole number"),
        ("draft-lv(n=-1)", "at least 0"),
        ("refl(m=none)", "whole number"),
        ("draft + refl", "one name"),
    ],
)
def test_methods_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(DraftuneError, match=message):
        load_method(text)
