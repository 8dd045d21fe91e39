"""What do a model's heads take as the origin of their coordinates: one token, many, or both ends of the text?

With s_j the mean weight key j gets from the other queries that see it, a token anchors a head when `s_j >= threshold`.
Where the anchors of the middle layers sit names the frame: centralized (one, the first token), bidirectional (the first
and the last) or distributed (several others). Two numbers say how star-like a head's attention is as a graph
`W = (A + A^T) / 2` without diagonal, whose degrees are `c_j = (sum_i a_ij + 1) / 2 - a_jj`: they need no matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from headwise.attention.readings import At, Reading, Received
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.sinks import later_share

FRAMES = ("centralized", "distributed", "bidirectional", "mixed", "none")
ANCHORS = ("first", "last", "other")


@dataclass(frozen=True)
class ReferenceFrames(Question):
    """`reference_frames`: Freeman's degree centralisation (1 for a star, 0 where all degrees are equal). `anchor_gini`:
    Gini coefficient of s. `anchor_first`, `anchor_last`: s of the first and of the last token.

    Keys that fewer than a quarter of the queries see are left out of s, so that under a causal mask there is no last
    anchor. The paper's formulas could not be read: centralisation is scaled by the star of equal total weight,
    `sum_j (c_max - c_j) / (T (n - 2))` with T half the sum of the degrees, and the rule for the frame is ours.

    Profiles: `frame_type`; `frame_mass` [anchor], the shares of all anchor mass (the s_j of anchors, middle half of the
    layers) at the first, the last and the other tokens; `frame_hubs`, the number of tokens of a text with 5% or more.
    Centralized from 60% at the first token, bidirectional from 20% at both ends, distributed from 3 hubs; else mixed,
    and none without anchors.
    """

    threshold: float = 0.3  # type: ignore[misc]
    paper: ClassVar[Paper] = Paper("What are you sinking? A geometric approach on attention sink", "2508.02546")

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise HeadwiseError(f"ReferenceFrames(threshold=...) must lie between 0 and 1; got {self.threshold!r}.")

    def columns(self) -> tuple[Column, ...]:
        unit, eps = "share of attention", self.threshold
        star = "How near the head's attention is to a star around one token, as a graph (1: a star)."
        gini = "How unequal the attention is that tokens receive (0: all the same)."
        first = "Mean attention to the first token, from the others that can see it."
        last = "Mean attention to the last token, from the others that can see it (in two-way attention)."
        return (
            Column(self.name, "Centralisation", star, "0 to 1", "one token is the centre"),
            Column("anchor_gini", "Inequality", gini, "0 to 1", "few tokens receive all"),
            Column("anchor_first", "First anchor", first, unit, "rests on the first token", eps),
            Column("anchor_last", "Last anchor", last, unit, "rests on the last token", eps),
        )

    def streams(self, opened: Opened) -> Sequence[str]:
        return list(dict.fromkeys(site.stream for site in opened.sites if site.kind == "self"))

    def readings(self, opened: Opened) -> list[Reading]:
        return [Received(), At(lags=[0])]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        seen = values["received_visible"]
        there = (seen > 0).isel(layer=0, head=0, drop=True)
        first = there.argmax("key")
        last = there.sizes["key"] - 1 - there[..., ::-1].argmax("key")
        share = later_share(values).where(seen >= seen.max("key") / 4)
        depth = share.sizes["layer"]
        middle = share.isel(layer=slice(depth // 4, max(1, -(-3 * depth // 4))))
        token = middle.where(middle >= self.threshold, 0).sum(["layer", "head"])
        total = token.sum("key")
        ends = [token.isel(key=first), token.isel(key=last)]
        found = {
            "centralisation": centralisation(degrees(values), seen > 0),
            "gini": gini(share),
            "first": share.isel(key=first),
            "last": share.isel(key=last),
            "anchors": xr.concat([*ends, total - sum(ends)], "anchor", coords="minimal", compat="override"),
            "hubs": ((token > 0) & (token >= 0.05 * total)).sum("key").where(total > 0),
        }
        kept = xr.Dataset({name: x.astype(float).drop_vars("key", errors="ignore") for name, x in found.items()})
        return kept.drop_vars("module", errors="ignore").assign_coords(anchor=list(ANCHORS)).mean("sample")

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {
            self.name: "centralisation",
            "anchor_gini": "gini",
            "anchor_first": "first",
            "anchor_last": "last",
        }
        return {f"{column}{end}": values[f"{name}{end}"] for column, name in names.items() for end in ("", "_sem")}

    def profiles(self, values: xr.Dataset) -> Mapping[str, xr.DataArray]:
        total = values["anchors"].sum("anchor")
        mass = values["anchors"] / total.where(total > 0)
        frame = frame_type(*(float(mass.sel(anchor=name)) for name in ANCHORS[:2]), float(values["hubs"]))
        return {"frame_type": xr.DataArray(frame), "frame_mass": mass, "frame_hubs": values["hubs"]}


def frame_type(first: float, last: float, hubs: float) -> str:
    """The frame from the shares of anchor mass at both ends and the number of hubs a text (nan: no anchors)."""
    if np.isnan(first):
        return "none"
    if first >= 0.2 and last >= 0.2:
        return "bidirectional"
    return "centralized" if first >= 0.6 else "distributed" if hubs >= 3 else "mixed"


def degrees(values: xr.Dataset) -> xr.DataArray:
    """Degrees of the tokens in `W = (A + A^T) / 2` without its diagonal, [..., key]."""
    own = values["at"].sel(lag=0, drop=True).rename(query="key")
    return (values["received"] + own.notnull()) / 2 - own


def centralisation(degree: xr.DataArray, there: xr.DataArray) -> xr.DataArray:
    """Freeman's, scaled by the star of the same total weight; nan for fewer than 3 tokens or no edges."""
    degree, n = degree.where(there), there.sum("key")
    total = degree.sum("key") / 2
    scale = total * (n - 2)
    return (degree.max("key") * n - 2 * total) / scale.where(scale > 0)


def gini(x: xr.DataArray) -> xr.DataArray:
    """Gini coefficient along key, nan left out: `sum_j (2 r_j - n - 1) x_j / (n sum_j x_j)` with the ranks r of x."""
    n, total = x.notnull().sum("key"), x.sum("key")
    rank = xr.apply_ufunc(
        lambda v: v.argsort(-1).argsort(-1) + 1, x, input_core_dims=[["key"]], output_core_dims=[["key"]]
    )
    weighted = ((2 * rank - n - 1) * x).sum("key")
    return weighted / (n * total).where(total > 0)
