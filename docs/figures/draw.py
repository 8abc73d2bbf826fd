"""Draw the three figures of docs/explanation/backpropagation.md as SVG: python docs/figures/draw.py"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
INK, GRAY, BLUE, RED, PANEL = "#1f2430", "#9aa3b2", "#2463c4", "#c8352b", "#fbfbf8"
NODE_W, NODE_H, GAP = 64, 34, 26


class Drawing:
    """Collects shapes on a light panel, which stays readable on a dark page."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height, self.parts = width, height, list[str]()

    def text(self, x: float, y: float, text: str, size: int = 13, anchor: str = "middle", color: str = INK) -> None:
        style = "font-weight='600' " if size > 13 else ""
        self.parts.append(
            f"<text x='{x}' y='{y}' font-size='{size}' {style}text-anchor='{anchor}' fill='{color}'>"
            f"{escape(text)}</text>"
        )

    def box(self, x: float, y: float, label: str, color: str = GRAY, fill: str = "#ffffff", w: int = NODE_W) -> None:
        self.parts.append(
            f"<rect x='{x}' y='{y}' width='{w}' height='{NODE_H}' rx='6' fill='{fill}' "
            f"stroke='{color}' stroke-width='2'/>"
        )
        self.text(x + w / 2, y + NODE_H / 2 + 5, label)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, color: str = GRAY, dash: bool = False) -> None:
        marker = {GRAY: "gray", BLUE: "blue", RED: "red", INK: "ink"}[color]
        line = "stroke-dasharray='5 4' " if dash else ""
        self.parts.append(
            f"<path d='M{x1} {y1} L{x2} {y2}' stroke='{color}' stroke-width='2' {line}fill='none' "
            f"marker-end='url(#{marker})'/>"
        )

    def stop(self, x: float, y: float) -> None:
        """Draw the bar of a stopped gradient."""
        self.parts.append(f"<path d='M{x} {y - 24} V{y + 24}' stroke='{RED}' stroke-width='4'/>")

    def save(self, name: str, title: str) -> None:
        markers = "".join(
            f"<marker id='{name}' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' "
            f"orient='auto-start-reverse'><path d='M0 0 L10 5 L0 10 z' fill='{color}'/></marker>"
            for name, color in (("gray", GRAY), ("blue", BLUE), ("red", RED), ("ink", INK))
        )
        body = "\n".join(self.parts)
        (FOLDER / f"{name}.svg").write_text(
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' role='img' "
            f"font-family='Helvetica, Arial, sans-serif'>\n<title>{escape(title)}</title>\n<defs>{markers}</defs>\n"
            f"<rect width='{self.width}' height='{self.height}' rx='10' fill='{PANEL}' stroke='#d8dbe2'/>\n"
            f"{body}\n</svg>\n",
            encoding="utf-8",
        )


def legend(d: Drawing, y: float, entries: list[tuple[str, str]]) -> None:
    x = 24.0
    for kind, label in entries:
        if kind == "stop":
            d.parts.append(f"<path d='M{x + 15} {y - 13} V{y + 5}' stroke='{RED}' stroke-width='4'/>")
        elif kind == "dash":
            d.arrow(x, y - 4, x + 34, y - 4, RED, dash=True)
        elif kind == "line":
            d.arrow(x, y - 4, x + 34, y - 4, BLUE)
        else:
            fill = {"grad": "#dbe7fb", "plain": "#ffffff", "recompute": "#fdeecb"}[kind]
            edge = {"grad": BLUE, "plain": GRAY, "recompute": "#b7791f"}[kind]
            d.parts.append(
                f"<rect x='{x}' y='{y - 14}' width='30' height='18' rx='4' fill='{fill}' "
                f"stroke='{edge}' stroke-width='2'/>"
            )
        d.text(x + 42, y, label, 12, "start")
        x += 62 + 6.6 * len(label)


def chain(d: Drawing, x: float, y: float, gradient: list[bool], stop_before: int | None) -> float:
    """Draw x_T, the denoiser calls and their arrows; return the x position behind the last call."""
    d.text(x, y + 22, "x_T")
    x += 20
    for i, on in enumerate(gradient):
        color = BLUE if on else GRAY
        d.arrow(x, y + 17, x + GAP, y + 17, color if on and i != stop_before else GRAY)
        if i == stop_before:
            d.stop(x + GAP / 2 - 2, y + 17)
        x += GAP
        d.box(x, y, f"step {len(gradient) - i}", color, "#dbe7fb" if on else "#ffffff")
        x += NODE_W
    return x


