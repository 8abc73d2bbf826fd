"""The language of rewards and methods."""

from __future__ import annotations

from random import Random

import pytest

from draftune.errors import DraftuneError
from draftune.methods import DraftK, DraftLV, load_method
from draftune.registry.expression import Call, Sum, parse
from draftune.rewards import load_reward


def test_a_name_with_settings() -> None:
    assert parse("jpeg_compressibility(quality=80)") == Call("jpeg_compressibility", {"quality": 80})
    assert parse("clip(model='openai/clip-vit-large-patch14', scaled=True)") == Call(
        "clip", {"model": "openai/clip-vit-large-patch14", "scaled": True}
    )
    assert parse("a(x='two words', y=-1.5, z=None, style='3d',)") == Call(
        "a", {"x": "two words", "y": -1.5, "z": None, "style": "3d"}
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


def test_an_expression_inside_another() -> None:
    tree = parse("0.5*sharpness_aware(clip + 0.1*'my/file.py:sharp'(k=3), rho=0.02)")
    inner = Sum(((1.0, Call("clip")), (0.1, Call("my/file.py:sharp", {"k": 3}))))
    assert tree == Sum(((0.5, Call("robust", {"rho": 0.02}, inner)),))


@pytest.mark.parametrize(
    "text",
    [
        "sharpness_aware(clip + 0.1*'my/rewards.py:sharp'(k=3), rho=0.02)",
        'a(b(c), x="#ff 8", y=-1.5, z=None, e=1e-05, f=True)',
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
    assert load_method("draft_k(k=10)") == DraftK(10)
    assert load_method("draft_lv") == DraftLV(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draft_kk", "did you mean 'draft_k'"),
        ("draft_k(n=2)", "setting of method draft_k"),
        ("draft_k(k=0)", "at least 1"),
        ("draft_k(k=1.5)", "whole number"),
        ("draft_k(k=True)", "whole number"),
        ("draft_lv(n=-1)", "at least 0"),
        ("refl(m=None)", "whole number"),
        ("draft + refl", "one name"),
    ],
)
def test_methods_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(DraftuneError, match=message):
        load_method(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("w/sac+logos+ava1-l14-linearMSE.pth", "w/sac+logos+ava1-l14-linearMSE.pth"),
        ("my weights/a [1] & b.pth", "my weights/a [1] & b.pth"),
        ("C:\\new\\x (2, final).pth", "C:\\new\\x (2, final).pth"),
        ("'C:\\new, old\\x).pth'", "C:\\new, old\\x).pth"),
        ("it's*here.pth", "it's*here.pth"),
        ("a=b.pth", "a=b.pth"),
        ("2024-01-01/x", "2024-01-01/x"),
        ("-1e-3", -0.001),
        ("007", 7),
        ('"say ""hi"", it\'s"', 'say "hi", it\'s'),
    ],
)
def test_a_value_is_a_path_up_to_the_comma_or_the_closing_parenthesis(text: str, value: object) -> None:
    assert parse(f"a(x='{text}')") == Call("a", {"x": value})
    tree = parse(f"b + 0.5*sharpness_aware(a(x='{text}', y=2) - c, rho={text}) + d")
    inner = Sum(((1.0, Call("a", {"x": value, "y": 2})), (-1.0, Call("c"))))
    assert tree == Sum(((1.0, Call("b")), (0.5, Call("robust", {"rho": value}, inner)), (1.0, Call("d"))))


def test_a_file_of_the_user_may_have_spaces_in_its_path() -> None:
    fine = Call("my rewards/r [2] & co.py:fine", {"k": 3})
    assert parse("my rewards/r [2] & 'co.py:fine'(k=3)") == fine
    assert parse("0.1*my rewards/r [2] & 'co.py:fine'(k=3) - a") == Sum(((0.1, fine), (-1.0, Call("a"))))
    assert parse("sharpness_aware(2024 'runs/r.py:f' + a, rho=1)").inner == Sum(  # type: ignore[union-attr]
        ((1.0, Call("2024 runs/r.py:f")), (1.0, Call("a")))
    )
    for minus in ("a - 'b/r.py:f'", "a -b/r.py:f", "a- b/r.py:f"):
        assert parse(minus) == Sum(((1.0, Call("a")), (-1.0, Call("b/r.py:f"))))
    assert parse("a+'b/r.py:f'") == Sum(((1.0, Call("a")), (1.0, Call("b/r.py:f"))))


@pytest.mark.parametrize(
    "text", ["a (b)/r.py:f", "it's/r.py:f", "a(x=b, c.pth)", "a(x=b(c.pth)", "a(x='b)", "a(x='b'c)"]
)
def test_an_ambiguous_path_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(DraftuneError, match=r"cannot read .*in quotes"):
        parse(text)
    with pytest.raises(DraftuneError, match=r"unknown reward 'my'.*in quotes"):
        load_reward("my+'rewards/r.py:f'")


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(DraftuneError, match="'x' twice"):
        parse("a(x=1, x=2)")


def random_tree(random: Random, depth: int = 0) -> Call | Sum:
    """A tree whose names and values hold any characters."""

    def text() -> str:
        return "".join(random.choice("ab3.-/:~@_ +*(),=[]&\\'\"\n\t#é→") for _ in range(random.randrange(1, 9)))

    def value() -> str | float | int | bool | None:
        words = ["true", "None", "3d", "-", "1e5", ".5", "", "007"]
        numbers = [random.randrange(-99, 99), random.uniform(-1e-7, 1e7), 1e22, True, False, None]
        return random.choice([text(), text(), random.choice(words), random.choice(numbers)])

    def call() -> Call:
        name = random.choice([text(), text(), f"{text()}.py:{random.choice('fg')}", "2", "clip", ""])
        settings = {key: value() for key in random.sample(["x", "rho", "a-b", "k.v"], random.randrange(4))}
        return Call(name, settings, random_tree(random, depth + 1) if depth < 3 and random.random() < 0.4 else None)

    if random.random() < 0.5:
        return call()
    weights = [random.choice([1.0, -1.0, 0.1, -2.0, random.uniform(-3, 3)]) for _ in range(random.randrange(1, 4))]
    return call() if weights == [1.0] else Sum(tuple((weight, call()) for weight in weights))


def test_whatever_the_characters_what_is_written_reads_the_same() -> None:
    random = Random(0)
    for _ in range(2000):
        tree = random_tree(random)
        assert parse(str(tree)) == tree, str(tree)
