"""Do heads that look alike stand in the same layer? Distances between heads, a map of them, and their behaviours.

The distance of two heads is the mean over rows of the Jensen-Shannon divergence of their weights in nats (Clark et al.,
2019; they sum instead, and mix 0.1% of uniform weights in so that their logarithms exist: as 0 log 0 = 0, it is not
needed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened
from headwise.scan.entropy import Entropy
from headwise.scan.head_similarity import head_similarity
from headwise.scan.positional import PositionalHeads
from headwise.scan.run import heads
from headwise.scan.surface import SurfacePatterns
from headwise.scan.units import Unit

BROAD = 3.8 / math.log(128)
"""The paper's 3.8 nats for 128 tokens, as a share of the largest entropy there can be."""


def head_distance(
    opened: Opened,
    inputs: Sequence[Any],
    unit: Unit = "token",
    stream: str | None = None,
    queries: int | str = 64,
    seed: int = 0,
) -> xr.DataArray:
    """Jensen-Shannon distance of every two heads of a model in nats, between 0 and log 2: dims layer_a, head_a,
    layer_b, head_b. Inputs and settings as in `head_similarity`."""
    alike = head_similarity(opened, opened, inputs, "js", unit, stream, queries, seed)
    return (1 - alike).rename("distance").assign_attrs(alike.attrs)


def head_map(distance: xr.DataArray, seed: int = 0) -> pd.DataFrame:
    """Metric multidimensional scaling to two dimensions: a row a head with layer, head, x, y. `attrs["stress"]` is the
    normalised stress (Kruskal's stress 1): 0 keeps all distances, above 0.2 is poor."""
    manifold = need("sklearn.manifold", "analysis")
    table, square = flat(distance)
    table[["x", "y"]], stress = manifold.smacof(
        square, n_components=2, n_init=4, random_state=seed, normalized_stress=True, init=None
    )
    table.attrs["stress"] = float(stress)
    return table


def layer_contrast(distance: xr.DataArray, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """Mean distance of two heads of the same layer (`within`) and of different layers (`between`), and how often a
    random share-out of the heads over layers gives as large a difference (`p`)."""
    table, square = flat(distance)
    layers = table["layer"].to_numpy()
    upper = np.triu_indices(len(layers), 1)
    apart = square[upper]

    def difference(labels: np.ndarray) -> float:
        same = labels[upper[0]] == labels[upper[1]]
        return float(apart[~same].mean() - apart[same].mean())

    if len(set(layers)) < 2 or len(set(layers)) == len(layers):
        raise HeadwiseError("distance: wanted at least two layers, one of them with several heads.")
    same = layers[upper[0]] == layers[upper[1]]
    draw = np.random.default_rng(seed)
    found = difference(layers)
    as_large = sum(difference(draw.permutation(layers)) >= found for _ in range(draws))
    return {
        "within": float(apart[same].mean()),
        "between": float(apart[~same].mean()),
        "p": (1 + as_large) / (1 + draws),
    }


def behaviours(opened: Opened, texts: Sequence[str]) -> pd.DataFrame:
    """A row a head of the text: its shares of attention, its entropy as a share of the largest possible, and `label`,
    the first of the paper's marks it passes: next or previous (0.5), cls, sep or punctuation (0.6; encoders only),
    broad (0.78 of the largest entropy), else "other"."""
    surface = SurfacePatterns()
    asked = [PositionalHeads(), Entropy(), *([surface] if surface.lacks(opened) is None else [])]
    table = heads(opened, texts=list(texts), questions=asked).heads.query("stream == 'text'").copy()
    causal = bool((table["next"] == 0).all())  # no head sees the next token
    table["relative_entropy"] = table["entropy"] / largest_entropy(opened, texts, causal)
    marks = {"next": 0.5, "previous": 0.5, "cls": 0.6, "sep": 0.6, "punctuation": 0.6, "relative_entropy": BROAD}
    table["label"] = "other"
    for name, mark in reversed(marks.items()):
        if name in table:
            table.loc[table[name] > mark, "label"] = "broad" if name == "relative_entropy" else name
    kept = [*(name for name in marks if name in table), "label"]
    return table[["layer", "head", *kept]].reset_index(drop=True)


def largest_entropy(opened: Opened, texts: Sequence[str], causal: bool) -> float:
    """Mean over rows of the log of how many tokens a row can see."""
    counts = [opened.encode(text)["input_ids"].shape[1] for text in texts]
    return float(np.mean([math.log(k if causal else n) for n in counts for k in range(1, n + 1)]))


def flat(distance: xr.DataArray) -> tuple[pd.DataFrame, np.ndarray]:
    """The heads as rows (those a layer lacks left out), and the square matrix of their distances."""
    dims = ("layer_a", "head_a", "layer_b", "head_b")
    if set(distance.dims) != set(dims) or distance.sizes["layer_a"] != distance.sizes["layer_b"]:
        raise HeadwiseError(
            f"distance: wanted what head_distance returns; got dims {', '.join(map(str, distance.dims))}."
        )
    square = distance.transpose(*dims).values.reshape((distance.sizes["layer_a"] * distance.sizes["head_a"],) * 2)
    places = pd.MultiIndex.from_product([distance["layer_a"].values, distance["head_a"].values])
    table = pd.DataFrame(places.to_list(), columns=["layer", "head"])
    there = np.isfinite(np.diag(square))
    return table[there].reset_index(drop=True), square[np.ix_(there, there)]