def end(d: Drawing, x: float, y: float) -> None:
    d.arrow(x, y + 17, x + GAP, y + 17, BLUE)
    d.text(x + GAP + 16, y + 22, "x_0")
    d.arrow(x + GAP + 34, y + 17, x + GAP + 60, y + 17, BLUE)
    d.box(x + GAP + 60, y, "reward", BLUE, "#ffffff", 70)


def calls() -> None:
    d = Drawing(900, 430)
    d.text(24, 32, "Which denoiser calls carry gradient (T = 5)", 16, "start")
    for y, name, on, stop in (
        (64, "DRaFT", [True] * 5, None),
        (138, "DRaFT-K, K = 2", [False] * 3 + [True] * 2, 3),
        (212, "DRaFT-LV, n = 2", [False] * 4 + [True], 4),
    ):
        d.text(24, y + 22, name, 14, "start")
        end(d, chain(d, 182, y, on, stop), y)
    x = 182 + 20 + 5 * (GAP + NODE_W)
    d.parts.append(f"<path d='M{x + GAP + 16} 240 V258 H480 V343' stroke='{GRAY}' stroke-width='2' fill='none'/>")
    for y in (272, 326):
        d.arrow(480, y + 17, x - NODE_W, y + 17)
        d.stop(x - NODE_W - 22, y + 17)
        d.box(x - NODE_W, y, "step 1", BLUE, "#dbe7fb")
        d.arrow(x, y + 17, x + GAP, y + 17, BLUE)
        d.text(x + GAP + 16, y + 22, "x_0'")
        d.arrow(x + GAP + 34, y + 17, x + GAP + 60, y + 17, BLUE)
        d.box(x + GAP + 60, y, "reward", BLUE, "#ffffff", 70)
        d.text(468, y + 22, "x_0 + fresh noise", 12, "end")
    legend(
        d, 404, [("grad", "call with gradient"), ("plain", "call without gradient (the prefix)"), ("stop", "stop_grad")]
    )
    d.save("calls", "Denoiser calls with gradient in DRaFT, DRaFT-K and DRaFT-LV")


def checkpointing() -> None:
    d = Drawing(900, 400)
    d.text(24, 32, "Activation checkpointing, K = 2", 16, "start")
    rows = (
        (62, "Forward pass", "stores the latents x_2 and x_1", False),
        (172, "Backward pass", "reruns one call at a time", True),
    )
    for y, name, note, back in rows:
        d.text(24, y + 20, name, 14, "start")
        d.text(24, y + 40, note, 12, "start")
        x = 236
        for i, label in enumerate(("x_2", "step 2", "x_1", "step 1", "x_0", "decoder", "image", "reward")):
            stored = label in ("x_2", "x_1")
            if label in ("step 2", "step 1", "decoder", "reward"):
                fill, edge = ("#fdeecb", "#b7791f") if back and label != "reward" else ("#ffffff", GRAY)
                d.box(x, y, label, edge, fill, 72)
                w = 72
            else:
                if stored:
                    d.parts.append(
                        f"<rect x='{x}' y='{y + 3}' width='38' height='28' rx='14' fill='#dbe7fb' stroke='{BLUE}' "
                        "stroke-width='2'/>"
                    )
                d.text(x + 19, y + 22, label, 12 if label == "image" else 13)
                w = 38
            x += w
            if i < 7:
                if back:
                    d.arrow(x + 22, y + 17, x + 4, y + 17, BLUE)
                else:
                    d.arrow(x + 4, y + 17, x + 22, y + 17, GRAY)
                x += 26
    d.text(860, 128, "The gradient by x_0 is taken at once, for one image at a time;", 12, "end")
    d.text(860, 144, "decoder and reward store nothing for the backward pass.", 12, "end")
    y = 262
    d.text(24, y + 6, "Inside one rerun", 14, "start")
    d.text(24, y + 26, "reruns one block at a time", 12, "start")
    x = 236
    d.text(x + 19, y + 22, "x_t")
    x += 44
    for i in range(4):
        d.arrow(x, y + 17, x + 22, y + 17, GRAY)
        live = i == 2
        d.box(x + 22, y, f"block {i + 1}", "#b7791f" if live else GRAY, "#fdeecb" if live else "#ffffff", 72)
        x += 94
    d.arrow(x, y + 17, x + 22, y + 17, GRAY)
    d.text(x + 50, y + 22, "output")
    d.text(
        236,
        y + 60,
        "Only the inputs of the blocks are stored. Activations exist for the block whose gradient is taken.",
        12,
        "start",
    )
    legend(d, 378, [("grad", "stored"), ("recompute", "recomputed"), ("line", "gradient")])
    d.save("checkpointing", "What activation checkpointing stores and recomputes")


