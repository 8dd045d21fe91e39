"""How do heads mix tokens: sharply or evenly, near or far, all alike or each in its own way?

For a head's map A [n, n]: concentration `||A||_F = sqrt(sum_ij a_ij^2)`; local focus of lag N, the mean of the N-th
subdiagonal; head diversity of a layer, the mean over the visible cells of the standard deviation over heads. The
paper's other two indicators are the questions `entropy` and, as the column `first` of `positional_heads`, its sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr
from jaxtyping import Float

from headwise.attention.readings import At, Map, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question

LAGS = (0, 1, 2, 3)
PAPER = Paper("Deconstructing Attention: Investigating Design Principles for Effective Language Modeling", "2510.11602")


@dataclass(frozen=True)
class Concentration(Question):
    """`concentration`, between `sqrt(sum_i 1/i)` (a causal map that is uniform) and `sqrt(n)` (every row at one token):
    compare inputs of one length. `focus_0` to `focus_3`: mean weight 0 to 3 tokens back, over the queries that have
    such a token. Profile `head_diversity` [layer].

    Concentration and diversity are estimated from `rows` random rows of the map, exact for inputs of at most as many
    tokens; the standard error says how far off. A causal map has n (n + 1) / 2 visible cells, any other n^2."""

    rows: int = 64
    paper: ClassVar[Paper] = PAPER

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise HeadwiseError(f"Concentration(rows=...) must be at least 1 row of the map; got {self.rows!r}.")

    def columns(self) -> tuple[Column, ...]:
        focus = [
            Column(
                f"focus_{lag}",
                f"Focus {lag} back",
                f"Mean attention to the token {lag} places before, where there is one.",
                "share of attention",
                "looks there by position",
            )
            for lag in LAGS
        ]
        return (
            Column(
                "concentration",
                "Concentration",
                "Frobenius norm of the attention map: the root of the sum of its squared weights.",
                "root of tokens",
                "puts each row on few tokens",
            ),
            *focus,
        )

    def streams(self, opened: Opened) -> Sequence[str]:
        return list(dict.fromkeys(site.stream for site in opened.sites if site.kind == "self"))

    def readings(self, opened: Opened) -> list[Reading]:
        return [Map(queries=self.rows), At(lags=LAGS, per="head")]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        maps = values["map"].transpose("sample", "layer", "head", "query", "key")
        tokens = maps.sizes["key"]
        rows = (maps**2).sum("key", skipna=False)
        squares = rows.mean(["sample", "query"]) * tokens
        count = rows.sizes["sample"] * rows.sizes["query"]
        # Rows of a small input are all there: nothing is estimated.
        spread = rows.std(["sample", "query"], ddof=1) if count > 1 and tokens > rows.sizes["query"] else 0 * squares
        visible = values["at_count"] * (tokens - values["lag"]) / tokens
        diversity = [head_diversity(layer, maps["query"].values) for layer in maps.transpose("layer", ...).values]
        return xr.Dataset(
            {
                "concentration": np.sqrt(squares),
                "concentration_sem": tokens * spread / np.sqrt(count) / (2 * np.sqrt(squares)),
                "concentration_count": xr.full_like(squares, count),
                "focus": values["at"] * tokens / (tokens - values["lag"]),
                "focus_sem": values["at_sem"] * tokens / (tokens - values["lag"]),
                "focus_count": visible,
                "head_diversity": ("layer", diversity),
            },
            {"layer": maps["layer"]},
        ).drop_vars("module", errors="ignore")

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        columns = {"concentration": values["concentration"], "concentration_sem": values["concentration_sem"]}
        for lag in LAGS:
            columns |= {f"focus_{lag}{end}": values[f"focus{end}"].sel(lag=lag, drop=True) for end in ("", "_sem")}
        return columns

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {"head_diversity": values["head_diversity"]}


def head_diversity(maps: Float[np.ndarray, "sample head row key"], places: Sequence[int]) -> float:
    """Mean standard deviation over heads of the visible cells of some rows, which stand at `places`."""
    there = ~np.isnan(maps).all(axis=(0, 2, 3))  # a stream may have layers of fewer heads
    spread = maps[:, there].std(axis=1)
    ahead = np.arange(maps.shape[-1]) > np.asarray(places)[:, None]
    causal = not maps[:, there][..., ahead].any()
    return float(spread.sum() / (len(maps) * (~ahead if causal else np.ones_like(ahead)).sum()))
