"""`headwise doctor`: how headwise gets into each attention layer of a model, and what it cannot do there."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headwise.cli.console import err, hush, out, print_json
from headwise.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise.attention import SiteReport
    from headwise.models import Opened

COLOURS = {"reached": "green", "idle": "dim", "bypassed": "yellow", "refused": "red"}
MEANING = {
    "reached": "read and changed exactly",
    "idle": "not called by this probe's input",
    "bypassed": "its attention runs where headwise cannot see it",
    "refused": "cannot be entered exactly",
}
SENTENCE = "The doctor listens to every head of the model while it reads this sentence."


def doctor(
    model: Annotated[str, typer.Argument(help="zoo:llm, a hub id, a folder or a GGUF file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one row per attention layer.")] = False,
) -> None:
    """Say for every attention layer how it is entered, which path runs, and what is refused and why.

    Exit code 1 when a layer is bypassed or refused.
    """
    hush()
    import headwise as hw

    with err.status(f"opening {model}"):
        opened = hw.open_model(model)
        batch = sample_input(opened)
    with err.status("one probe forward"):
        reports = hw.probe(opened, batch)
    if as_json:
        print_json(rows(opened, reports))
    else:
        _print(opened, rows(opened, reports))
    raise typer.Exit(1 if any(report.status in ("bypassed", "refused") for report in reports) else 0)


def sample_input(opened: Opened) -> dict[str, Any]:
    """A small input of the kind the model reads: a sentence, grey noise as a picture, or a second of quiet noise."""
    import numpy as np

    noise = np.random.default_rng(0)
    main = getattr(opened.model, "main_input_name", "input_ids")
    if main == "pixel_values":
        return opened.encode(noise.integers(0, 256, (224, 224, 3), dtype=np.uint8))
    if main in ("input_features", "input_values"):
        return opened.encode(0.01 * noise.standard_normal(16_000).astype(np.float32))
    if opened.tokenizer is not None:
        return opened.encode(SENTENCE)
    raise HeadwiseError(
        f"{opened.name} reads {main!r}, which doctor cannot make up: call headwise.probe(opened, inputs) with your own."
    )


def rows(opened: Opened, reports: list[SiteReport]) -> list[dict[str, Any]]:
    """One dict per attention layer: what it is, and what the probe found there."""
    sites = {site.name: site for site in opened.sites}
    found = []
    for report in reports:
        site = sites[report.site]
        sizes = {"kind": site.kind, "heads": site.heads, "kv_heads": site.kv_heads, "head_dim": site.head_dim}
        found.append({**asdict(report), **sizes})
    return found


def _print(opened: Opened, found: list[dict[str, Any]]) -> None:
    table = Table("stream", "layers", "heads", "size", "status", "entered by", "path", "why")
    same = ("stream", "heads", "kv_heads", "head_dim", "status", "how", "path", "reason")
    order = {stream: number for number, stream in enumerate(opened.streams)}
    found = sorted(found, key=lambda r: order[r["stream"]])
    for key, alike in groupby(found, key=lambda r: tuple(r[name] for name in same)):
        stream, heads, kv_heads, head_dim, status, how, path, reason = key
        layers = [r["layer"] for r in alike]
        table.add_row(
            stream,
            str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}",
            str(heads) if heads == kv_heads else f"{heads} on {kv_heads} kv",
            str(head_dim),
            f"[{COLOURS[status]}]{status}[/]",
            how or "-",
            path or "-",
            reason or MEANING[status],
        )
    out.print(table)
    reached = sum(r["status"] == "reached" for r in found)
    out.print(
        f"{opened.name}: {reached} of {len(found)} attention layers reached: these are read and edited exactly.",
        markup=False,
        highlight=False,
    )
