"""Which heads pour their attention into one token?

`alpha_k = (1 / n_k) sum_{i sees k} a_ik`, the mean weight key k gets from the n_k queries that can see it (the diagonal
counts); a head sinks into k in a text when `alpha_k > eps`. The paper's `Sink_k^eps` is the mean of `sink_share` over
all heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from headwise.attention.readings import Mass, Reading, Received
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question

LEVELS = np.round(np.arange(0.1, 1.0, 0.1), 1)
"""Thresholds of the profile of rates."""


@dataclass(frozen=True)
class Sinks(Question):
    """`sinks`: alpha of the first token. `sink_share`: share of texts with alpha above the threshold. `sinks_any`: the
    largest alpha of any token that at least a quarter of the queries see (a last token seen by itself is no sink).

    `drop_first` leaves out as many queries at the start, where the first token gets much for want of others. Profiles:
    `sink_alpha` [layer, head, position] for the first `positions` tokens, and `sink_rate` [layer, head, position,
    threshold], the share of texts with alpha above 0.1, ..., 0.9: its mean over heads is the paper's `Sink_k^eps`."""

    threshold: float = 0.3  # type: ignore[misc]
    drop_first: int = 0
    positions: int = 16
    paper: ClassVar[Paper] = Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781")

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise HeadwiseError(f"Sinks(threshold=...) must lie between 0 and 1; got {self.threshold!r}.")
        if self.drop_first < 0:
            raise HeadwiseError(f"Sinks(drop_first=...) must be at least 0 queries; got {self.drop_first!r}.")
        if self.positions < 1:
            raise HeadwiseError(f"Sinks(positions=...) must be at least 1 token; got {self.positions!r}.")

    def columns(self) -> tuple[Column, ...]:
        unit, eps = "share of attention", self.threshold
        return (
            Column(
                "sinks",
                "First-token sinks",
                "Mean attention to the first token, from every token that can see it.",
                unit,
                "rests on the first token",
                eps,
            ),
            Column(
                "sink_share",
                "Texts with a first-token sink",
                f"Share of texts in which the first token gets more than {eps:g}.",
                "share of texts",
                "a sink in every text",
            ),
            Column(
                "sinks_any",
                "Sinks anywhere",
                "The most attention any one token gets, on average over the tokens that can see it.",
                unit,
                "rests on one token, wherever it is",
                eps,
            ),
        )

    def readings(self, opened: Opened) -> list[Reading]:
        return [Received(), Mass(("first",), per="head")]

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        if not self.drop_first:
            return self.readings(opened)
        if "input_ids" not in prompt.inputs or prompt.length <= self.drop_first:
            raise HeadwiseError(
                f"Sinks(drop_first={self.drop_first}) wants inputs with more token ids than that; got "
                f"{sorted(prompt.inputs)} of length {prompt.length}."
            )
        kept = range(self.drop_first, prompt.length)
        return [Received(queries=kept), Mass(("first",), per="head", queries=kept)]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        alpha = received_share(values)
        visible = alpha.notnull()
        start = visible.argmax("key")
        first = alpha.isel(key=start)
        seen = values["received_visible"]
        largest = alpha.where(seen >= seen.max("key") / 4).max("key")
        kept = values[[name for name in values.data_vars if str(name).startswith("mass")]].sel(
            segment="first", drop=True
        )
        length = min(self.positions, alpha.sizes["key"])
        place = xr.DataArray(np.arange(length), dims="position", coords={"position": np.arange(length)})
        early = alpha.isel(key=(start + place).clip(max=alpha.sizes["key"] - 1)).drop_vars(
            ["key", "module"], errors="ignore"
        )
        level = xr.DataArray(LEVELS, dims="threshold", coords={"threshold": LEVELS})
        return kept.assign(
            alpha=early.mean("sample"),
            rate=(early > level).where(early.notnull()).mean("sample"),
            first=first.mean("sample"),
            share=(first > self.threshold).where(first.notnull()).mean("sample"),
            largest=largest.mean("sample"),
        ).drop_vars(["key", "module"], errors="ignore")

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {
            "sinks": values["first"],
            "sinks_sem": values["mass_sem"],
            "sink_share": values["share"],
            "sinks_any": values["largest"],
        }

    def profiles(self, values: xr.Dataset) -> Mapping[str, xr.DataArray]:
        return {"sink_alpha": values["alpha"], "sink_rate": values["rate"]}


def received_share(values: xr.Dataset) -> xr.DataArray:
    """alpha_k: what a key receives, divided by how many queries see it; nan for a key none sees."""
    visible = values["received_visible"]
    return values["received"] / visible.where(visible > 0)


def later_share(values: xr.Dataset) -> xr.DataArray:
    """The same without the diagonal, from `At(lags=[0])` beside: what a key gets from each later query; nan where no
    other query sees it."""
    others = values["received_visible"] - 1
    own = values["at"].sel(lag=0, drop=True).rename(query="key")
    return (values["received"] - own) / others.where(others > 0)
