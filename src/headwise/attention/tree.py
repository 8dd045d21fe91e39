"""The labelled result of a run: an xarray DataTree, a node per stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from headwise.attention.readings import (
    At,
    Inputs,
    Mass,
    Propagate,
    Reading,
    Received,
    Scores,
    SegmentEntropy,
)
from headwise.models.anatomy import Site

if TYPE_CHECKING:
    from headwise.attention.tally import Chunk, Moments, Tally

Key = tuple[str, Reading, str]


def build(tally: Tally, sites: dict[str, Site]) -> xr.DataTree:
    """Dims sample, layer, head, query (+ segment, rank, ...); a dim `call` where a layer runs more than once a forward.

    nan (or -1, for places) where a layer has fewer heads, a sample fewer tokens, or a query was not sampled."""
    nodes: dict[str, dict[str, xr.DataArray]] = {}
    for key, chunks in tally.chunks.items():
        stream, reading, name = key
        nodes.setdefault(stream, {})[reading.names().get(name, name)] = by_query(key, chunks, tally.extras.get(key))
    for key, moments in tally.moments.items():
        stream, reading, name = key
        label = reading.names().get(name, name)
        for suffix, array in by_head(key, moments, tally.extras.get(key)).items():
            nodes.setdefault(stream, {})[label + suffix] = array
    datasets = {}
    for stream, variables in nodes.items():
        data = xr.Dataset(apart(variables))
        layers = {site.layer: site.name for site in sites.values() if site.stream == stream}
        data = data.assign_coords(module=("layer", [layers.get(int(n), "") for n in data.layer.values]))
        datasets[stream] = data
    return xr.DataTree.from_dict(datasets)


def apart(variables: dict[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    """Two readings of one kind may differ in how many ranks or columns they have: the second's dim gets its name."""
    sizes: dict[str, int] = {}
    found = {}
    for name, array in variables.items():
        other = [
            str(d)
            for d in array.dims
            if d not in array.coords and sizes.setdefault(str(d), array.sizes[d]) != array.sizes[d]
        ]
        found[name] = array.rename({dim: f"{name}_{dim}" for dim in other})
    return found


def dims_of(reading: Reading, name: str, ndim: int) -> tuple[str, ...]:
    """Names of the dims after (head), for values [batch, head, place, ...]."""
    if isinstance(reading, (At, Scores)):
        return ("pair",) if reading.kind == "pair" else ("query", reading.kind)
    if isinstance(reading, Received):
        return ("key",)
    if isinstance(reading, Propagate):
        return ("query" if reading.side == "right" else "key", "column")
    if isinstance(reading, Inputs):
        return ("query", "channel") if name.startswith("input_q") else ("key", "channel")
    return ("query", *reading.dims)


def by_query(key: Key, chunks: list[Chunk], extra: list[Any] | None) -> xr.DataArray:
    _, reading, name = key
    first = chunks[0].values
    dims = dims_of(reading, name, first.ndim)
    layers = sorted({c.layer for c in chunks})
    calls = max(c.number for c in chunks) + 1
    heads = (
        list(range(max(max(c.heads) for c in chunks) + 1))
        if reading.heads is None
        else sorted({h for c in chunks for h in c.heads})
    )
    samples = max(c.start + len(c.values) for c in chunks)
    places = np.unique(np.concatenate([c.places for c in chunks]))
    tail = tuple(max(c.values.shape[3 + n] for c in chunks) for n in range(first.ndim - 3))
    whole = first.dtype.kind in "iu"
    shape = (calls, samples, len(layers), len(heads), len(places), *tail)
    array = np.full(shape, -1 if whole else np.nan, first.dtype)
    for c in chunks:
        index = np.ix_(
            np.array([layers.index(c.layer)]),
            np.array([heads.index(h) for h in c.heads]),
            np.searchsorted(places, c.places),
        )
        given = c.values
        if isinstance(reading, (Mass, SegmentEntropy)):
            # A segment no key had yet (tokens generated later) got no attention.
            given = np.pad(given, [(0, 0)] * (given.ndim - 1) + [(0, tail[-1] - given.shape[-1])])
        values = given.reshape(len(given), 1, *given.shape[1:])
        ends = tuple(slice(0, n) for n in given.shape[3:])
        for sample in range(len(values)):
            array[(c.number, c.start + sample)][(*index, *ends)] = values[sample]
        if len(c.heads) == len(heads) and len(c.places) == len(places):
            # What was gathered need not be kept twice.
            mine = array[c.number, c.start : c.start + len(values), layers.index(c.layer)]
            c.values = mine[(slice(None), slice(None), slice(None), *ends)]
    coords: dict[str, Any] = {"layer": layers, "head": heads, dims[0]: places}
    names = ("call", "sample", "layer", "head", *dims)
    return finish(array, names, coords, dims, extra, calls)


def by_head(key: Key, moments: dict[tuple[int, int], Moments], extra: list[Any] | None) -> dict[str, xr.DataArray]:
    _, reading, name = key
    layers = sorted({layer for layer, _ in moments})
    calls = max(number for _, number in moments) + 1
    heads = sorted({h for m in moments.values() for h in m.heads})
    tails = [m.mean.shape[1:] for m in moments.values()]
    tail = tuple(max(sizes) for sizes in zip(*tails, strict=True)) if tails[0] else ()
    covariance = name.endswith("_cov") and isinstance(reading, Inputs)
    kinds = ("",) if isinstance(reading, Inputs) else ("", "_count", "_sem")
    arrays = {kind: np.full((calls, len(layers), len(heads), *tail), np.nan) for kind in kinds}
    for (layer, number), m in moments.items():
        places = (number, layers.index(layer), [heads.index(h) for h in m.heads])
        ends = tuple(slice(0, n) for n in m.mean.shape[1:])
        count, mean, m2 = (x.cpu().numpy() for x in (m.count, m.mean, m.m2))
        with np.errstate(invalid="ignore", divide="ignore"):
            filled = {
                "": m2 / count if covariance else np.where(count > 0, mean, np.nan),
                "_count": count,
                "_sem": np.where(count > 1, np.sqrt(m2 / (count - 1) / count), np.nan),
            }
        for kind in kinds:
            target = arrays[kind][places[0], places[1]]
            target[(places[2], *ends)] = filled[kind]
    dims = dims_of(reading, name, 4)
    dims = (
        ("channel", "channel2")
        if covariance
        else dims[1:]
        if dims[0] == "query" or isinstance(reading, Inputs)
        else dims
    )
    coords: dict[str, Any] = {"layer": layers, "head": heads}
    return {
        kind: finish(array, ("call", "layer", "head", *dims), coords, dims, extra, calls)
        for kind, array in arrays.items()
    }


def finish(
    array: np.ndarray,
    names: tuple[str, ...],
    coords: dict[str, Any],
    dims: tuple[str, ...],
    extra: list[Any] | None,
    calls: int,
) -> xr.DataArray:
    if extra is not None and dims:
        coords[dims[-1]] = extra
    if calls == 1:
        array, names = array[0], names[1:]
    else:
        coords["call"] = list(range(calls))
    if "sample" in names:
        coords["sample"] = list(range(array.shape[names.index("sample")]))
    return xr.DataArray(array, dims=names, coords=coords)
