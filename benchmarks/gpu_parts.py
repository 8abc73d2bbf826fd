"""The parts of `gpu.py`. Each runs in a process of its own and appends a row to rows.jsonl as soon as it is measured.

python benchmarks/gpu_parts.py sd14 --output gpu-results
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import gc
import os
import statistics
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import architectures
import full_size
import gpu
import levers
from draftune.errors import DraftuneError, one_line
from draftune.models import DiffusionModel, load_model
from draftune.runs.environment import environment
from draftune.training import placement
from draftune.utils.devices import default_device
from gpu_rows import SIZES, Row, Rows
from published_configs import SHORT
from small_configs import SHALLOW, TINY

WARM_UP = 2
"""Untimed updates: they allocate the optimizer's state and fill caches."""
TIMED = 3
"""Timed updates, whose median is shown."""
CALLS = 10
"""Timed calls of a network, whose median is shown."""


class Kit(Rows):
    """The arguments of a part, and the rows of all parts."""

    def __init__(self, output: Path, device: str, tiny: bool) -> None:
        super().__init__(tiny)
        self.output, self.device = output, device

    def add(self, part: str, row: str, **values: Any) -> None:
        """Store values of a row."""
        gpu.add(self.output, part, row, **values)

    @contextmanager
    def failures(self, part: str, row: str) -> Iterator[None]:
        """Store the error of a row, and free its memory."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(part, row, failed=one_line(f"{type(error).__name__}: {error}")[:200])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(kit: Kit, part: str, rows: Sequence[Row]) -> None:
    """Measure the updates of some rows of a part."""
    for row in rows:
        with kit.failures(part, row.name):
            shared = row.settings.get("prefix_reuse_steps", 1)  # updates that share a prefix are timed together
            settings = {"prompts": [full_size.LONG], **row.settings, "device": kit.device}
            result = full_size.real(row.model, settings, (WARM_UP + TIMED) * shared)
            values = update_values(result, shared)
            if part == "levers":
                plain = gpu.read(kit.output).get((part, "plain"), values)
                values["by_plain"] = values["seconds"] / plain["seconds"]
            kit.add(part, row.name, **values, settings=row.settings)


def measure_levers(kit: Kit) -> None:
    """Measure the rows of `levers`, the variants of a call, and last what is compiled, which takes long."""
    rows = kit.rows("levers")
    measure(kit, "levers", [row for row in rows if not row.settings.get("compile")])
    time_calls(kit, "levers")
    measure(kit, "levers", [row for row in rows if row.settings.get("compile")])
    time_calls(kit, "levers", "compiled")


def update_values(result: Mapping[str, Any], shared: int) -> dict[str, Any]:
    """Return the values of a row, given the result of `full_size.real`."""
    walls = [wall for wall, _ in result["times"]]
    groups = [statistics.mean(walls[i : i + shared]) for i in range(0, len(walls), shared)]
    values = {"seconds": statistics.median(groups[WARM_UP:])}
    names = {"held": "networks_bytes", "peak": "peak_bytes", "allocated": "allocated_bytes"}
    names["reserved"] = "reserved_bytes"
    return {**values, **{names[key]: result[key] for key in names if key in result}, "updates": walls}


def time_calls(kit: Kit, part: str, *names: str) -> None:
    """Time a guided call of Stable Diffusion 1.4 without gradient and with its backward pass, as `levers.py` does.

    Args:
        kit: The arguments.
        part: The part that the rows belong to.
        *names: "compiled" or names of `levers.GRAPHS`; by default the other variants.
    """
    device, prompts = default_device(kit.device), full_size.PROMPTS[:1]

    def made(layout: torch.memory_format = torch.channels_last) -> DiffusionModel:
        pipeline = architectures.pipeline(SHORT["sd14"], torch.bfloat16, device)
        return levers.prepared(load_model(pipeline).to(device, "bf16"), layout)

    plain = made()
    models = {"plain": plain}
    if not names:
        models |= {"inference mode": plain, "guidance in two calls": plain}
        models["channels first"] = made(torch.contiguous_format)
    elif "compiled" in names:
        models["compiled"] = made()
        models["compiled"].denoiser.compile(backend=placement.COMPILE_BACKEND)
    free, graph = levers.calls(models, prompts)
    for name in names or models:
        with kit.failures(part, f"a call, {name}"):
            if name in levers.GRAPHS:
                free[name] = levers.graphed(plain, prompts, tensor_timestep=name == levers.GRAPHS[1])
            times = levers.measured({"plain": free["plain"], name: free[name]}, CALLS)
            ratios = [b / a for a, b in zip(times["plain"], times[name], strict=True)]
            values = {"seconds": statistics.median(times[name]), "by_plain": statistics.median(ratios)}
            if name in graph:
                values["with_gradient_seconds"] = statistics.median(levers.measured({"": graph[name]}, CALLS)[""])
            kit.add(part, f"a call, {name}", **values)


def count(kit: Kit) -> None:
    """Count the memory of the rows of all parts that measure updates."""
    os.nice(19)
    done = gpu.read(kit.output)
    for part in (*SIZES, "transformers"):
        for row in kit.rows(part)[: 1 if kit.tiny else None]:
            if row.counted is None or "counted_peak_bytes" in done.get((part, row.name), {}):
                continue
            settings = {**full_size.DEFAULTS, **row.settings, **row.counted, "model": SHORT[row.model]}
            try:
                result = full_size.count(settings)
            except Exception:
                traceback.print_exc()
                continue
            values = {"counted_networks_bytes": result["networks"], "counted_peak_bytes": result["update"]}
            kit.add(part, row.name, **values)


class Recorder:
    """A pytest plugin that stores a row for each test: its outcome, its seconds and what it recorded."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        values = {"outcome": report.outcome, "seconds": round(report.duration, 3), **dict(report.user_properties)}
        if isinstance(report.longrepr, tuple):  # a skipped test: file, line and reason
            values["reason"] = report.longrepr[2]
        elif not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            values["failed"] = one_line(getattr(crash, "message", report.longrepr))[:200]
        self.kit.add("tests", report.nodeid.rpartition("::")[2], **values)


