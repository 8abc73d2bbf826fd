"""Odd prompt files by a generator with a fixed seed, each with the prompts that it holds or the reason to refuse it.

What a file holds is known before the file is written: entries are drawn first, and written in one of the formats by
code of its own. A file that is no prompt file is made from a good one by one change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

INVISIBLE = ["", " ", "\t", "\u00a0", "\u200b", "\ufeff", "\u2060", "\u00ad", "\u2028", "\u3164", "\u200b\u00a0"]
SEPARATORS = ["\u2028", "\u2029", "\u0085", "\v", "\f"]
"""What `str.splitlines` splits at besides newlines."""
WORDS = [
    "a cat", "two dogs", "a (cat:1.3), [dog]", "<lora:style:0.8>", "BREAK", "cat --w 768 --s 28", "# not a comment",
    "猫の写真", "un café", "👩‍🚀 on the moon", "it's", 'says "OPEN"', "100%", "a; b; c", "{red} ball", "[dog]",
    "a, b, c", "key: value", "x = y", "-dash", "*star*", "null", "123", "true", "a\\nb", "&amp;", "<b>",
    "prompt engineer",
]  # fmt: skip


@dataclass
class OddPrompts:
    """A file's ending and content, and its prompts with their metadata, or a word of the one line that refuses it."""

    ending: str
    content: bytes
    prompts: list[str] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    refused: str = ""
    kind: str = ""


Entry = tuple[str, dict[str, str]]


def text(random: Random, newlines: bool = False) -> str:
    """A prompt as a file may hold it; with characters that are taken for ends of lines, and are none."""
    words = random.choices(WORDS, k=random.randrange(1, 4))
    glue = [" ", ", ", *SEPARATORS, *(["\n", "\r\n"] if newlines else [])]
    return random.choice(glue).join(words)


def drawn(random: Random, tables: bool, newlines: bool) -> list[Entry]:
    found = []
    for _ in range(random.randrange(1, 6)):
        columns = random.sample(["target", "query", "a b", "é"], random.randrange(0, 3)) if tables else []
        found.append((text(random, newlines), {name: random.choice(["281", "a cat", "x"]) for name in columns}))
    return found


