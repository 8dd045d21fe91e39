"""How a scan shows itself in a notebook: a line a column, with a thumbnail of its grid and the highest heads."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from headwise.scan.colours import painted

if TYPE_CHECKING:
    from headwise.scan.result import Scan

OPEN, BEST = 12, 3
"""So many columns are shown at once, the others on demand; so many heads are named."""


def scan_html(scan: Scan) -> str:
    """A self-contained fragment: no script, one small picture a column, no weights between tokens."""
    about, table = scan.about, scan.heads
    model = about["model"]
    facts = f"{len(table)} heads, {about['tokens']:,} tokens read in {about['passes']} passes, {about['created'][:10]}"
    roles = ", ".join(f"{many} {html.escape(role)}" for role, many in table["role"].value_counts().items())
    lines = [row(scan, column) for column in about["columns"]]
    head = "".join(f"<th style='text-align:left'>{word}</th>" for word in ("score", "layer →, head ↓", "highest"))
    rest = f"<details><summary>{len(lines) - OPEN} more columns</summary>{grid(head, lines[OPEN:])}</details>"
    left = "".join(f"<dt>{html.escape(q)}</dt><dd>{html.escape(why)}</dd>" for q, why in about["left_out"].items())
    return (
        f"<div><p><b>{html.escape(model['name'])}</b> <small>{html.escape(model['fingerprint'])}</small><br>{facts}<br>"
        f"{roles}</p>{grid(head, lines[:OPEN])}{rest if len(lines) > OPEN else ''}"
        + (f"<details><summary>Not asked ({len(about['left_out'])})</summary><dl>{left}</dl></details>" if left else "")
        + "</div>"
    )


def grid(head: str, lines: list[str]) -> str:
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def row(scan: Scan, column: dict[str, Any]) -> str:
    name = column["name"]
    best = scan.heads.nlargest(BEST, name)
    many = len(scan.data["stream"]) > 1
    named = [
        f"{(r.stream + ' ') * many}L{r.layer}.H{r.head} {score:.3g}"
        for r, score in zip(best.itertuples(), best[name], strict=True)
    ]
    pictures = "".join(thumbnail(scan, name, stream) for stream in scan.data["stream"].values.tolist())
    what = html.escape(f"{column['what']} High: {column['higher']}.", quote=True)
    return (
        f"<tr><td style='text-align:left' title=\"{what}\">{html.escape(column['title'])}<br><small>"
        f"<code>{html.escape(name)}</code></small></td><td>{pictures}</td>"
        f"<td style='text-align:left'>{html.escape('   '.join(named)) or 'none'}</td></tr>"
    )


def thumbnail(scan: Scan, name: str, stream: str) -> str:
    """One pixel a head, four times enlarged by the browser."""
    values = scan.data[name].sel(stream=stream).values
    exists = scan.data["exists"].sel(stream=stream).values
    cells = np.where(exists, values, np.nan)[exists.any(1)][:, exists.any(0)].T
    address = base64.b64encode(png(painted(cells))).decode()
    style = f"image-rendering:pixelated;width:{4 * cells.shape[1]}px;height:{4 * cells.shape[0]}px;margin:1px"
    return f"<img alt='{html.escape(stream, quote=True)}' style='{style}' src='data:image/png;base64,{address}'>"


def png(pixels: UInt8[np.ndarray, "row column 3"]) -> bytes:
    """The smallest PNG there is: no filter, one block of data."""
    rows, columns, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