def run_tests(kit: Kit) -> int:
    """Run the tests of tests/test_gpu.py: on a GPU those marked `gpu`, on a CPU the quick ones of the others."""
    mark = "not gpu and not slow" if kit.device == "cpu" else "gpu"
    tests = Path(__file__).parent.parent / "tests" / "test_gpu.py"
    options = ["-m", mark, "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0", "-rs"]
    return int(pytest.main([str(tests), *options], plugins=[Recorder(kit)]))


def compare_with_trl(kit: Kit) -> None:
    """Compare with TRL's AlignPropTrainer as `alignprop.py` does, on Stable Diffusion 1.4's size."""
    if find_spec("trl") is None:
        kit.add("alignprop", "TRL", failed="trl is not installed: carry the releases named in benchmarks/alignprop.py")
        return
    import alignprop

    steps, ks = (3, (1, 2)) if kit.tiny else (20, (1, 10))
    with TemporaryDirectory() as folder:
        architectures.pipeline(SHORT["sd14"], torch.float32, kit.device).save_pretrained(folder)
        values = {"model": folder, "reward": architectures.ViTH(kit.device), "prompts": full_size.PROMPTS}
        values |= {"steps": steps, "guidance_scale": 7.5, "batch_size": 4, "rounds": 3}
        for k in ks:
            with kit.failures("alignprop", f"K = {k}"):
                kit.add("alignprop", f"K = {k}", **alignprop.time_updates(Namespace(**values), k))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(gpu.FIRST, *gpu.PARTS, gpu.COUNTS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    kit = Kit(args.output, args.device, args.tiny)
    architectures.CHANGES |= TINY if args.tiny else SHALLOW
    if args.device == "cpu":
        placement.COMPILE_BACKEND = "eager"  # inductor needs a C++ compiler and minutes
    if args.part == gpu.FIRST:
        try:
            kit.add(gpu.FIRST, "machine", **environment(default_device(args.device)))
        except DraftuneError as error:
            print(error, file=sys.stderr)
            return 2
    elif args.part == "tests":
        return run_tests(kit)
    elif args.part == gpu.COUNTS:
        count(kit)
    elif args.part == "alignprop":
        compare_with_trl(kit)
    elif args.part == "levers":
        measure_levers(kit)
    elif args.part == "graphs":
        time_calls(kit, "graphs", *levers.GRAPHS)
    else:
        measure(kit, args.part, kit.rows(args.part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
