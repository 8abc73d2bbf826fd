"""More bad inputs: outputs that can't be written, numbers out of range, pictures that are none, unknown names."""

from __future__ import annotations

import zlib
from pathlib import Path

from draftune.lora import FILE_NAME
from helpers.bad_files import source_replaced
from helpers.bad_inputs import DISTILL, HTML, LONG, NOISE, OF_A_LORA, TUNE, Bad, Making, bad, odd_path, quoted


@bad("train")
def output_of_training(m: Making) -> Bad:
    """A folder that holds something else, or none at all."""
    if m.random.random() < 0.5:
        path = m.any(str(m.world.run), str(m.world.run / "lora"), str(m.world.model), str(m.world.prompts.parent))
        return Bad(m.good("--output", path), [repr(path)])
    path = bad_output(m)
    return Bad(m.good("--output", path), quoted(path))


def bad_output(m: Making, suffix: str = "") -> str:
    """A path that nothing can be written to."""
    # A file takes the place of a link, wherever that leads.
    kind = m.any(
        "inside", "long", "under-loop", *([] if suffix else ["loop"]), *(["proc"] if m.command != "score" else [])
    )
    loop = m.here / f"ring{suffix}"
    if "loop" in kind and not loop.is_symlink():
        loop.symlink_to(loop)
    inside = Path(m.put("plain", "x")) / f"x{suffix}"
    found = {"inside": inside, "long": m.here / ("x" * 300 + suffix), "loop": loop, "under-loop": loop / f"x{suffix}"}
    return str(found.get(kind, Path("/proc/nothing") / f"x{suffix}"))


SUFFIXES = {"report": ".html", "sample": ".png", NOISE: ".png", "eval": ".csv", "score": ".csv"}


@bad("report", "sample", NOISE, "eval", "score", "sweep", "merge", DISTILL, TUNE, "export")
def output(m: Making) -> Bad:
    """An output that can't be written, is of another kind, or is what is read."""
    suffix, w = SUFFIXES.get(m.command, ""), m.world
    folder = m.here / f"folder{suffix}"
    folder.mkdir()
    (folder / "held").write_text("x")
    kinds = [bad_output(m, suffix), bad_output(m, suffix), ""]
    if suffix:
        kinds += [str(w.prompts), str(w.picture.with_suffix(".jpg"))]
        # Images go to a folder of any name but another image's.
        kinds += ["scores.webp" if suffix == ".png" else "scores.txt"]
        kinds += [str(w.run / "config.yaml"), str(w.run / "lora" / FILE_NAME)]
    else:
        kinds += [str(w.prompts), str(w.picture)]
    if m.command not in ("sweep", "sample", NOISE):
        kinds += [str(folder)]
    if m.command in ("merge", DISTILL, TUNE, "export"):
        kinds += [str(w.run), str(w.model), str(w.run / "lora"), str(w.prompts.parent)]
    path = m.any(*kinds)
    argv = m.good("--output", path)
    if m.command == "sweep" and not path:
        argv = m.good("--output", bad_output(m))
    return Bad(argv, [*quoted(path or "--output"), *quoted(argv[-1]), "/proc/nothing"])


@bad("eval", "score")
def table_over_prompts(m: Making) -> Bad:
    """The table would take the place of the file that the prompts come from."""
    name = m.random.choice(["p.csv", "sub/../p.csv", "./p.csv"])
    content = f"image,prompt\n{m.world.picture},a cat\n"
    (m.here / "sub").mkdir()
    m.put("p.csv", content)
    return Bad(m.good("--prompts", str(m.here / "p.csv"), "--output", f"{m.here}/{name}"), ["p.csv"])


