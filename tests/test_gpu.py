"""What only a GPU can show, by tests that run on a CPU too: gradients, resuming, quantized weights, memory, NCCL.

`pytest -m gpu` runs them on the first GPU, as `benchmarks/gpu.py` does. Each is also a test on the CPU, where a mistake
in its code shows. The bounds on a GPU were not measured yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# cuBLAS reads it when it is first used; without it, its results differ between runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from safetensors.torch import load_file
from test_quantization import gradient as latent_gradient
from test_quantization import gradient_by_hand
from torch import Tensor, nn

from draftune.models import DiffusionModel, load_model
from draftune.models.quantization import BACKENDS
from draftune.training import placement
from draftune.training.memory_count import network_bytes
from draftune.utils.memory import peak_memory
from helpers import one_process
from helpers.one_process import Cut, gradient, noisy, trainer
from helpers.pipelines import add_random_lora
from helpers.quantized import dequantized, opened, quantized_layers, save_wide

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from levers import GRAPHS, graphed

Record = Callable[[str, object], None]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("wide"))


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute float32 convolutions in float32, which torch does not by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Let torch choose deterministic kernels, and raise an error where there is none."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


# The largest relative error of the gradient, and the smallest cosine, against float64.
BOUNDS = {"no": (1e-3, 0.99999), "tf32": (0.03, 0.999), "bf16": (0.25, 0.97), "fp16": (0.1, 0.99)}


@pytest.mark.parametrize("precision", BOUNDS)
def test_gradient_against_float64_on_a_cpu(
    pipeline_folder: Path,
    tmp_path: Path,
    device: torch.device,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    """Of DRaFT-2 with guidance, through LoRA, UNet, checkpoints, decoder and reward; fp16 with the gradient scaler."""
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")
    mixed = precision
    if precision == "tf32":
        mixed = "no"
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    made = trainer(pipeline_folder, tmp_path, device, mixed_precision=mixed)
    assert made.model.device.type == device.type
    assert (made.context.accelerator.scaler is not None) == (precision == "fp16")
    ours = gradient(made)
    exact = gradient(trainer(pipeline_folder, tmp_path, torch.device("cpu"), torch.float64))
    record_property("relative", relative(ours, exact))
    record_property("cosine", cosine(ours, exact))
    error, least = BOUNDS[precision]
    assert relative(ours, exact) < error
    assert cosine(ours, exact) > least


@pytest.mark.gpu
def test_an_overflow_in_fp16_lowers_the_scale(pipeline_folder: Path, tmp_path: Path, record_property: Record) -> None:
    """The update that overflows changes no weight, and a later one does."""

    def steep(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 3e4 * one_process.waves(images, prompts)

    made = trainer(pipeline_folder, tmp_path, torch.device("cuda"), reward=steep, mixed_precision="fp16")
    scaler, parameters = made.context.accelerator.scaler, made.train_step.parameters
    assert scaler is not None
    before, scale = {name: p.detach().clone() for name, p in parameters.items()}, scaler.get_scale()
    row = made.train_step.run(1)
    assert not torch.tensor(row["grad_norm"]).isfinite()
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())
    assert scaler.get_scale() < scale
    step = 1
    while not torch.tensor(row["grad_norm"]).isfinite():
        row = made.train_step.run(step := step + 1)
    record_property("updates", step)
    assert not all(torch.equal(before[name], parameter) for name, parameter in parameters.items())


def test_the_bytes_of_the_networks(
    pipeline_folder: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of all networks but the freed text encoder, also if only one of two equal devices has an index."""
    made = trainer(pipeline_folder, tmp_path, device)
    parts = [part for part in made.model.modules if part is not made.model.pipeline.text_encoder]
    held = sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))
    assert network_bytes(made) == pytest.approx(held, rel=0.01)
    monkeypatch.setattr(type(made.context.accelerator), "device", torch.device(device.type, 0))
    assert network_bytes(made) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("checkpointing", ["blocks", "denoiser", "both"])
def test_checkpointing_changes_nothing(
    pipeline_folder: Path, tmp_path: Path, device: torch.device, checkpointing: str, record_property: Record
) -> None:
    plain, ours = (
        gradient(trainer(pipeline_folder, tmp_path, device, gradient_checkpointing=mode))
        for mode in ("none", checkpointing)
    )
    record_property("relative", relative(ours, plain))
    assert relative(ours, plain) < 1e-4


def test_an_outer_autocast_leaves_no_stale_weights(
    pipeline_folder: Path, tmp_path: Path, device: torch.device, record_property: Record
) -> None:
    """Weights that the outer context cached in the prefix are detached: the last steps must not get them."""
    found = []
    for outer in (False, True):
        made = trainer(pipeline_folder, tmp_path, device, mixed_precision="bf16", method="draft_k(k=1)")
        with torch.autocast(device.type, torch.bfloat16, enabled=outer, cache_enabled=True):
            found.append(gradient(made))
        assert all(p.grad is not None and p.grad.any() for p in made.train_step.parameters.values())
    record_property("cosine", cosine(*found))
    assert cosine(*found) > 0.99


