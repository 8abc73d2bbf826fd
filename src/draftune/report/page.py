"""The page: its parts put into one file that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

SCRIPTS = ("dom.js", "chart.js", "pictures.js", "page.js")


def page(data: Mapping[str, Any], live: bool = False) -> str:
    """HTML with all of the data inside; a live one asks its own server for what is new, and no other."""
    style, script = part("page.css"), "\n".join(part(name) for name in SCRIPTS)
    return Template(part("page.html")).substitute(
        title=html.escape(f"{data['name']} – draftune"),
        name=html.escape(data["name"]),
        policy=policy(style, script, live),
        style=style,
        # "<" never stands in the data: nothing in it can end the element.
        data=json.dumps({**data, "live": live}, allow_nan=False).replace("<", "\\u003c"),
        script=script,
    )


def policy(style: str, script: str, live: bool) -> str:
    """What the browser is to allow: this style and this script by their digests, pictures inside the page, no more."""
    allowed = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": source(style),
        "script-src": source(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    if live:
        allowed["connect-src"] = "'self'"
    return "; ".join(f"{key} {value}" for key, value in allowed.items())


def source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def part(name: str) -> str:
    return files("draftune.report").joinpath(name).read_text(encoding="utf-8")