NUMBERS: dict[str, dict[str, list[str]]] = {
    "all": {
        "--num-inference-steps": ["0", "-1", "abc", "1.5", "1001", "9" * 30, "", "nan"],
        "--guidance-scale": ["-1", "nan", "inf", "abc", "1e400", ""],
        "--mixed-precision": ["fp8", "", "BF16", "16"],
    },
    "scaled": {"--lora-scale": ["nan", "inf", "-inf", "1e400", "x", "0,5", ""]},
    "sample": {"--seed": ["-1", "x", "9" * 30, str(2**63), "0.5"], "--num-images": ["0", "-2", "x", "9" * 18, "1e3"]},
    "eval": {
        "--num-images": ["0", "-2", "x", "9" * 18],
        "--sort": ["nothing", "", "Brightness"],
        "--image-dir": ["FILE", "INSIDE"],
    },
    "sweep": {
        "--scales": ["", ",", "0,,1", "a", "nan", "0,inf", "1;2", "0 1", "0,1,", "1e400", "½"],
        "--num-images": ["0", "x"],
        "--metric-for-best-model": ["nothing", "brightness +", "2", "brightness(k=1)", "-nothing"],
    },
    DISTILL: {
        "--rank": ["0", "-1", "2", "x", "1.5", "9" * 30],
        "--group-balance": ["1", "-0.1", "nan", "x"],
        "--num-trajectories": ["0", "x"],
        "--steps-per-trajectory": ["0", "1.5"],
        "--batch-size": ["0", "-1"],
        "--learning-rate": ["nan", "-1", "inf", "x"],
        "--seed": ["-1", str(2**63)],
        "--mixed-precision": ["fp16", "fp8"],
    },
    TUNE: {
        "--weight-bounds": ["1", "1,0", "0,nan", "a,b", "", "0,1,2", "0;1", "0,inf", "1,1"],
        "--guidance-bounds": ["4,1", "0,4", "1", "x,y", "1,1e400"],
        "--fd-step": ["0", "0.5", "nan", "-1", "x"],
        "--learning-rate": ["nan", "-1", "inf", "x"],
        "--steps": ["0", "-1", "x"],
        "--batch-size": ["0", "1.5"],
        "--num-parameters": ["0", "x"],
        "--num-images": ["1", "x", "9" * 18],
        "--seed": ["-1", str(2**63)],
    },
    NOISE: {"--steps": ["0", "x", "-1"], "--learning-rate": ["nan", "-1", "inf", "x"], "--seed": ["-1", str(2**63)]},
    "watch": {"--port": ["99999", "-1", "x", "65536", "80a", "9" * 30, "8642.5", ""]},
    "ui": {"--port": ["99999", "-1", "x", "65536", "80a", "9" * 30, "8642.5", ""]},
    "export": {"--format": ["diffuser", "", "Kohya", "safetensors", "merged "]},
    "preflight": {"--memory": ["0", "-1", "nan", "inf", "x", "", "8GB", "1e400"]},
    "train": {
        "--metric-for-best-model": ["brightness +", "x(k=1)", "eval/x + "],
        "--early-stopping-patience": ["3"],
        "--height": ["7", "1"],
        "--lora-target-modules": ["nothing", "to_q,", ","],
    },
}


@bad(*NUMBERS.keys() - {"all", "scaled"})
def number(m: Making) -> Bad:
    known = dict(NUMBERS[m.command])
    if m.command in ("sample", "eval", "sweep", TUNE, NOISE):
        known |= NUMBERS["all"]
    if m.command in ("sample", "eval", NOISE, "export"):
        known |= NUMBERS["scaled"]
    flag = m.any(*known)
    value = m.any(*known[flag])
    if value == "FILE":
        value = str(m.world.prompts)
    if value == "INSIDE":
        value = str(m.world.prompts / "x")
    name = flag[2:].replace("-", "_")
    return Bad(
        m.good(f"{flag}={value}"),
        [
            flag,
            name,
            repr(value.lstrip("-"))[1:-1] or "''",
            "metric_for_best_model",
            "a part is",
            "lora_target_modules",
        ],
    )


