"""Run the rewards ocr and ocr_cer with the published weights of PP-OCRv4 mobile.

    pip install . matplotlib onnx onnxruntime rapidocr-onnxruntime==1.4.4
    python benchmarks/pp_ocrv4.py

The networks of PP-OCRv5 mobile are those of PP-OCRv4, with more characters. The package rapidocr-onnxruntime contains
PP-OCRv4's weights (Apache-2.0) in ONNX. They are converted to transformers' classes of PP-OCRv5, whose outputs are
compared with ONNX Runtime's. Then signs with text are scored, with a box and with the detector, and gradient ascent on
an image shows what an over-optimized image looks like: it is saved as `--image`.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from transformers import (
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5MobileRecConfig,
    PPOCRV5MobileRecForTextRecognition,
)

from draftune.rewards import load_reward
from draftune.rewards.ocr import OCR, CharacterErrorRate
from draftune.utils.images import from_pil, to_pil

STAGES = {"model_type": "pp_lcnet_v3", "divisor": 16, "out_indices": [2, 3, 4, 5]}
STAGES |= {"out_features": ["stage2", "stage3", "stage4", "stage5"]}
# Kernel size, channels in, channels out, stride and squeeze-and-excitation of the recognizer's blocks.
BLOCKS: list[Any] = [
    [[3, 16, 32, 1, False]],
    [[3, 32, 64, 1, False], [3, 64, 64, 1, False]],
    [[3, 64, 128, [2, 1], False], [3, 128, 128, 1, False]],
    [[3, 128, 256, [1, 2], False], *([[5, 256, 256, 1, False]] * 4)],
    [[5, 256, 512, [2, 1], True], [5, 512, 512, 1, True], [5, 512, 512, [2, 1], False], [5, 512, 512, 1, False]],
]
BOX = (0.0, 0.3, 1.0, 0.7)


class Graph:
    """The weights of an ONNX file by kind, in the order of the computation, which is that of transformers' modules."""

    def __init__(self, path: Path) -> None:
        import onnx  # only this script needs it

        to_array = onnx.numpy_helper.to_array
        model = onnx.load(path)
        self.metadata = {item.key: item.value for item in model.metadata_props}
        self.nodes = list(model.graph.node)
        arrays = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                arrays[node.output[0]] = to_array(node.attribute[0].t)
        self.tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        self.convolutions = self.weights(lambda node: node.op_type in ("Conv", "ConvTranspose"))
        self.batch_norms = self.weights(lambda node: node.op_type == "BatchNormalization")
        self.products = self.weights(lambda node: node.op_type == "MatMul" and node.input[1] in self.tensors)
        self.layer_norms = self.weights(lambda node: self.scales(node, "layer_norm"))
        self.affine = self.weights(lambda node: self.scales(node, "mobile_one_block", "whswish"))

    def scales(self, node: Any, *names: str) -> bool:
        """Return whether a node multiplies by a weight with one of these words in its name."""
        weights = [name for name in node.input if name in self.tensors and "constant" not in name]
        return node.op_type == "Mul" and any(word in name for name in weights for word in names)

    def weights(self, wanted: Any) -> Iterator[list[Tensor]]:
        """Yield the weights of the wanted nodes, each with the weight that is added afterwards, if any."""
        for node in filter(wanted, self.nodes):
            added = [n for n in self.nodes if n.op_type == "Add" and node.output[0] in n.input]
            names = [*node.input, *(added[0].input if added else [])]
            yield [self.tensors[name] for name in names if name in self.tensors]

    def convolution(self, module: Any) -> None:
        weight, *bias = next(self.convolutions)
        assert module.weight.shape == weight.shape
        module.weight.data = weight
        if module.bias is not None:
            module.bias.data = bias[0].reshape(-1)

    def batch_norm(self, module: Any) -> None:
        module.weight.data, module.bias.data, module.running_mean, module.running_var = next(self.batch_norms)[:4]

    def linear(self, module: Any) -> None:
        weight, module.bias.data = next(self.products)
        module.weight.data = weight.T.contiguous()

    def layer_norm(self, module: Any) -> None:
        module.weight.data, module.bias.data = next(self.layer_norms)

    def fused(self, layer: Any) -> None:
        """Set one branch of a layer to the sum of all branches, which the file has, and the others to zero."""
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.zero_()
                module.running_var.fill_(1 - module.eps)  # type: ignore[union-attr]
        branch = layer.conv_symmetric[0]
        branch.convolution.weight.data, branch.normalization.bias.data = next(self.convolutions)[:2]
        branch.normalization.weight.data.fill_(1)
        for affine in [layer.lab] + ([layer.act.lab] if layer.stride != 2 else []):
            affine.scale.data, affine.bias.data = (tensor.reshape(1) for tensor in next(self.affine))

    def backbone(self, encoder: Any) -> None:
        self.convolution(encoder.convolution.convolution)
        self.batch_norm(encoder.convolution.normalization)
        for layer in (layer for block in encoder.blocks for layer in block.layers):
            self.fused(layer.depthwise_convolution)
            for module in layer.squeeze_excitation_module.modules():
                if isinstance(module, nn.Conv2d):
                    self.convolution(module)
            self.fused(layer.pointwise_convolution)


