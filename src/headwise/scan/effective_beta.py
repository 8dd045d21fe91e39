"""How sharp is a head's softmax, as the beta of `softmax(beta cos)`, and as a radius of sparse distributed memory?

The scores of a head are `s_ij = beta_ij cos(q_i, k_j)` with `beta_ij = scale |q_i| |k_j|`. As cos <= 1, the largest
score of a query is a lower bound of its beta (the paper's measure); the norms give beta itself, which differs from key
to key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import xarray as xr

from headwise.attention.readings import Inputs, LogSumExp, Reading, Received, Top
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.sdm import PAPER, radius_of_beta


@dataclass(frozen=True)
class EffectiveBeta(Question):
    """`effective_beta`: a query's largest score, the mean (or `reduce="max"`) over queries. `beta_max_key` and
    `beta_mean_key`: `scale |q| |k|` with the longest, or the mean, key of the text. `hamming_radius`: the radius of
    `effective_beta` among as many bits as the head dim. `value_norm_corr`: Pearson correlation over tokens of |v_j|
    with the mean attention token j gets.

    The scale is read from the largest scores themselves (least squares on q . k), so that it is right for any model
    whose scores are q . k times a number; the largest score is `log` of the largest weight plus the log-sum-exp."""

    reduce_over: Literal["mean", "max"] = "mean"
    paper: ClassVar[Paper] = PAPER

    def __post_init__(self) -> None:
        if self.reduce_over not in ("mean", "max"):
            raise HeadwiseError(f'EffectiveBeta(reduce_over=...) must be "mean" or "max"; got {self.reduce_over!r}.')

    def columns(self) -> tuple[Column, ...]:
        unit, sharp = "score per unit of cosine", "tells similar tokens apart sharply"
        return (
            Column("effective_beta", "Effective beta", f"The {self.reduce_over} of a query's largest score.", unit,
                   sharp),
            Column("beta_max_key", "Beta of the longest key", "Scale times the query's length times the longest key's.",
                   unit, sharp),
            Column("beta_mean_key", "Beta of the mean key", "Scale times the query's length times the mean key's.",
                   unit, sharp),
            Column("hamming_radius", "Radius of memory", "The radius of a distributed memory as sharp as the head.",
                   "bits", "reads from a wide neighbourhood"),
            Column("value_norm_corr", "Values and attention", "Whether the tokens looked at most have long values.",
                   "correlation", "looks at tokens with much to say"),
        )  # fmt: skip

    def readings(self, opened: Opened) -> list[Reading]:
        return [Top(1), LogSumExp(), Inputs(("q", "k", "v")), Received()]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        order = ("sample", "layer", "head", ...)
        top = values[["top_value", "top_index", "lse"]].isel(rank=0).transpose(*order)
        largest = np.log(top["top_value"]) + top["lse"]
        q, k, v = (values[f"input_{w}"].transpose(*order) for w in "qkv")
        q = q.sel({q.dims[3]: top["query"].values})
        q, k, v = q.values, k.values, v.values
        chosen = top["top_index"].values.clip(min=0).astype(int)
        dots = np.einsum("slhqc,slhqc->slhq", q, np.take_along_axis(k, chosen[..., None], 3))
        dots = np.where(np.isnan(largest.values), np.nan, dots)
        scale = np.nansum(dots * largest.values, (0, 3)) / np.nansum(dots**2, (0, 3))
        lengths = {name: np.linalg.norm(x, axis=-1) for name, x in (("q", q), ("k", k), ("v", v))}
        asked = np.nanmean(lengths["q"], (0, 3)) * scale
        seen = (values["received"] / values["received_visible"].where(values["received_visible"] > 0)).transpose(*order)
        dims = ("layer", "head")
        place = {dim: top[dim].values for dim in dims}
        data = {
            "largest": getattr(largest, self.reduce_over)(["sample", "query"]).transpose(*dims).values,
            "max_key": asked * np.nanmax(lengths["k"], 3).mean(0),
            "mean_key": asked * np.nanmean(lengths["k"], 3).mean(0),
            "corr": np.nanmean(correlation(lengths["v"], seen.values), 0),
            "bits": np.full(asked.shape, q.shape[-1], dtype=float),
        }
        return xr.Dataset({name: xr.DataArray(x, place, dims) for name, x in data.items()})

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        beta = values["largest"]
        radius = radius_of_beta(int(values["bits"].max()), beta.values)
        return {
            "effective_beta": beta,
            "effective_beta_sem": values["largest_sem"],
            "beta_max_key": values["max_key"],
            "beta_mean_key": values["mean_key"],
            "hamming_radius": beta.copy(data=radius),
            "value_norm_corr": values["corr"],
        }


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r along the last axis, where both are known; nan where one of them does not vary."""
    there = ~(np.isnan(x) | np.isnan(y))
    x, y = (np.where(there, a, np.nan) for a in (x, y))
    x, y = (a - np.nanmean(a, -1, keepdims=True) for a in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(x * y, -1) / np.sqrt(np.nansum(x**2, -1) * np.nansum(y**2, -1))
