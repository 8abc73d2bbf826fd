"""More bad inputs: LoRAs, models and runs that are damaged, or not there."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from draftune.lora import FILE_NAME
from helpers.bad_inputs import (
    BROKEN_YAML,
    DISTILL,
    HTML,
    LONG,
    NOISE,
    OF_A_LORA,
    OF_A_RUN,
    TRAINING,
    TUNE,
    Bad,
    Making,
    bad,
    odd_path,
    quoted,
)


@bad(*OF_A_LORA, "report", "watch")
def no_source(m: Making) -> Bad:
    """Nothing, or something else, where a run or a LoRA is wanted."""
    empty = m.here / "empty"
    empty.mkdir()
    others = str(empty), str(m.world.picture), str(m.world.prompts), "", "@", LONG
    path = m.any(odd_path(m, m.any("", ".safetensors")), *others)
    if m.command != NOISE and m.command != "sample":
        path = m.any(path, "emoji", str(m.world.model))
    return Bad(m.good(source=path) if path else source_replaced(m, ""), [*quoted(path), "empty"])


def source_replaced(m: Making, source: str) -> list[str]:
    argv = m.good()
    argv[1] = source
    return argv


def lora_content(m: Making, name: str) -> bytes:
    """The bytes of a file that is no LoRA, or not one of this model."""
    whole = (m.world.run / "lora" / FILE_NAME).read_bytes()
    raw: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut": lambda: whole[: m.random.randrange(1, len(whole))],
        "html": lambda: HTML,
        "pickle": lambda: pickle.dumps({"state_dict": [1, 2, 3]}),
        "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "header": lambda: b"\xff" * 8 + whole[8:],
        "json": lambda: (5).to_bytes(8, "little") + b"{]}  ",
        "zeros": lambda: bytes(len(whole)),
        "longer": lambda: whole + b"more",
    }
    return raw[name]()


RAW = ("empty", "cut", "html", "pickle", "pointer", "header", "json", "zeros", "longer")


@bad(*OF_A_LORA)
def lora_file(m: Making) -> Bad:
    name = m.any(*RAW)
    folder = m.any("", "lora/")
    file = m.any("style.safetensors", FILE_NAME) if not folder else FILE_NAME
    path = m.put(folder + file, lora_content(m, name))
    return Bad(m.good(source=m.here if folder else path), [repr(path)])


@bad("sample", "eval", "sweep", NOISE, "merge", DISTILL, TUNE, "export")
def lora_tensors(m: Making) -> Bad:
    """A readable file whose tensors are not those of a LoRA of this model."""
    file = m.world.run / "lora" / FILE_NAME
    tensors = load_file(file)
    said = {"base_model": str(m.world.model)}
    names = sorted(tensors)
    some = m.any(*names)
    kinds: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "half": lambda: {k: v for k, v in tensors.items() if k != some},
        "nothing": lambda: {"weight": torch.ones(2)},
        "encoder": lambda: {f"text_encoder.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"},
        "flat": lambda: {k: v.flatten() for k, v in tensors.items()},
        "nan": lambda: {k: v * float("nan") for k, v in tensors.items()},
        "dora": lambda: {**tensors, "unet.x.lora_magnitude_vector": torch.ones(4)},
        "checkpoint": lambda: load_file(next(m.world.run.glob("checkpoints/*/tensors.safetensors"))),
        "whole": lambda: load_file(m.world.model / "unet" / "diffusion_pytorch_model.safetensors"),
        "strange": lambda: {**tensors, **{k.replace("unet.", "unet.no.such."): v for k, v in tensors.items()}},
        "ranks": lambda: {k: v[:1] if k == some.replace("lora.up", "lora.down") else v for k, v in tensors.items()},
        "integers": lambda: {k: v.to(torch.int64) for k, v in tensors.items()},
    }
    name = m.any(*kinds)
    path = m.here / f"{name}.safetensors"
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in kinds[name]().items()}, path, said)
    return Bad(m.good(source=path), [str(path), "finite"])


@bad("sample", "eval", "sweep", NOISE)
def lora_metadata(m: Making) -> Bad:
    """A LoRA that says nothing, or something wrong, of its model, its rank or its alpha."""
    from draftune.lora import CONFIG

    tensors = load_file(m.world.run / "lora" / FILE_NAME)
    base = {"base_model": str(m.world.model)}
    said: dict[str, str] | None = m.any(
        None,
        {},
        {"base_model": ""},
        {"base_model": "nowhere"},
        {"base_model": "someone/gone"},
        {"base_model": str(m.here)},
        {**base, CONFIG: "{"},
        {**base, CONFIG: "[1]"},
        {**base, CONFIG: '{"unet.r": "x"}'},
        {**base, "sampler_options": "[", CONFIG: "{}"},
    )
    path = m.here / "lora.safetensors"
    save_file(tensors, path, said)
    return Bad(m.good(source=path), ["lora.safetensors'", "nowhere", "someone/gone", repr(str(m.here))])


@bad("sample", "eval", "sweep", NOISE, "merge")
def another_model(m: Making) -> Bad:
    """A LoRA with a model that it was not trained on."""
    if m.command == "merge":
        return Bad(["merge", str(m.world.run), str(m.world.other), "--output", str(m.here / "new")], ["other"])
    return Bad(m.good("--model", str(m.world.model), source=m.world.other), ["other"])


@bad(*TRAINING, "sample", "eval", "sweep", NOISE, "export")
def model(m: Making) -> Bad:
    """A model that is not there, or damaged."""
    more = ["--format", "merged"] if m.command == "export" else []
    if m.random.random() < 0.4:
        others = str(m.world.prompts), str(m.world.run), "emojy", "a/b/c", "someone/gone", "/", "..", " ", LONG
        path = m.any(odd_path(m), *others)
        return Bad(m.good(*more, "--model", path), [*quoted(path), "--model"])
    folder = Path(shutil.copytree(m.world.model, m.here / "model"))
    part = m.any(
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/config.json",
    )
    path = folder / part
    if not path.exists():
        path = folder / "tokenizer" / "tokenizer.json"
    how = m.any("cut", "html", "empty", "gone", "list", "binary")
    if how == "gone":
        path.unlink()
    else:
        whole = path.read_bytes()
        found = {"cut": whole[: len(whole) // 2], "html": HTML, "empty": b"", "list": b"[1]", "binary": b"\xff\xfe\x00"}
        path.write_bytes(found[how])
    return Bad(m.good(*more, "--model", str(folder)), [str(folder)])


BROKEN_ROWS: dict[str, bytes] = {
    "word": b"oops\n",
    "list": b"[1, 2]\n",
    "number": b"3\n",
    "null": b"null\n",
    "no-step": b'{"reward": 1}\n',
    "text-step": b'{"step": "1", "reward": 1}\n',
    "null-step": b'{"step": null}\n',
    "list-step": b'{"step": [1]}\n',
    "text-reward": b'{"step": 1, "reward": "high", "reward_queries": 1, "train_seconds": 1, "eval/x": "high"}\n',
    "list-reward": b'{"step": 1, "reward": [1], "reward_queries": {}, "train_seconds": 1}\n',
    "only-step": b'{"step": 1}\n',
    "utf-16": "{}\n".encode("utf-16"),
    "nul": b"\x00" * 64 + b"\n",
    "deep": b"[" * 100_000 + b"\n",
    "half": b'{"step": 1, "rewa\n',
    "cut-character": b'{"step": 1, "x": "\xc3\n',
    "stderr": b'{"step": 0, "stderr": 3, "prompts": 3, "scores": "x"}\n',
    "html": HTML,
}


@bad("report", "watch")
def log(m: Making) -> Bad:
    """A line in one of a run's logs that is none, with good ones after it."""
    run, name = m.run(), m.any("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
    kind = m.any(*BROKEN_ROWS)
    path = run / name
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(m.random.randrange(len(lines)), BROKEN_ROWS[kind])
    path.write_bytes(b"".join(lines))
    if m.random.random() < 0.1:
        path.unlink()
        path.mkdir()
    return Bad(m.good(source=run), [name])


@bad(*OF_A_RUN)
def config(m: Making) -> Bad:
    """A run whose config.yaml was edited, cut or taken away."""
    run = m.run()
    path, name = run / "config.yaml", m.any(*(set(BROKEN_YAML) - {"control"}))
    content = BROKEN_YAML[name]
    if m.random.random() < 0.5:
        setting, value = m.any(
            ("steps", "many"),
            ("seed", "-1"),
            ("num_inference_steps", "0"),
            ("lora_rank", "[8]"),
            ("stepss", "3"),
            ("timestep_spacing", "trialing"),
            ("guidance_scale", ".nan"),
            ("height", "none"),
            ("reward", "3"),
        )
        content = path.read_bytes() + f"{setting}: {value}\n".encode()
    if m.random.random() < 0.1:
        content = b""
    path.write_bytes(content)
    if m.random.random() < 0.1:
        path.unlink()
        path.mkdir()
    if m.command in ("sample", "export", NOISE, "eval", "sweep", DISTILL, TUNE) and path.is_dir():
        path.rmdir()
        path.write_bytes(HTML)
    return Bad(m.good(source=run), ["config.yaml"])


@bad("train")
def checkpoint(m: Making) -> Bad:
    """A run that is to go on from a checkpoint or logs that are damaged."""
    run = m.run()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    path = m.any(
        newest / "state.json",
        newest / "tensors.safetensors",
        newest / "checksums.json",
        newest,
        run / "metrics.jsonl",
        run / "samples.jsonl",
    )
    if path == newest:
        shutil.rmtree(newest)
        m.any(lambda: newest.write_text("x"), newest.mkdir)()
    elif path.suffix == ".jsonl":
        lines = path.read_bytes().splitlines(keepends=True)
        wrong = m.any(BROKEN_ROWS["word"], BROKEN_ROWS["list"], BROKEN_ROWS["no-step"], b"\xff\n")
        path.write_bytes(wrong + b"".join(lines))
    else:
        how, whole = m.any("cut", "html", "empty", "gone", "list", "flip"), path.read_bytes()
        path.unlink()
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        found = {"cut": whole[: len(whole) // 2], "html": HTML, "empty": b"", "list": b"[1]", "flip": flipped}
        if how != "gone":
            path.write_bytes(found[how])
    argv = ["train", "--config", str(run / "config.yaml"), "--output", str(run), "--steps", "9"]
    return Bad(argv, [path.name, newest.name])
