"""Which heads need the far context, and for which tokens?

The keys of a query are split into the near ones (the first `sink` tokens and a window before it) and the far ones
between them. With `A = sum exp s` over each part a head is local for this query when `A_near / (A_near + A_far) >=
tau`, and needs the far context otherwise. The same is decided without looking at the far keys, from their mean and
covariance (`KeyMoments`): `A_far ~ T exp(m + v / 2)`.

As when a text is continued: the queries are the last tokens of each text, the far keys and their moments are fixed
before the first of them, and the window, `local` tokens at the first query, grows with the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr

from headwise.attention.readings import LogSumExp, Propagate, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan import key_moments
from headwise.scan.key_moments import KeyMoments
from headwise.scan.needs import lacks_language_model
from headwise.scan.question import Column, Prompt, Question

TINY = 1e-30
"""A mass below this counts as this, so that its log is finite."""
BINS = np.linspace(0, 1, 11)


@dataclass(frozen=True)
class LongContextHeads(Question):
    """`long_context_heads`: share of queries that need the far context, 0 for a head that is always local, 1 for one
    that never is. `long_context_predicted`: the same by the estimate. `long_context_agreement`: share of queries in
    which both agree. `long_context_correlation`: of estimated and true `log A_far` over the queries of a text.

    `tau` = 0 makes every head local, above 1 none. Profile `long_context_histogram` [layer, head, far_mass]: share of
    queries with a far share of attention in each tenth."""

    tau: float = 0.9
    sink: int = 16
    local: int = 128
    queries: int = 64
    paper: ClassVar[Paper] = Paper(
        "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification", "2502.09647"
    )

    def __post_init__(self) -> None:
        for name, least in {"tau": 0, "sink": 0, "local": 1, "queries": 2}.items():
            if getattr(self, name) < least:
                raise HeadwiseError(
                    f"LongContextHeads({name}=...) must be at least {least}; got {getattr(self, name)!r}."
                )

    def columns(self) -> tuple[Column, ...]:
        share = "share of queries"
        return (
            Column(
                "long_context_heads",
                "Long-context heads",
                f"Share of tokens for which more than {1 - self.tau:.0%} of the attention would go to the far context.",
                share,
                "needs the far context",
            ),
            Column(
                "long_context_predicted",
                "Long-context heads, predicted",
                "The same, predicted for each token from the mean and covariance of the far keys.",
                share,
                "predicted to need the far context",
            ),
            Column(
                "long_context_agreement",
                "Long context: prediction right",
                "Share of tokens for which the prediction and the truth agree.",
                share,
                "predictable from two moments",
            ),
            Column(
                "long_context_correlation",
                "Long context: estimate and truth",
                "Correlation of the estimated and the true log of the far keys' part of the softmax.",
                "correlation",
                "far scores are near a normal distribution",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_language_model(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def spans(self, length: int) -> tuple[range, range]:
        """Positions of the far keys and of the queries, in a text of this length."""
        queries = range(length - self.queries, length)
        far = range(self.sink, queries.start - self.local + 1)
        if len(far) < self.queries:
            raise HeadwiseError(
                f"texts: LongContextHeads wants at least {self.sink + self.local + 2 * self.queries - 1} tokens (sink, "
                f"far keys, window and queries); got {length}."
            )
        return far, queries

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        far, queries = self.spans(prompt.length)
        inside = torch.zeros(prompt.length, 1)
        inside[far.start : far.stop] = 1
        return [
            Propagate(x=inside, queries=tuple(queries), stream="text"),
            LogSumExp(queries=tuple(queries), stream="text"),
            *key_moments.readings(far, queries),
        ]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        far, queries = self.spans(prompt.length)
        values = values.sel(query=list(queries))
        mass = values["propagate"].isel(column=0)
        true = values["lse"] + np.log(mass.clip(min=TINY))
        near = values["lse"] + np.log((1 - mass).clip(min=TINY))
        estimate = KeyMoments.read(values).log_mass(values["input_q"], len(far))
        predicted = share(estimate, near)
        over = ("sample", "query")
        long, said = mass > 1 - self.tau, predicted > 1 - self.tau
        bins = [((mass >= low) & (mass < high)).mean(over) for low, high in zip(BINS[:-1], [*BINS[1:-1], 2])]
        return xr.Dataset(
            {
                "long": long.mean(over),
                "predicted": said.mean(over),
                "agreement": (long == said).mean(over),
                "correlation": xr.corr(estimate, true, "query").mean("sample"),
                "histogram": xr.concat(bins, xr.DataArray(BINS[:-1], dims="far_mass", name="far_mass")),
            }
        )

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {"long": "long_context_heads"} | {
            name: f"long_context_{name}" for name in ("predicted", "agreement", "correlation")
        }
        return {new: values[old] for old, new in names.items()} | {
            f"{new}_sem": values[f"{old}_sem"] for old, new in names.items()
        }

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {"long_context_histogram": values["histogram"].transpose("layer", "head", "far_mass")}


def share(log_far: xr.DataArray, log_near: xr.DataArray) -> xr.DataArray:
    """`A_far / (A_near + A_far)`."""
    return 1 / (1 + np.exp((log_near - log_far).clip(max=80)))


def kind(long: float, margin: float = 0.05) -> str:
    """A head by its share of queries that need the far context: "always local", "always long" (both but for `margin`)
    or "switching"."""
    return "always local" if long <= margin else "always long" if long >= 1 - margin else "switching"
