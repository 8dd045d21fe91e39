"""Which heads pour their attention into one token?

`alpha_k = (1 / n_k) sum_{i sees k} a_ik`, the mean weight key k gets from the n_k queries that can see it (the diagonal
counts); a head sinks into k in a text when `alpha_k > eps`. The paper's `Sink_k^eps` is the mean of `sink_share` over
all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import xarray as xr

from headwise.attention.readings import Mass, Reading, Received
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question


@dataclass(frozen=True)
class Sinks(Question):
    """`sinks`: alpha of the first token. `sink_share`: share of texts with alpha above the threshold. `sinks_any`: the
    largest alpha of any token that at least a quarter of the queries see (a last token seen by itself is no sink)."""

    threshold: float = 0.3  # type: ignore[misc]
    paper: ClassVar[Paper] = Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781")

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise HeadwiseError(f"Sinks(threshold=...) must lie between 0 and 1; got {self.threshold!r}.")

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

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        alpha = received_share(values)
        visible = alpha.notnull()
        first = alpha.isel(key=visible.argmax("key"))
        seen = values["received_visible"]
        largest = alpha.where(seen >= seen.max("key") / 4).max("key")
        kept = values[[name for name in values.data_vars if str(name).startswith("mass")]].sel(
            segment="first", drop=True
        )
        return kept.assign(
            first=first.mean("sample"),
            share=(first > self.threshold).where(first.notnull()).mean("sample"),
            largest=largest.mean("sample"),
        ).drop_vars("key", errors="ignore")

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {
            "sinks": values["first"],
            "sinks_sem": values["mass_sem"],
            "sink_share": values["share"],
            "sinks_any": values["largest"],
        }


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