def finish(d: Drawing, x: float, y: float, label: str) -> float:
    """Draw the clean latent, decoder and reward; return the middle of the decoder."""
    d.text(x + 14, y + 22, label)
    d.arrow(x + 32, y + 11, x + 50, y + 11)
    d.box(x + 50, y, "decoder", GRAY, "#ffffff", 66)
    d.arrow(x + 116, y + 11, x + 136, y + 11)
    d.arrow(x + 136, y + 25, x + 116, y + 25, RED, dash=True)
    d.box(x + 136, y, "reward", GRAY, "#ffffff", 62)
    return x + 83


def path() -> None:
    d = Drawing(900, 590)
    d.text(24, 32, "The gradient's path from the reward to the LoRA (T = 5)", 16, "start")
    rows = (
        (90, "draft_k, k = 2", "last 2 steps", (3, 4), "x_0"),
        (190, "refl, t = 2", "jump from step 2", (3,), "x̂_0"),
        (290, "alignprop, k = 3", "k is random", (2, 3, 4), "x_0"),
    )
    start = 172 + 18 + GAP
    left = [start + i * (GAP + NODE_W) for i in range(5)]
    for y, name, note, trained, label in rows:
        d.text(24, y + 18, name, 14, "start")
        d.text(24, y + 38, note, 12, "start")
        d.text(172, y + 22, "x_T")
        shown = [i for i in range(5) if i <= max(trained)]
        for i in shown:
            on = i in trained
            d.arrow(left[i] - GAP, y + 17, left[i], y + 17)
            d.box(left[i], y, f"step {5 - i}", BLUE if on else GRAY, "#dbe7fb" if on else "#ffffff")
        d.arrow(left[shown[-1]] + NODE_W, y + 17, left[4] + NODE_W + GAP, y + 17)
        middle = finish(d, left[4] + NODE_W + GAP, y, label)
        lane, first = y - 18, left[min(trained)]
        d.parts.append(
            f"<path d='M{middle} {y} V{lane} H{first + NODE_W / 2}' stroke='{RED}' stroke-width='2' "
            "stroke-dasharray='5 4' fill='none'/>"
        )
        for i in trained:
            d.arrow(left[i] + NODE_W / 2, lane, left[i] + NODE_W / 2, y - 2, RED, dash=True)
        d.stop(first - GAP / 2 - 2, y + 17)
    y, line = 378, 450
    d.text(24, y + 18, "drtune, k = 2", 14, "start")
    d.text(24, y + 38, "linear path of x below", 12, "start")
    d.text(172, line + 5, "x_T")
    d.arrow(190, line, left[4] + NODE_W + GAP, line)
    for i in range(5):
        on = i in (1, 3)
        d.box(left[i], y, f"step {5 - i}", BLUE if on else GRAY, "#dbe7fb" if on else "#ffffff")
        d.arrow(left[i] + 12, line, left[i] + 12, y + NODE_H + 2)
        d.parts.append(f"<path d='M{left[i] + 3} {line - 16} h18' stroke='{RED}' stroke-width='4'/>")
        d.arrow(left[i] + 36, y + NODE_H, left[i] + 36, line - 2)
        if on:
            d.arrow(left[i] + 52, line + 12, left[i] + 52, y + NODE_H + 2, RED, dash=True)
    middle = finish(d, left[4] + NODE_W + GAP, line - 17, "x̂_0")
    d.parts.append(
        f"<path d='M{middle} {line + 17} V{line + 30} H{left[4] + NODE_W + 10} V{line + 12} H{left[1] + 52}' "
        f"stroke='{RED}' stroke-width='2' stroke-dasharray='5 4' fill='none'/>"
    )
    d.text(
        24,
        518,
        "A red arrow into a step reaches the LoRA of that call. The reward and the decoder are frozen. In draft_k and",
        12,
        "start",
    )
    d.text(
        24,
        535,
        "alignprop the gradient also passes through the network from step to step; in drtune it does not.",
        12,
        "start",
    )
    legend(d, 570, [("grad", "trained call"), ("plain", "no gradient"), ("dash", "gradient"), ("stop", "stop_grad")])
    d.save("path", "Where the gradient flows and where it stops")


if __name__ == "__main__":
    calls()
    checkpointing()
    path()
