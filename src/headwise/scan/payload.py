"""The plain data behind the report, version 1: what the studio draws."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.scan import roles

if TYPE_CHECKING:
    import xarray as xr

    from headwise.scan.result import Scan


def payload(scan: Scan) -> dict[str, Any]:
    """Scores as grids per stream (null where a head is missing), roles, details of every head, rows of a few."""
    data, about = scan.data, scan.about
    streams = {str(s): shape(data["exists"].sel(stream=s)) for s in data["stream"].values}
    return {
        "version": 1,
        "model": about["model"] | {"headwise": installed()},
        "created": about["created"],
        "tokens": about["tokens"],
        "command": about.get("command", ""),
        "streams": [
            {"name": s, "layers": list(range(layers)), "heads": heads} for s, (layers, heads) in streams.items()
        ],
        "questions": [question(data, column, streams) for column in about["columns"]],
        "left_out": about["left_out"],
        "roles": role_grid(scan, streams),
        "role_rules": roles.rules(),
        "details": details(scan),
    } | ({"sample": about["sample"]} if about["sample"] else {})


def shape(exists: xr.DataArray) -> tuple[int, int]:
    """Layers and heads of a stream."""
    return int(exists.any("head").sum()), int(exists.sum("head").max())


def installed() -> str:
    try:
        return version("headwise")
    except PackageNotFoundError:
        return "unknown"


def question(data: xr.Dataset, column: dict[str, Any], streams: dict[str, tuple[int, int]]) -> dict[str, Any]:
    name = column["name"]
    error = f"{name}_sem"
    kept = {key: column[key] for key in ("name", "title", "what", "paper", "unit", "threshold", "higher", "question")}
    return kept | {
        "grid": {s: grid(data[name].sel(stream=s), size) for s, size in streams.items()},
        "sem": {s: grid(data[error].sel(stream=s), size) for s, size in streams.items()} if error in data else None,
    }


def grid(values: xr.DataArray, size: tuple[int, int]) -> list[list[float | None]]:
    return [[number(x) for x in row] for row in values.values[: size[0], : size[1]]]


def number(value: float) -> float | None:
    return None if not np.isfinite(value) else float(f"{value:.5g}")


def role_grid(scan: Scan, streams: dict[str, tuple[int, int]]) -> dict[str, list[list[str | None]]]:
    found: dict[str, list[list[str | None]]] = {
        s: [[None] * heads for _ in range(layers)] for s, (layers, heads) in streams.items()
    }
    for row in scan.heads.itertuples():
        found[row.stream][row.layer][row.head] = row.role
    return found


def details(scan: Scan) -> dict[str, Any]:
    """For every head, keyed "stream:layer:head": distance profile, mass per segment, entropy, as far as they are
    known."""
    data, edges = scan.data, scan.about["edges"]
    found: dict[str, Any] = {}
    for row in scan.heads.itertuples():
        here = data.sel(stream=row.stream, layer=row.layer, head=row.head)
        one: dict[str, Any] = {}
        if "detail_entropy" in here and np.isfinite(here["detail_entropy"]):
            one["entropy"] = number(float(here["detail_entropy"]))
        if "detail_bins" in here and np.isfinite(here["detail_bins"]).any():
            one["distance"] = {"edges": edges, "mass": [number(x) for x in here["detail_bins"].values]}
        if "detail_mass" in here and np.isfinite(here["detail_mass"]).any():
            names = data["segment"].values.tolist()
            known = [(n, number(x)) for n, x in zip(names, here["detail_mass"].values, strict=True) if np.isfinite(x)]
            one["segments"] = {"names": [n for n, _ in known], "mass": [x for _, x in known]}
        if one:
            found[f"{row.stream}:{row.layer}:{row.head}"] = one
    return found
