"""Prompt sets and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftune.errors import DraftuneError
from draftune.prompts import PROMPT_SETS, load_prompts, metadata, run_prompts, split_prompts
from draftune.training.setup import prepare
from helpers.errors import raises


def test_sets() -> None:
    assert len(set(load_prompts("animals"))) == 45
    common, other = load_prompts("emoji-common"), load_prompts("emoji")
    assert len(set(common)) == 64
    assert len(other) > 500
    assert not set(common) & set(other)


def test_a_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa café\r\n\n  a dog \n".encode())
    assert load_prompts(str(path)) == ["a café", "a dog"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\x89PNG\r\n\x1a\n\xff\xfe", b"a\x00b\n"])
def test_empty_and_binary_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with raises(DraftuneError, "prompts.txt"):
        load_prompts(str(path))


@pytest.mark.parametrize("ending", [".txt", ".csv", ".json"])
def test_of_another_encoding_utf_8_is_wanted(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"prompts{ending}"
    path.write_bytes("prompt\ncafé\n".encode("latin-1"))
    with raises(DraftuneError, "UTF-8") as caught:
        load_prompts(str(path))
    assert "line" not in str(caught.value)


def test_what_is_not_there_is_refused() -> None:
    with raises(DraftuneError, "'animal' 'animals'"):
        load_prompts("animal")
    with raises(DraftuneError, "prompts/missing.txt"):
        load_prompts("prompts/missing.txt")
    with raises(DraftuneError, "empty"):
        load_prompts([])


def test_tables_carry_metadata(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,target,query\n"a cat, asleep",281,a cat\na dog,,\n,5,x\n', encoding="utf-8-sig")
    prompts = load_prompts(str(path))
    assert prompts == ["a cat, asleep", "a dog"]
    assert [metadata(prompt) for prompt in prompts] == [{"target": "281", "query": "a cat"}, {}]
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat", "target": 281}\n\n{"prompt": "a dog"}\n')
    prompts = load_prompts(str(path))
    assert prompts == ["a cat", "a dog"]
    assert [metadata(prompt) for prompt in prompts] == [{"target": "281"}, {}]
    assert metadata("plain text") == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "Prompt,target\na cat,281\n"),
        ("a.tsv", "target\tPROMPT\n281\ta cat\n"),
        ("a.jsonl", '{"Prompt": "a cat", "target": 281}\n'),
        ("a.json", '[{"Caption": "a cat", "target": "281"}]'),
        ("a.yaml", "- Text: a cat\n  target: 281\n"),
    ],
)
def test_the_column_of_the_prompt_may_be_in_capitals(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (prompt,) = load_prompts(str(tmp_path / name))
    assert (prompt, metadata(prompt)) == ("a cat", {"target": "281"})


def test_a_list_that_is_told_its_ending_is_read_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Prompt\na cat\n")
    with raises(DraftuneError, "a.txt .csv"):
        load_prompts(str(path))
    assert load_prompts(str(path.rename(path.with_suffix(".csv")))) == ["a cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "title\na cat\n", "a.csv line 2 'prompt'"),
        ("a.csv", "prompt\n", "a.csv"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl line 2 JSON"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "a.jsonl line 2 object"),
        ("a.jsonl", '{"prompt": 3}\n', "a.jsonl line 1 'prompt'"),
        ("a.csv", "Prompt,prompt\na,b\n", "a.csv line 2 'Prompt' 'prompt'"),
        ("a.json", '["a\\u001b b"]', "a.json 1 character"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with raises(DraftuneError, message):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|blue} {cat|dog}", ["a red cat", "a red dog", "a blue cat", "a blue dog"]),
        ("{a|{b|c} d}!", ["a!", "b d!", "c d!"]),
        ("a cat{, at night|}", ["a cat, at night", "a cat"]),
        ("{{a|b}|c}", ["a", "b", "c"]),
        ("{masterpiece}, a | b", ["{masterpiece}, a | b"]),
        ("{a|b} {c", ["a {c", "b {c"]),
        ("a} {b|c}", ["a} b", "a} c"]),
        ("{x {a|b}}", ["{x a}", "{x b}"]),
    ],
)
def test_alternatives_stand_for_several_prompts(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert load_prompts([text]) == expected
    (tmp_path / "prompts.csv").write_text(f'prompt,target\n"{text}",7\n')
    prompts = load_prompts(str(tmp_path / "prompts.csv"))
    assert prompts == expected
    assert all(metadata(prompt) == {"target": "7"} for prompt in prompts)


def test_too_many_and_blank_alternatives() -> None:
    with raises(DraftuneError, "10000"):
        load_prompts(["{a|b}" * 14])
    assert load_prompts(["{a|}"]) == ["a"]


def test_a_column_is_named_after_a_colon(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("Prompt,Long Caption\na cat,a cat on a mat\n")
    assert load_prompts(f"{path}:long caption") == ["a cat on a mat"]
    assert metadata(load_prompts(f"{path}:Long Caption")[0]) == {"Prompt": "a cat"}
    with raises(DraftuneError, "'Long' 'Long Caption'"):
        load_prompts(f"{path}:Long")


def test_a_folder_of_captions(tmp_path: Path) -> None:
    with raises(DraftuneError, tmp_path.name):
        load_prompts(str(tmp_path))
    (tmp_path / "b.txt").write_text("a dog\non a mat\n")
    (tmp_path / "a.caption").write_text("a {red|blue} cat")
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    assert load_prompts(str(tmp_path)) == ["a red cat", "a blue cat", "a dog on a mat"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a bird"}\n')
    assert load_prompts(str(tmp_path)) == ["a bird"]


def test_parquet_files_are_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = {"caption": ["a cat", "a dog"], "target": [3, None], "jpg": [b"\xff", b"\xfe"], "tags": [["a"], []]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "prompts.parquet")
    prompts = load_prompts(str(tmp_path / "prompts.parquet"))
    assert prompts == ["a cat", "a dog"]
    assert [metadata(prompt) for prompt in prompts] == [{"target": "3"}, {}]
    (tmp_path / "bad.parquet").write_text("prompt\n")
    with raises(DraftuneError, "bad.parquet"):
        load_prompts(str(tmp_path / "bad.parquet"))


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    prompts = [f"a {name}" for name in load_prompts("animals")] + ["a cat"]
    training, held_out = split_prompts(prompts, "9", seed=1)
    assert len(held_out) == len(set(held_out)) == 9
    assert set(training) | set(held_out) == set(prompts)
    assert not set(training) & set(held_out)
    assert split_prompts(prompts, "9", seed=1) == (training, held_out)
    assert split_prompts(prompts, "9", seed=2)[1] != held_out
    for number in ("0", "45", "46"):
        with raises(DraftuneError, f"eval_prompts={number} 45"):
            split_prompts(prompts, number, seed=1)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    assert run_prompts(str(tmp_path / "prompts.txt"), "9", 1) == held_out
    assert run_prompts("animals", None, 1) == load_prompts("animals")
    # The training prompts are not needed if the evaluation prompts are named.
    assert run_prompts("moved.txt", str(tmp_path / "prompts.txt"), 1) == prompts


def test_a_run_trains_on_what_is_not_held_out(tmp_path: Path) -> None:
    values = {"eval_prompts": "1", "output": str(tmp_path / "run"), "report_to": "none", "seed": 3}
    prompts = ["pizza", "sun", "rocket"]
    context = prepare("emoji", "brightness", prompts, None, "", None, values)
    assert (list(context.prompts), list(context.eval_prompts or ())) == split_prompts(prompts, "1", seed=3)
    assert len(context.prompts) == 2


def test_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "owner" / "sets" / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(
        {"Prompts": ["a cat", "a dog", "a cat"], "image": [b"1", b"2", b"3"], "n": [1, 2, 3]}
    )
    for split in ("train", "test"):
        table.select(range(3 if split == "train" else 1)).to_parquet(
            tmp_path / "owner" / "sets" / "data" / f"{split}-00000-of-00001.parquet"
        )
    read = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **o: read(str(tmp_path / name), cache_dir=str(tmp_path / "cache"), **o)
    )
    prompts = load_prompts("hf://datasets/owner/sets:Prompts")
    assert prompts == ["a cat", "a dog"]
    assert [metadata(prompt) for prompt in prompts] == [{"n": "1"}, {"n": "2"}]
    assert load_prompts("hf://datasets/owner/sets@test:prompts") == ["a cat"]
    with raises(DraftuneError, "Prompts caption"):
        load_prompts("hf://datasets/owner/sets:caption")
    with raises(DraftuneError, "'validation' owner/sets"):
        load_prompts("hf://datasets/owner/sets@validation:Prompts")
    (tmp_path / "owner" / "sets" / "data" / "train-00000-of-00001.parquet").rename(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "owner" / "sets" / "data" / "validation-00000-of-00001.parquet")
    with raises(DraftuneError, "validation test @SPLIT"):
        load_prompts("hf://datasets/owner/sets:Prompts")


def test_files_of_a_data_set_come_from_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "datasets--nateraw--parti-prompts"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "PartiPrompts.tsv").write_text("Prompt\tCategory\na cat\tAnimals\n")
    prompts = load_prompts("partiprompts")
    assert (prompts, metadata(prompts[0])) == (["a cat"], {"Category": "Animals"})
    with raises(DraftuneError, "benchmark/anime.json zhwang/HPDv2"):
        load_prompts("hpdv2-anime")


@pytest.mark.parametrize("name", ["drawbench", "pickapic", "pickapic-test"])
def test_sets_that_are_not_here_are_refused_offline(name: str) -> None:
    pytest.importorskip("datasets")
    source = PROMPT_SETS[name][1]
    assert isinstance(source, str)
    with raises(DraftuneError, source.split("/")[4].partition("@")[0].partition(":")[0]):
        load_prompts(name)


@pytest.mark.parametrize("text", ["hf://datasets/", "hf://datasets/owner", "hf://datasets/o/n/file.csv@test"])
def test_other_addresses_are_refused(text: str) -> None:
    with raises(DraftuneError, "OWNER/NAME"):
        load_prompts(text)


def test_a_hub_id_needs_its_prefix() -> None:
    with raises(DraftuneError, "hf://datasets/owner/sets"):
        load_prompts("owner/sets")