def csv_cell(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def table(random: Random, entries: list[Entry], delimiter: str, key: str, end: str) -> str:
    names = sorted({name for _, more in entries for name in more})
    place = random.randrange(len(names) + 1)
    header = [*names[:place], key, *names[place:]]
    rows = [{key: prompt, **more} for prompt, more in entries]
    for _ in range(random.randrange(2)):
        rows.insert(random.randrange(len(rows) + 1), {key: random.choice(INVISIBLE)})
    lines = [delimiter.join(header)]
    lines += [delimiter.join(csv_cell(row[name]) if name in row else "" for name in header) for row in rows]
    return end.join([*lines, *random.choice([[], [""], ["", ""]])])


def yaml_text(prompt: str) -> str:
    # Every text of JSON is one of YAML, but for these, at which a line of YAML ends as well.
    text = json.dumps(prompt, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if c in "\u2028\u2029\u0085" else c for c in text)


def good(random: Random, ending: str) -> OddPrompts:
    """A good file: blank entries, any end of lines, a mark of UTF-8, endings in capitals."""
    tables, end = ending not in (".txt", ""), random.choice(["\n", "\r\n", "\r"])
    entries = drawn(random, tables, tables)
    key = random.choice(["prompt", "prompt", "text", "caption"])
    if ending in (".csv", ".tsv"):
        content = table(random, entries, "," if ending == ".csv" else "\t", key, end)
    elif ending == ".jsonl":
        rows = [json.dumps({key: prompt, **more}, ensure_ascii=random.random() < 0.5) for prompt, more in entries]
        rows.insert(random.randrange(len(rows)), random.choice(["", "  ", json.dumps({key: random.choice(INVISIBLE)})]))
        content = end.join(rows)
    elif ending in (".json", ".yaml", ".yml"):
        plain = [prompt if not more and random.random() < 0.5 else {key: prompt, **more} for prompt, more in entries]
        plain.insert(random.randrange(len(plain)), random.choice(INVISIBLE))
        if ending == ".json" or random.random() < 0.3:
            content = json.dumps(
                plain, ensure_ascii=ending != ".json" or random.random() < 0.5, indent=random.choice([None, 1])
            )
        else:
            lines = []
            for entry in plain:
                more = entry.items() if isinstance(entry, dict) else []
                pairs = [f"{yaml_text(name)}: {yaml_text(value)}" for name, value in more]
                lines.append("- " + ("\n  ".join(pairs) or yaml_text(str(entry))))
            content = end.join(lines)
    else:
        # A line that looks like the first of another format would make another of the whole.
        lines = ["a sign", *(prompt for prompt, _ in entries)]
        entries = [("a sign", {}), *entries]
        for _ in range(random.randrange(3)):
            lines.insert(random.randrange(1, len(lines) + 1), random.choice(INVISIBLE[:2] + INVISIBLE[3:8]))
        content = end.join(lines) + random.choice(["", end])
    mark = b"\xef\xbb\xbf" if random.random() < 0.3 else b""
    shown = ending.upper() if random.random() < 0.2 else ending
    prompts = [prompt.strip() for prompt, _ in entries]
    return OddPrompts(shown, mark + content.encode(), prompts, [more for _, more in entries], kind=f"good {ending}")


def refused(kind: str, ending: str, content: str | bytes, *words: str) -> Callable[[Random], OddPrompts]:
    def make(random: Random) -> OddPrompts:
        raw = content if isinstance(content, bytes) else content.encode()
        return OddPrompts(ending, raw, refused=random.choice(words), kind=kind)

    return make


BOMB = "- &a [x, x]\n" + "".join(f"- &{chr(b + 1)} [*{chr(b)}, *{chr(b)}, *{chr(b)}]\n" for b in range(97, 121))
"""A list that takes gigabytes when it is written out."""

BAD: list[Callable[[Random], OddPrompts]] = [
    refused("an array of JSON", ".txt", '["a cat",\n "a dog"]', ".json"),
    refused("broken JSON", ".txt", '[\n"a cat",\n"a dog"', ".json"),
    refused("an object", ".txt", '{\n  "prompts": ["a cat"]\n}', ".json"),
    refused("JSON Lines", ".txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', ".jsonl"),
    refused("YAML", ".txt", "- a cat\n- a dog\n", ".yaml"),
    refused("YAML of mappings", ".txt", "- prompt: a cat\n  target: 3\n", ".yaml"),
    refused("tabs", ".txt", "prompt\ttarget\na cat\t281\n", ".tsv"),
    refused("commas", ".txt", "prompt,target\na cat,281\n", ".csv"),
    refused("semicolons", ".txt", "prompt;target\na cat;281\n", "semicolons"),
    refused("no ending", "", '["a cat"]', ".json"),
    refused("semicolons in a table", ".csv", "prompt;target\na cat;1\n", "semicolons"),
    refused("tabs in a table with commas", ".csv", "prompt\ttarget\na cat\t1\n", ".tsv"),
    refused("commas in a table with tabs", ".tsv", "prompt,target\na cat,1\n", ".csv"),
    refused("no column", ".csv", "title,target\na cat,1\n", "'prompt'"),
    refused("no key", ".jsonl", '{"title": "a cat"}\n', "'prompt'"),
    refused("no key in an array", ".json", '[{"title": "a cat"}]', "'prompt'"),
    refused("no key in a list", ".yaml", "- title: a cat\n", "'prompt'"),
    refused("a comma outside of quotes", ".csv", "prompt\na cat, asleep\n", "line 2"),
    refused("a tab too many", ".tsv", "prompt\na cat\tasleep\n", "line 2"),
    refused("an open quote", ".csv", 'prompt\n"a cat\na dog\n', "line 3", "line"),
    refused("a quote inside", ".csv", 'prompt\n"a "cat""\n', "line 2"),
    refused("a column twice", ".csv", "prompt,prompt\na,b\n", "twice"),
    refused("a key twice", ".jsonl", '{"prompt": "a", "prompt": "b"}\n', "twice"),
    refused("a key twice in a list", ".yaml", "- prompt: a\n  prompt: b\n", "twice"),
    refused("an array in lines", ".jsonl", '["a cat", "a dog"]\n', "line 1"),
    refused("an array over lines", ".jsonl", '[\n"a cat"\n]\n', ".json"),
    refused("lines in an array's file", ".json", '{"prompt": "a"}\n{"prompt": "b"}\n', ".jsonl"),
    refused("one object", ".json", '{"prompt": "a cat"}', "array"),
    refused("a text", ".json", '"a cat"', "array"),
    refused("a number among texts", ".json", '["a cat", 3]', "entry 2"),
    refused("an array among texts", ".json", '["a cat", ["a dog"]]', "entry 2"),
    refused("null", ".json", '["a cat", null]', "entry 2"),
    refused("a number for a prompt", ".json", '[{"prompt": 3}]', "entry 1"),
    refused("cut off", ".json", '["a cat", "a d', "not JSON"),
    refused("too deep", ".json", "[" * 100_000, "JSON"),
    refused("too many digits", ".json", "[" + "9" * 6000 + "]", "JSON"),
    refused("half a pair", ".json", '["\\ud800"]', "entry 1"),
    refused("a control character", ".json", '["a\\u001b[31m cat"]', "entry 1"),
    refused("an empty array", ".json", "[]", "empty"),
    refused("nothing", ".json", "", "empty"),
    refused("blank texts", ".json", '["", " ", "\\u200b"]', "empty"),
    refused("one mapping", ".yaml", "prompt: a cat\n", "list"),
    refused("one scalar", ".yml", "a cat\n", "list"),
    refused("two documents", ".yaml", "- a\n---\n- b\n", "YAML"),
    refused("a list inside", ".yaml", "- - a cat\n", "entry 1"),
    refused("itself", ".yaml", "- &a [*a]\n", "YAML"),
    refused("no alias", ".yaml", "- *nothing\n", "YAML"),
    refused("a bomb", ".yaml", BOMB, "entry 1"),
    refused("a colon", ".yaml", "- a cat: asleep\n", "'prompt'"),
    refused("a tab", ".yaml", "-\ta cat\n\t- b\n", "YAML"),
    refused("code", ".yaml", "- !!python/object/apply:os.system ['true']\n", "entry 1"),
    refused("nothing in it", ".yaml", "# nothing\n", "empty"),
    refused("another ending", ".md", "a cat\n", ".md"),
    refused("another ending", ".docx", "a cat\n", ".docx"),
    refused("another ending", ".prompts", "a cat\n", ".txt"),
    refused("UTF-16", ".txt", "a cat\n".encode("utf-16"), "UTF-8"),
    refused("Latin-1", ".csv", b"prompt\ncaf\xe9\n", "UTF-8"),
    refused("binary", ".txt", b"a\x00b\n", "binary"),
    refused("escapes", ".txt", b"\x1b[31ma cat\n", "binary"),
    refused("nothing", ".txt", "", "empty"),
    refused("invisible lines", ".txt", "\u200b\n\u00a0\n\ufeff\n\u00ad\u2060\n\u3164\n", "empty"),
    refused("a header alone", ".tsv", "prompt\ttarget\n", "empty"),
]  # fmt: skip


def odd_prompts(seed: int = 0, count: int = 120) -> list[OddPrompts]:
    """Every bad file once, and good ones of all endings."""
    random = Random(seed)
    endings = [".txt", ".csv", ".tsv", ".jsonl", ".json", ".yaml", ".yml", ""]
    found = [make(random) for make in BAD]
    return found + [good(random, endings[i % len(endings)]) for i in range(count - len(found))]