def recognizer(path: Path, folder: Path) -> Any:
    graph = Graph(path)
    characters = ["blank", *graph.metadata["character"].split("\n"), " "]
    backbone = {**STAGES, "scale": 0.95, "block_configs": BLOCKS}
    network: Any = PPOCRV5MobileRecForTextRecognition(
        PPOCRV5MobileRecConfig(backbone_config=backbone, head_out_channels=len(characters))
    )
    graph.backbone(network.model.backbone.encoder)
    encoder = network.head.encoder
    for layer in encoder.conv_block:
        graph.convolution(layer.convolution)
        graph.batch_norm(layer.normalization)
    for block in encoder.svtr_block:
        graph.layer_norm(block.layer_norm1)
        graph.linear(block.self_attn.qkv)
        graph.linear(block.self_attn.projection)
        graph.layer_norm(block.layer_norm2)
        graph.linear(block.mlp.fc1)
        graph.linear(block.mlp.fc2)
    graph.layer_norm(encoder.norm)
    graph.linear(network.head.head)
    save(network, folder, {"character_list": characters})
    return network.eval()


def detector(path: Path, folder: Path) -> Any:
    graph = Graph(path)
    network: Any = PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig(backbone_config={**STAGES, "scale": 0.75}))
    graph.backbone(network.model.backbone.encoder)
    for module in network.model.layer:
        graph.convolution(module)
    for layer in [*reversed(network.model.neck.insert_conv), *reversed(network.model.neck.input_conv)]:
        graph.convolution(layer.in_conv)
        graph.convolution(layer.squeeze_excitation_block.conv1)
        graph.convolution(layer.squeeze_excitation_block.conv2)
    for layer in (network.head.conv_down, network.head.conv_up):
        graph.convolution(layer.convolution)
        graph.batch_norm(layer.norm)
    graph.convolution(network.head.conv_final)
    save(network, folder, {})
    return network.eval()


def save(network: Any, folder: Path, processor: dict[str, Any]) -> None:
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def deviation(network: Any, path: Path, height: int, width: int) -> float:
    """Return the largest difference of a network's output from ONNX Runtime's, on one random image."""
    import onnxruntime

    x = torch.randn(1, 3, height, width)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    with torch.no_grad():
        return float((network(x).last_hidden_state - torch.from_numpy(expected)).abs().max())


def sign(*lines: tuple[int, int, str], size: int = 512) -> Tensor:
    image = Image.new("RGB", (size, size), (60, 90, 140))
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(fonts / "DejaVuSans-Bold.ttf", 44)
    for x, y, text in lines:
        ImageDraw.Draw(image).text((x, y), text, font=font, fill="white")
    return from_pil(image)


def row(reward: OCR, errors: CharacterErrorRate, image: Tensor, prompt: str) -> str:
    read = reward.alphabet.decode(reward.read(image))
    return f"| `{prompt}` | {read} | {float(reward(image, [prompt])):.3f} | {float(errors(image, [prompt])):.3f} |"


def pair(text: str, box: Any, folders: tuple[Path, Path]) -> tuple[Any, Any]:
    first, second = (load_reward(kind(text, box, *map(str, folders))) for kind in (OCR, CharacterErrorRate))
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="where to save the image of gradient ascent")
    args = parser.parse_args()
    torch.manual_seed(0)
    package = Path(str(importlib.util.find_spec("rapidocr_onnxruntime").origin)).parent / "models"  # type: ignore[union-attr]
    rec, det = (package / f"ch_PP-OCRv4_{kind}_infer.onnx" for kind in ("rec", "det"))
    with TemporaryDirectory() as temporary:
        folders = (Path(temporary) / "rec", Path(temporary) / "det")
        print(f"recognizer: differs from ONNX Runtime by {deviation(recognizer(rec, folders[0]), rec, 48, 320):.1e}")
        print(f"detector: differs from ONNX Runtime by {deviation(detector(det, folders[1]), det, 160, 192):.1e}\n")
        print("| prompt | read | ocr | ocr_cer |\n|---|---|---|---|")
        two = sign((60, 120, "Open 24"), (60, 260, "hours"))
        for prompt in ('"Open 24 hours"', '"Open hours"', '"OPEN 24 HOURS"', '"Closed"'):
            print(row(*pair("", "", folders), two, prompt))
        print(row(*pair("", "", folders), sign((40, 200, "left"), (300, 205, "right")), '"left" "right"'))
        print(row(*pair("", "", folders), sign(), '"Open"'))
        reward, errors = pair("Open", BOX, folders)
        image = (0.5 + 0.01 * torch.randn(1, 3, 128, 128)).requires_grad_()
        optimizer = torch.optim.Adam([image], lr=0.02)
        for step in range(31):
            score = reward(image.clamp(0, 1), [""])
            if step % 10 == 0:
                rate = float(errors(image.detach().clamp(0, 1), [""]))
                print(f"\ngradient ascent, step {step}: ocr {score.item():.3f}, ocr_cer {rate:.2f}", end="")
            optimizer.zero_grad()
            (-score.sum()).backward()
            optimizer.step()
        print()
        if args.image:
            to_pil(image)[0].save(args.image)


if __name__ == "__main__":
    main()
