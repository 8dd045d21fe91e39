"""How much attention will far keys get, from their mean and covariance alone?

With keys k ~ N(mu, Sigma) the scores s = c q.k of a query are N(m, v), `m = c q.mu`, `v = c^2 q^T Sigma q`, so that T
of them sum to `log sum_j exp s_j ~ log T + m + v / 2`: one quadratic form a query, and no walk over the keys. It is
exact where v = 0. Real scores have a largest one, so that it overestimates where v is large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import xarray as xr

from headwise.attention import attend
from headwise.attention.readings import Inputs, Reading, Scores
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.needs import quiet


@dataclass(frozen=True, eq=False)
class KeyMoments:
    """Of each head's keys over a range of positions: mean [layer, head, channel], covariance [layer, head, channel,
    channel2] and the scale c of its scores [layer, head]. Heads that share keys share the first two.

    Positions are part of the keys (rotary embeddings): moments hold for a range like the one they come from. The first
    tokens do not belong into it: the norms of sinks are outliers.
    """

    mean: xr.DataArray
    covariance: xr.DataArray
    scale: xr.DataArray

    @classmethod
    def fit(cls, opened: Opened, inputs: Mapping[str, Any], keys: Sequence[int]) -> Self:
        """From one forward pass over `inputs`: the keys at these positions. The last tokens are the queries that the
        scale is read from."""
        length = inputs["input_ids"].shape[-1]
        queries = range(length - min(16, length - keys[0] - 1), length)
        with attend(opened, readings=readings(keys, queries)) as run, torch.no_grad():
            opened.model(**inputs, **quiet(opened.model))
        return cls.read(run.tree["text"].to_dataset())

    @classmethod
    def read(cls, values: xr.Dataset) -> Self:
        """From the values of `readings`."""
        return cls(values["input_k_mean"], values["input_k_cov"], scale(values))

    def log_mass(self, q: xr.DataArray, count: int) -> xr.DataArray:
        """`log sum_j exp s_j` [sample, layer, head, query] of queries q [..., channel] over `count` such keys."""
        middle = self.scale * xr.dot(q, self.mean, dim="channel")
        other = q.rename(channel="channel2")
        spread = self.scale**2 * xr.dot(q, self.covariance, other, dim=("channel", "channel2"))
        return np.log(count) + middle + spread / 2


def readings(keys: Sequence[int], queries: Sequence[int]) -> list[Reading]:
    """What `KeyMoments.read` needs: the moments of keys, and q, k and score of each query and a key far before it."""
    lag = queries[0] - keys[0]
    return [
        Inputs(("k",), moments=True, queries=tuple(keys), stream="text"),
        Inputs(("q",), queries=tuple(queries), stream="text"),
        Inputs(("k",), queries=tuple(i - lag for i in queries), stream="text"),
        Scores(lags=(lag,), queries=tuple(queries), stream="text"),
    ]


def scale(values: xr.Dataset) -> xr.DataArray:
    """The c of `s = c q.k` [layer, head], by least squares from scores that were read; another form is an error."""
    # A pass that is shared with other readings has their queries, keys and lags too, as nan.
    q, key, score = (
        values[name].dropna(dim, how="all")
        for name, dim in (("input_q", "query"), ("input_k", "key"), ("scores", "query"))
    )
    dot = xr.dot(q, key.rename(key="query").assign_coords(query=q["query"]), dim="channel")
    score = score.dropna("lag", how="all").isel(lag=0)
    over = ("sample", "query")
    found = (score * dot).sum(over) / (dot**2).sum(over)
    off = np.abs(score - found * dot).max(over) / np.abs(score).max(over)
    if float(off.max()) > 0.01:
        raise HeadwiseError(
            f"Key moments need scores of the form c q.k; those of layer {int(off.max('head').argmax('layer'))} are not "
            "(a soft cap, or positions added to the scores)."
        )
    return found
