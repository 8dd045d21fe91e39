"""The plain data behind the page of a comparison: for every column one grid of each scan, and their difference."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import xarray as xr

from headwise.scan import roles
from headwise.scan.head_similarity import PAPER
from headwise.scan.payload import grid, installed, number, shape
from headwise.scan.result import Scan

if TYPE_CHECKING:
    from headwise.scan.comparison import Comparison

CHANGED = "changed role"


def payload(comparison: Comparison) -> dict[str, Any]:
    one, other = comparison.one, comparison.other
    sizes = {scan: {str(s): shape(scan.data["exists"].sel(stream=s)) for s in scan.data["stream"].values}
             for scan in (one, other)}  # fmt: skip
    names = dict.fromkeys([*sizes[one], *sizes[other]])
    streams = {s: tuple(max(found.get(s, (0, 0))[i] for found in sizes.values()) for i in (0, 1)) for s in names}
    first, second = comparison.names
    tokens = one.about["tokens"] if one.about["tokens"] == other.about["tokens"] else None
    return {
        "version": 1,
        "model": {"name": f"{first} and {second}", "headwise": installed()},
        "created": max(one.about["created"], other.about["created"]),
        "tokens": tokens,
        "command": one.about.get("command", "") or other.about.get("command", ""),
        "streams": [{"name": s, "layers": list(range(n)), "heads": heads} for s, (n, heads) in streams.items()],
        "questions": [*similarities(comparison, streams), *questions(comparison, streams)],
        "left_out": {f"{name} ({called})": reason for scan, called in ((one, first), (other, second))
                     for name, reason in scan.left_out.items()},
        "roles": role_grid(comparison, streams),
        "role_rules": roles.rules() | {CHANGED: f"{first} and {second} give this head different roles."},
        "details": {},
        "matrices": layers(comparison),
    }  # fmt: skip


def questions(comparison: Comparison, streams: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    found = []
    for column in comparison.columns:
        name = column["name"]
        kept = {key: column[key] for key in ("what", "paper", "unit", "higher", "threshold")} | {"question": name}
        grids = [column_grid(scan, name, streams) for scan in (comparison.one, comparison.other)]
        for called, values, key in zip(comparison.names, grids, (name, f"{name}_other"), strict=True):
            found.append(kept | {"name": key, "title": f"{column['title']}: {called}", "grid": values})
        change = {
            s: [[b - a if a is not None and b is not None else None for a, b in zip(x, y)] for x, y in zip(*pair)]
            for s, *pair in ((s, grids[0][s], grids[1][s]) for s in streams)
        }
        words = {"title": f"{column['title']}: change", "higher": f"more in {comparison.names[1]}", "threshold": None}
        found.append(kept | words | {"name": f"{name}_change", "grid": rounded(change)})
    return found


def similarities(comparison: Comparison, streams: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    table = comparison.heads
    if table["similarity"].isna().all():
        return []
    texts = {
        "similarity": ("Head at the same place", "Similarity of the attention maps of the two heads at this place."),
        "best_similarity": ("Best match", "Similarity of the attention map to the most similar head of the other."),
    }
    unit = f"1 - Jensen-Shannon divergence, per {comparison.similarity['heads'].attrs['unit']}"
    shared = {"question": "similarity", "higher": "attends alike", "unit": unit, "paper": asdict(PAPER)}
    found = []
    for name, (title, what) in texts.items():
        values = empty(streams)
        for row in table.dropna(subset=name).itertuples():
            values[row.stream][row.layer][row.head] = number(getattr(row, name))
        found.append(shared | {"name": name, "title": title, "what": what, "grid": values})
    return found


def empty(streams: dict[str, tuple[int, int]]) -> dict[str, list[list[Any]]]:
    return {s: [[None] * heads for _ in range(layers)] for s, (layers, heads) in streams.items()}


def column_grid(scan: Scan, name: str, streams: dict[str, tuple[int, int]]) -> dict[str, list[list[float | None]]]:
    """The grid of one scan, as large as the larger of the two."""
    found = {}
    for stream, (layers, heads) in streams.items():
        known = stream in scan.data["stream"]
        values = scan.data[name].sel(stream=stream) if known else xr.DataArray([[float("nan")]], dims=("layer", "head"))
        found[stream] = grid(values.reindex(layer=range(layers), head=range(heads)), (layers, heads))
    return found


def rounded(grids: dict[str, list[list[float | None]]]) -> dict[str, list[list[float | None]]]:
    return {s: [[None if x is None else number(x) for x in row] for row in rows] for s, rows in grids.items()}


def role_grid(comparison: Comparison, streams: dict[str, tuple[int, int]]) -> dict[str, list[list[str | None]]]:
    found = empty(streams)
    for row in comparison.heads.itertuples():
        known = [role for role in (row.role, row.role_other) if isinstance(role, str)]
        found[row.stream][row.layer][row.head] = known[0] if len(set(known)) == 1 else CHANGED
    return found


def layers(comparison: Comparison) -> list[dict[str, Any]]:
    """How alike the layers are, as a table of one's layers by the other's."""
    if "layers" not in comparison.similarity:
        return []
    found = comparison.similarity["layers"].transpose("layer_a", "layer_b")
    first, second = comparison.names
    return [
        {
            "title": "Layers",
            "what": "Similarity of the residual stream after each layer, on the same tokens (linear CKA).",
            "rows": f"layer of {first}",
            "columns": f"layer of {second}",
            "row_names": [str(x) for x in found["layer_a"].values.tolist()],
            "column_names": [str(x) for x in found["layer_b"].values.tolist()],
            "values": [[number(x) for x in row] for row in found.values],
        }
    ]
