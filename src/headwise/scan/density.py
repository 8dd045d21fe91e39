"""How dense is attention, compared with the densest there is? And how steep is the softmax there?

A row a over n visible keys: its entropy divided by log n (1: all keys alike), and the Frobenius norm of the softmax's
Jacobian `diag(a) - a a^T`, how much the row moves when its scores do: 0 for one key alone, nearly `1 / sqrt(n)` for
all alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from headwise.attention.readings import Map, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question

DENSE = 0.9


@dataclass(frozen=True)
class Density(Question):
    """`density`: the mean of a row's entropy over the log of how many keys it sees; `dense_rows`: the share of rows
    above 0.9; `softmax_slope`: the mean Jacobian norm. Estimated from `rows` random rows of each input's maps, all of
    them where it has no more. Rows that see one key are left out. Give inputs without padding, one at a time."""

    rows: int = 64
    paper: ClassVar[Paper] = Paper("Scratching Visual Transformer's Back with Uniform Attention", "2210.08457")

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise HeadwiseError(f"Density(rows=...) must be at least 1 row of the map; got {self.rows!r}.")

    def columns(self) -> tuple[Column, ...]:
        share = "share of the largest"
        return (
            Column(
                "density", "Density", "Entropy of a row over the log of its keys.", share, "looks at all tokens alike"
            ),
            Column(
                "dense_rows",
                "Dense rows",
                f"Rows whose entropy is above {DENSE:.0%} of the largest.",
                "share of rows",
                "is dense for most queries",
            ),
            Column(
                "softmax_slope",
                "Softmax slope",
                "Frobenius norm of the softmax's Jacobian.",
                "norm",
                "moves much with its scores",
            ),
        )

    def streams(self, opened: Opened) -> Sequence[str]:
        return list(dict.fromkeys(site.stream for site in opened.sites if site.kind == "self"))

    def readings(self, opened: Opened) -> list[Reading]:
        return [Map(queries=self.rows)]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        maps = values["map"].transpose("sample", "layer", "head", "query", "key")
        a, places = maps.values.astype(float), np.asarray(maps["query"].values)
        causal = not np.nan_to_num(a)[..., np.arange(a.shape[-1]) > places[:, None]].any()
        keys = places + 1 if causal else np.full(len(places), a.shape[-1])
        rows = keys > 1
        if not rows.any():
            raise HeadwiseError("Density wants inputs of two tokens or more.")
        a, keys = a[:, :, :, rows], keys[rows]
        entropy = -(a * np.log(np.where(a > 0, a, 1.0))).sum(-1) / np.log(keys)
        squares = (a**2).sum(-1)
        slope = np.sqrt(np.clip(squares - 2 * (a**3).sum(-1) + squares**2, 0, None))
        dense = np.where(np.isnan(entropy), np.nan, entropy > DENSE)
        found = {"density": entropy, "dense_rows": dense, "softmax_slope": slope}
        count = a.shape[0] * a.shape[3]
        dims = ("layer", "head")
        data: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for name, each in found.items():
            data[name] = (dims, each.mean((0, 3)))
            data[f"{name}_sem"] = (dims, each.std((0, 3), ddof=1 if count > 1 else 0) / np.sqrt(count))
            data[f"{name}_count"] = (dims, np.full(each.shape[1:3], float(count)))
        return xr.Dataset(data, {"layer": maps["layer"], "head": maps["head"]}).drop_vars("module", errors="ignore")

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = [column.name for column in self.columns()]
        return {f"{name}{end}": values[f"{name}{end}"] for name in names for end in ("", "_sem")}
