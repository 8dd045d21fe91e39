"""The report: one HTML file with its data, style and script inside, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from pathlib import Path
from string import Template
from typing import Any

from headwise.files import replacing
from headwise.studio.bundle import asset, script
from headwise.studio.payload import Payload, check

START = "module_report_js.start(document);"


def write_report(payload: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes the report of a scan's payload to `path`, whole or not at all."""
    page = render_report(payload)
    path = Path(path)
    with replacing(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8", newline="\n")
    return path


def render_report(payload: dict[str, Any]) -> str:
    """The report of a scan's payload as HTML text. A payload that does not fit raises a HeadwiseError naming the field.

    The page's policy lets exactly this script and style run and nothing be loaded, whatever the data contains."""
    checked = check(payload)
    code, style = f"\n{script('report.js')}\n{START}\n", f"\n{asset('report.css')}"
    for part in (code, style):
        if "</" + "script" in part.lower() or "<!--" in part or "</" + "style" in part.lower() or "\r" in part:
            raise ValueError("an asset of the report contains what would end its element")
    return Template(asset("report.html")).substitute(
        title=html.escape(f"{checked.model.name}: attention heads"),
        script_hash=digest(code),
        style_hash=digest(style),
        style=style,
        data=embedded(checked),
        script=code,
    )


def embedded(payload: Payload) -> str:
    """JSON that is safe inside a script element: nothing in it can end the element, open a comment or break a line."""
    text = json.dumps(payload.model_dump(mode="json", exclude_none=False), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
