"""Build the HTML page from its data: one file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

SCRIPTS = ("dom.js", "chart.js", "images.js", "page.js")


def page(data: Mapping[str, Any], live: bool = False) -> str:
    """Return HTML that contains the data.

    Args:
        data: Data from `collect`.
        live: Whether the page polls the server that it came from, and no other, for new data.
    """
    style, script = part("page.css"), "\n".join(part(name) for name in SCRIPTS)
    return Template(part("page.html")).substitute(
        title=html.escape(f"{data['name']} – draftune"),
        name=html.escape(data["name"]),
        policy=policy(style, script, live),
        style=style,
        sections=part("sections.html"),
        data=embedded(data, live),
        script=script,
    )


def embedded(data: Mapping[str, Any], live: bool) -> str:
    """Return the data as JSON for a script element: without "<" in it, it cannot end the element."""
    return json.dumps({**data, "live": live}, allow_nan=False).replace("<", "\\u003c")


def policy(style: str, script: str, live: bool, images: str = "data:") -> str:
    """Return the Content-Security-Policy: only this style and script, by digest, and images of one source."""
    allowed = {
        "default-src": "'none'",
        "img-src": images,
        "style-src": source(style),
        "script-src": source(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    if live:
        allowed["connect-src"] = "'self'"
    return "; ".join(f"{key} {value}" for key, value in allowed.items())


def source(text: str) -> str:
    """Return a policy source that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def part(name: str) -> str:
    """Read a file of this package."""
    return files("draftune.report").joinpath(name).read_text(encoding="utf-8")
