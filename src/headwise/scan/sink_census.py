"""How many sinks beyond the first token does a head have?

Column mean over the queries that see the key, `m_k = sum_{i >= k} a_ik / (n - k)`; the later sinks S of a head in a
text are the keys k > 0 with `m_k` above the threshold, and `s_i = sum_{k in S} a_ik` is what query i gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import xarray as xr

from headwise.attention.readings import Reading, Received
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.sinks import received_share


@dataclass(frozen=True)
class SinkCensus(Question):
    """`sink_census`: later sinks per text. `later_sink_mass`: mean attention of a query to them. `later_sink_share`:
    share of texts with any.

    `rule="absolute"`: a sink gets more than `threshold` (the paper's code); `"relative"`: more than `alpha / n`, that
    many times uniform attention (the paper's text). Keys that fewer than `min_queries` queries see are left out, as
    their mean is noise (the last token sees itself; `min_queries=1` is the paper's code). The first token is exempt by
    its place, a sink or not. Profile: `later_sink_heads` [layer], share of heads with a later sink.
    """

    threshold: float = 0.1  # type: ignore[misc]
    rule: Literal["absolute", "relative"] = "absolute"
    alpha: float = 5.0
    min_queries: int = 8
    paper: ClassVar[Paper] = Paper(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration",
        "2406.15765",
    )

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise HeadwiseError(f"SinkCensus(threshold=...) must lie between 0 and 1; got {self.threshold!r}.")
        if self.rule not in ("absolute", "relative"):
            raise HeadwiseError(f'SinkCensus(rule=...) must be "absolute" or "relative"; got {self.rule!r}.')
        if self.alpha <= 1:
            raise HeadwiseError(f"SinkCensus(alpha=...) must be more than 1, uniform attention; got {self.alpha!r}.")
        if self.min_queries < 1:
            raise HeadwiseError(f"SinkCensus(min_queries=...) must be at least 1; got {self.min_queries!r}.")

    def columns(self) -> tuple[Column, ...]:
        mark = f"more than {self.threshold:g}" if self.rule == "absolute" else f"{self.alpha:g} times uniform"
        return (
            Column(
                self.name,
                "Later sinks",
                f"How many tokens after the first get {mark} of the attention that could go to them.",
                "tokens a text",
                "rests on several tokens",
            ),
            Column(
                "later_sink_mass",
                "Attention to later sinks",
                "Mean attention of a query to all these tokens together.",
                "share of attention",
                "rests on later tokens",
            ),
            Column(
                "later_sink_share",
                "Texts with a later sink",
                "Share of texts with at least one such token.",
                "share of texts",
                "a later sink in every text",
            ),
        )

    def readings(self, opened: Opened) -> list[Reading]:
        return [Received()]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        sink = self.found(values)
        queries = values["received_visible"].max("key")
        mass = values["received"].where(sink, 0).sum("key") / queries
        found = {"number": sink.sum("key"), "mass": mass, "any": sink.any("key")}
        kept = xr.Dataset({name: x.astype(float).mean("sample") for name, x in found.items()})
        return kept.drop_vars("module", errors="ignore")

    def found(self, values: xr.Dataset) -> xr.DataArray:
        """True at the later sinks, [sample, layer, head, key], from what `Received` read."""
        seen = values["received_visible"]
        level = self.threshold if self.rule == "absolute" else self.alpha / seen.max("key")
        later = xr.ones_like(seen).cumsum("key") > (seen > 0).argmax("key") + 1
        return (received_share(values) > level) & later & (seen >= self.min_queries)

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {self.name: "number", "later_sink_mass": "mass", "later_sink_share": "any"}
        return {f"{column}{end}": values[f"{name}{end}"] for column, name in names.items() for end in ("", "_sem")}

    def profiles(self, values: xr.Dataset) -> Mapping[str, xr.DataArray]:
        return {"later_sink_heads": values["any"].mean("head")}