@bad("score")
def pictures(m: Making) -> Bad:
    """No picture that can be read, or prompts that are not theirs."""
    whole = m.world.picture.read_bytes()
    png = b"\x89PNG\r\n\x1a\n"
    bomb = png + b"\x00\x00\x00\rIHDR\x00\x01\x00\x00\x00\x01\x00\x00\x08\x02\x00\x00\x00"
    bomb += zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    kinds = {
        "cut": whole[: len(whole) // 2],
        "html": HTML,
        "empty": b"",
        "head": png,
        "bomb": bomb,
        "flipped": whole[:60] + bytes(x ^ 255 for x in whole[60:]),
        "text": b"a cat",
        "lora": (m.world.run / "lora" / FILE_NAME).read_bytes()[:999],
    }
    name = m.any(*kinds, "folder", "missing", "pattern", "odd", "table")
    if name in kinds:
        path = m.put(f"{name}{m.any('.png', '.jpg', '.gif', '')}", kinds[name])
    elif name == "folder":
        path = str(m.here / "folder.png")
        Path(path).mkdir()
    elif name == "table":
        suffix, text = m.any(
            (".csv", "image,prompt\nother.png,x\n"),
            (".csv", "prompt\nx\n"),
            (".txt", "x\n"),
            (".jsonl", '{"image": 3, "prompt": "x"}\n'),
            (".csv", "image;prompt\na;b\n"),
            (".csv", "image,prompt\n"),
            (".jsonl", ""),
        )
        path = m.put(f"table{suffix}", text)
        return Bad(m.good("--prompts", path), ["table."])
    else:
        path = {"missing": "nowhere.png", "pattern": str(m.here / "*.png"), "odd": odd_path(m, ".png")}[name]
    return Bad(source_replaced(m, path), quoted(path))


@bad("merge")
def mixed(m: Making) -> Bad:
    run = str(m.world.run)
    source = m.any(
        f"{run}@",
        "@0.5",
        f"{run}@nan",
        f"{run}@inf",
        f"{run}@1e400",
        f"{run}@0.5@",
        f"{run}@half",
        f"{run}@0,5",
        f"{run}@1@x",
        f"{run}/lora/@-inf",
        f"{run}/config.yaml",
        f"{run}/config.yaml@0.3",
        f"{run} @0.5",
        f"{run}@ 0.5 0.6",
    )
    return Bad(["merge", source, run, "--output", str(m.here / "new")], [*quoted(source), run, "'@'", "''"])


@bad("export")
def exported(m: Making) -> Bad:
    out = m.here / "new"
    argv, names = m.any(
        (["--format", "kohya"], "kohya"),
        (["--output", f"{out}.safetensors"], "diffusers"),
        (["--format", "merged", "--output", f"{out}.safetensors"], "merged"),
        (["--format", "kohya", "--output", f"{out}.ckpt"], "kohya"),
        (["--dtype", "fp16", "--lora-scale", "1e30"], "finite"),
        (["--lora-scale", "1e60"], "finite"),
    )
    if m.random.random() < 0.2:
        return Bad(m.good("--best", source=m.world.run / "lora"), ["best"])
    return Bad(m.good(*argv), [names])


@bad("list")
def unknown_names(m: Making) -> Bad:
    name = m.any(
        "nothing", "reward", "griddd", "hpsv", "", " ", "\x1b[31m", "draft_lv(n=2)", "Methods", "grid ", "ünknown", LONG
    )
    return Bad([*m.command.split(), name], [*quoted(name)])


@bad("sample", NOISE, "score", "train")
def not_text(m: Making) -> Bad:
    """Bytes in a terminal's encoding that are no UTF-8, as Python hands them over."""
    broken = "caf\udce9"
    flag = {"train": "--negative-prompt"}.get(m.command, "--prompt")
    return Bad(m.good(flag, broken), ["caf\\udce9", "UTF-8"])


@bad(*OF_A_LORA, "report", "watch", "score")
def repeated_and_missing(m: Making) -> Bad:
    """A flag without its value."""
    flag = {"watch": "--port"}.get(m.command, "--output")
    return Bad([*m.good()[: 1 + len(m.command.split())], flag], [flag, "required"])