def test_channels_last(pipeline_folder: Path, tmp_path: Path, device: torch.device, record_property: Record) -> None:
    """Convolutions have this layout on the device, and the gradient is that of the usual one."""
    first, last = (trainer(pipeline_folder, tmp_path, device) for _ in range(2))
    weights = [module.weight for module in last.model.denoiser.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    for part in first.model.modules:
        part.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    plain, ours = gradient(first), gradient(last)
    record_property("relative", relative(ours, plain))
    assert relative(ours, plain) < 1e-3


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_ends_bit_for_bit(
    pipeline_folder: Path, tmp_path: Path, device: torch.device, precision: str
) -> None:
    """Also where the reward samples random numbers on the device, and with the scaler's state."""
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")

    def run(name: str, *callbacks: Cut) -> dict[str, Tensor]:
        values = {"steps": 4, "checkpointing_steps": 1, "num_log_prompts": 1, "mixed_precision": precision}
        values["prefix_reuse_steps"] = 1
        made = trainer(pipeline_folder, tmp_path / name, device, reward=noisy, callbacks=callbacks, **values)
        return load_file(made.train().folder / "lora" / "pytorch_lora_weights.safetensors")

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", Cut(2))
    resumed = run("cut")
    assert whole.keys() == resumed.keys()
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name or "lora.up" in name)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("quantization", BACKENDS)
def test_gradient_of_quantized_weights(
    wide: Path, device: torch.device, quantization: str, record_property: Record
) -> None:
    """It is plain autograd's through the dequantized weights."""
    pytest.importorskip(BACKENDS[quantization].package)
    quantized, plain = opened(wide, quantization, device=device), opened(wide, device=device)
    for name, layer in quantized_layers(quantized).items():
        assert layer.weight.device.type == device.type
        plain.denoiser.get_submodule(name).weight.data = dequantized(layer).float()
    ours, exact = latent_gradient(quantized), gradient_by_hand(plain)
    record_property("relative", relative(ours, exact))
    # bitsandbytes' 8-bit layers also round their inputs.
    assert relative(ours, exact) < (0.1 if quantization == "bnb_8bit" else 1e-3)


def test_offloading_takes_less_memory(
    wide: Path, tmp_path: Path, device: torch.device, record_property: Record
) -> None:
    """The gradient is the same, and on a GPU the networks and the peak of an update are smaller."""
    gradients, stored, peaks = [], [], []
    for offload in (False, True):
        made = trainer(wide, tmp_path, device, offload=offload, guidance_scale=1.0, height=16, width=16)
        own = [parameter for parameter in made.model.denoiser.parameters() if not parameter.requires_grad]
        stored.append(sum(parameter.nbytes for parameter in own if parameter.device.type == device.type))
        peak = peak_memory(lambda made=made: gradients.append(gradient(made)), device)
        peaks.append(stored[-1] + peak)
        record_property("offload_bytes" if offload else "plain_bytes", peaks[-1])
    assert relative(gradients[1], gradients[0]) < 1e-4
    if device.type == "cuda":
        assert stored[1] < 0.2 * stored[0]
        assert peaks[1] < peaks[0]


@pytest.mark.slow
def test_one_process_of_torchrun(pipeline_folder: Path, tmp_path: Path, device: torch.device) -> None:
    """NCCL starts, its collectives run, and the gradient is that of a run without a launcher."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone", one_process.__file__]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    made = subprocess.run(
        [sys.executable, *command, str(pipeline_folder), str(tmp_path), device.type],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["backend"] == ("nccl" if device.type == "cuda" else "gloo")
    assert facts["reduced"] == facts["gathered"] == [1.0, 2.0, 3.0]
    alone = gradient(trainer(pipeline_folder, tmp_path / "alone", device))
    assert relative(load_file(tmp_path / "gradient.safetensors")["gradient"], alone) < 1e-4


@pytest.mark.slow
def test_a_compiled_denoiser_has_the_same_gradient(
    pipeline_folder: Path,
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    if device.type == "cpu":  # where inductor needs a C++ compiler
        monkeypatch.setattr(placement, "COMPILE_BACKEND", "eager")
    plain, compiled = (
        gradient(trainer(pipeline_folder, tmp_path, device, compile=on, method="draft_k(k=1)")) for on in (False, True)
    )
    record_property("relative", relative(compiled, plain))
    assert relative(compiled, plain) < 1e-3


def test_whether_a_call_can_be_captured_in_a_cuda_graph(
    pipeline_folder: Path, device: torch.device, record_property: Record
) -> None:
    """A replayed call returns what the call returns. The last test: a failed capture may leave CUDA unusable."""
    model: DiffusionModel = load_model(pipeline_folder).to(device)
    add_random_lora(model)
    for name, tensor_timestep in zip(GRAPHS, (False, True), strict=True):
        try:
            replay = graphed(model, ["a cat"], tensor_timestep)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
            record_property(name, f"no: {str(error).splitlines()[0][:100]}")
            continue
        record_property(name, "yes")
        with torch.no_grad():
            x = model.noise(torch.Generator().manual_seed(0), 1)
            expected = model.predict(x, 500, model.encode(["a cat"], "", True), 3.0)
        assert relative(replay(), expected) < 1e-4
