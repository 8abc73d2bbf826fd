"""The rows that `gpu.py` measures, in the order of their value."""

from __future__ import annotations

from typing import Any, NamedTuple

import full_size
from published_configs import SHORT

BF16: dict[str, Any] = {"mixed_precision": "bf16", "batch_size": 1, "gradient_checkpointing": "blocks"}
SIZES = {"sd14": {"guidance_scale": 7.5}, "sdxl": {"guidance_scale": 5.0}}


class Row(NamedTuple):
    """Updates with some settings.

    Attributes:
        name: What differs from the other rows.
        model: The model's name in SHORT.
        settings: Settings of `draftune train`.
        counted: Settings that differ in the count, which needs only one step without gradient; None for no count.
    """

    name: str
    model: str
    settings: dict[str, Any]
    counted: dict[str, Any] | None


class Rows:
    """The rows of each part.

    Attributes:
        some, steps: K of a short chain of steps with gradient, and the number of sampling steps T.
        tiny: Whether the networks and the numbers of steps are tiny.
    """

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.some, self.steps = (2, 3) if tiny else (5, 20)

    def updates(self, model: str) -> list[Row]:
        """Return the rows of a UNet's updates: K = 1, several and T, checkpointing, precision, batch, presets."""
        base, some, steps = {**BF16, **SIZES[model]}, self.some, self.steps

        def row(name: str, k: int, **settings: Any) -> Row:
            values = {**base, "method": f"draft_k(k={k})", "num_inference_steps": steps, **settings}
            return Row(f"K = {k}, {name}", model, values, {"num_inference_steps": min(steps, k + 1)})

        rows = [
            row("blocks", 1),
            row("none", 1, gradient_checkpointing="none"),
            row("both", some, gradient_checkpointing="both"),
            row("batch of 4", 1, batch_size=4),
            row("float32", 1, mixed_precision="no"),
            row("both", steps, gradient_checkpointing="both"),
            self.preset(f"{model}-24gb"),
            self.preset(f"{model}-16gb"),
            row("denoiser", some, gradient_checkpointing="denoiser"),
        ]
        if model == "sd14":
            rows += [self.preset("sd14-8gb"), row("blocks", some), row("none", some, gradient_checkpointing="none")]
            rows.append(row("denoiser", steps, gradient_checkpointing="denoiser"))
        return rows

    def preset(self, name: str) -> Row:
        """Return the row of a preset: an update of one batch, with few steps, as its count is made."""
        settings = full_size.preset_settings(name)
        model = next(short for short, hub in SHORT.items() if hub == settings["model"])
        settings = {key: value for key, value in settings.items() if key not in ("model", "reward")}
        return Row(f"preset {name}", model, self.small(settings), {})

    def small(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with small images for tiny networks."""
        return {**settings, "height": 64, "width": 64} if self.tiny else settings

    def transformers(self) -> list[Row]:
        """Return the rows of FLUX.1-dev and Z-Image."""
        step = {"method": "draft_k(k=1)", "num_inference_steps": 2 if self.tiny else 4}
        flux = self.small({**BF16, **step, "guidance_scale": 3.5})
        z_image = self.small({**BF16, **step, "guidance_scale": 0.0})
        counted = {"num_inference_steps": 2}
        return [
            Row("Z-Image, K = 1, bf16", "zimage", z_image, counted),
            Row("FLUX.1-dev, K = 1, bnb_4bit", "flux", {**flux, "quantization": "bnb_4bit"}, counted),
            Row("FLUX.1-dev, K = 1, bf16", "flux", flux, counted),
            Row("Z-Image, K = 1, bnb_4bit", "zimage", {**z_image, "quantization": "bnb_4bit"}, counted),
            Row("Z-Image, K = 1, torchao_int8", "zimage", {**z_image, "quantization": "torchao_int8"}, counted),
            self.preset("zimage-24gb"),
            self.preset("zimage-16gb"),
            self.preset("flux-24gb"),
        ]

    def levers(self) -> list[Row]:
        """Return the rows of a shared, coarser or cached prefix and of a compiled denoiser, against plain."""
        base = {**BF16, **SIZES["sd14"], "method": "draft_k(k=1)", "num_inference_steps": self.steps}
        changes: dict[str, dict[str, Any]] = {
            "plain": {},
            "prefix_reuse_steps=4": {"prefix_reuse_steps": 4},
            "prefix_stride=2": {"prefix_stride": 2},
            "prefix_cache=taylorseer(interval=2)": {"prefix_cache": "taylorseer(interval=2)"},
            "no checkpointing": {"gradient_checkpointing": "none"},
            "compile": {"compile": True},
            "compile, no checkpointing": {"compile": True, "gradient_checkpointing": "none"},
        }
        return [Row(name, "sd14", {**base, **change}, None) for name, change in changes.items()]

    def rows(self, part: str) -> list[Row]:
        """Return the rows of a part that measures updates."""
        if part in SIZES:
            return self.updates(part)
        return {"transformers": self.transformers, "levers": self.levers}[part]()
