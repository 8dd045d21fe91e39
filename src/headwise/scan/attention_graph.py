"""One head's attention as a weighted graph: its spectrum, its components and its loops.

`W = (A + A^T) / 2` without diagonal, for a map A [n, n] of at most 128 tokens. Laplacian `L = D - W`; the Fiedler value
is its second smallest eigenvalue. Topology: the graph of the edges `W >= t`, equal to a Vietoris-Rips complex of the
distance `1 - W / max W`; Betti-0 counts its components, Betti-1 the loops that no triangles fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened
from headwise.scan.needs import quiet

MOST, MOST_LOOPS = 128, 64
LEVELS = tuple(np.round(np.arange(0.05, 1.0, 0.05), 2))


def attention_graphs(
    opened: Opened,
    inputs: Mapping[str, Any],
    heads: Sequence[tuple[int, int]],
    stream: str | None = None,
    loops: bool = False,
) -> xr.Dataset:
    """Measures of the maps of (layer, head) pairs, averaged over the samples of one batch without padding; one forward
    pass and one map a head, as no two maps are kept at a time.

    Dims pair (coords layer, head) and level: `fiedler`, `fiedler_normalised`, `star` (mass of the leading eigenvector
    on its largest token), `alignment` (its entry at the first token), `betti0` [level] and with `loops` `betti1`
    [level], at edges of at least `level` times the largest weight."""
    stream = stream or ("text" if "text" in opened.streams else opened.streams[0])
    rows = []
    for layer, head in heads:
        reading = Map(layers=layer, heads=head, stream=stream)
        with attend(opened, readings=[reading]) as run, torch.no_grad():
            opened.model(**inputs, **quiet(opened.model))
        maps = run.tree[stream]["map"].isel(layer=0, head=0).transpose("sample", "query", "key").values
        found = [measures(one, loops) for one in maps]
        rows.append({name: np.mean([f[name] for f in found], 0) for name in found[0]})
    data = {name: ("pair", [float(row[name]) for row in rows]) for name in rows[0] if not name.startswith("betti")}
    data |= {
        name: (("pair", "level"), np.array([r[name] for r in rows])) for name in rows[0] if name.startswith("betti")
    }
    coords = {"layer": ("pair", [a for a, _ in heads]), "head": ("pair", [b for _, b in heads]), "level": list(LEVELS)}
    return xr.Dataset(data, coords)


def measures(attention: Float[np.ndarray, "query key"], loops: bool = False) -> dict[str, Any]:
    """All measures of one map."""
    W = symmetric(attention)
    laplacian, normalised = laplacians(W)
    leading = np.abs(np.linalg.eigh(W)[1][:, -1])
    found = {
        "fiedler": laplacian[1],
        "fiedler_normalised": normalised[1],
        "star": float(leading.max() ** 2),
        "alignment": float(leading[0]),
        "betti0": betti0(W),
    }
    return found | ({"betti1": betti1(W)} if loops else {})


def symmetric(attention: Float[np.ndarray, "query key"]) -> Float[np.ndarray, "n n"]:
    """The graph's weights: the symmetric part of the map without its diagonal."""
    n = len(attention)
    if attention.shape != (n, n) or not 3 <= n <= MOST or not np.isfinite(attention).all():
        raise HeadwiseError(
            f"attention: wanted the whole map of one head, [n, n] with n from 3 to {MOST}; got {attention.shape}."
        )
    W = (attention + attention.T).astype(float) / 2
    np.fill_diagonal(W, 0)
    return W


def laplacians(W: Float[np.ndarray, "n n"]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Eigenvalues of `D - W` and of `I - D^-1/2 W D^-1/2`, the smallest first; a token without edges counts as a
    component of its own in both."""
    degree = W.sum(1)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    normalised = np.diag((degree > 0).astype(float)) - scale[:, None] * W * scale
    return np.linalg.eigvalsh(np.diag(degree) - W), np.linalg.eigvalsh(normalised)


def distances(W: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    d = 1 - W / W.max() if W.max() > 0 else np.ones_like(W)
    np.fill_diagonal(d, 0)
    return d


def betti0(W: Float[np.ndarray, "n n"], levels: Sequence[float] = LEVELS) -> list[int]:
    """Components at each level. Single linkage merges them at the distances where 0-dimensional homology dies."""
    squareform = need("scipy.spatial.distance", "analysis").squareform
    linkage = need("scipy.cluster.hierarchy", "analysis").linkage
    deaths = linkage(squareform(distances(W), checks=False), "single")[:, 2]
    return [len(W) - int((deaths <= 1 - level + 1e-12).sum()) for level in levels]


def betti1(W: Float[np.ndarray, "n n"], levels: Sequence[float] = LEVELS) -> list[int]:
    """Unfilled loops at each level, for at most 64 tokens: an edge that joins nothing new opens a loop, and reducing
    the triangles in the order in which they appear says which one closes which loop."""
    n = len(W)
    if n > MOST_LOOPS:
        raise HeadwiseError(f"betti1: wanted at most {MOST_LOOPS} tokens, as it looks at all triangles; got {n}.")
    d = distances(W)
    reach = 1 - min(levels) + 1e-12
    edges = sorted((d[i, j], i, j) for i, j in combinations(range(n), 2) if d[i, j] <= reach)
    order = {(i, j): place for place, (_, i, j) in enumerate(edges)}
    parent, births = list(range(n)), {}
    for place, (length, i, j) in enumerate(edges):
        a, b = root(parent, i), root(parent, j)
        if a == b:
            births[place] = length
        parent[a] = b
    triangles = []
    for i, j, k in combinations(range(n), 3):
        sides = [order.get(pair) for pair in ((i, j), (i, k), (j, k))]
        if None not in sides:
            triangles.append((max(sides), sides))  # type: ignore[type-var]
    reduced: dict[int, int] = {}
    deaths: dict[int, float] = {}
    for newest, sides in sorted(triangles):
        column = sum(1 << side for side in sides)  # type: ignore[operator]
        while column and (low := column.bit_length() - 1) in reduced:
            column ^= reduced[low]
        if column:
            reduced[low], deaths[low] = column, edges[newest][0]  # type: ignore[index]
    alive = [(born, deaths.get(place, np.inf)) for place, born in births.items()]
    return [int(sum(born <= 1 - level + 1e-12 < death for born, death in alive)) for level in levels]


def root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = node = parent[parent[node]]
    return node
