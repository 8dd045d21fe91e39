"""How many terms of the exponential's Taylor series does a head's softmax need?

`exp(s) = sum_n s^n / n!`, and the n-th term is a linear attention whose features are products of n query and key
channels: the order a head needs is the size of the recurrent state that could stand for it. With the sum cut after
order M, `T_M(s) = sum_{n <= M} s^n / n!`, the head's weights become `T_M(s_ij) / sum_j T_M(s_ij)`.

Scores are as the head gets them, positions and masks included, and no maximum is taken off: softmax would not notice,
but a cut series does. An odd order is negative at low scores, so that its weights can be no weights at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise.attention.readings import Reading, Scores
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question

PAPER = Paper("On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective", "2507.23632")
OF_WORDS = ("text", "encoder", "decoder")
MOST = 128
"""Orders up to here stay within float64 for every score below 12,000."""
AT_ONCE = 2048
"""Scores whose terms are held at once: they fit a processor's cache."""


@dataclass(frozen=True)
class TaylorOrders(Question):
    """`taylor_orders`: the smallest M such that from M up to `orders` the cut series misplaces at most `within` of a
    row's attention on average (half the L1 distance to the softmax; 1 where the cut weights sum to nothing positive or
    are further off than that); `orders + 1` where there is none. `taylor_mean_order`: the mean n under the row's terms
    `|s|^n / n!`, which is `sum_j |s| e^|s| / sum_j e^|s|`. `taylor_error_2`: what second-order Taylor attention would
    misplace.

    Profiles [layer, head, order]: `taylor_spectrum`, the mean of `|s^n / n!|` over all scores, as the paper has it (a
    few large scores decide it); `taylor_share`, each row's spectrum divided by its sum over all orders, the mean over
    rows; `taylor_error`, what M = order misplaces. From `rows` random rows of each text."""

    orders: int = 64
    within: float = 0.05
    rows: int = 32
    paper: ClassVar[Paper] = PAPER

    def __post_init__(self) -> None:
        if not 2 <= self.orders <= MOST:
            raise HeadwiseError(f"TaylorOrders(orders=...) must be 2 to {MOST}; got {self.orders!r}.")
        if not 0 < self.within < 1:
            raise HeadwiseError(f"TaylorOrders(within=...) must lie between 0 and 1; got {self.within!r}.")
        if self.rows < 1:
            raise HeadwiseError(f"TaylorOrders(rows=...) must be at least 1 row of the map; got {self.rows!r}.")

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "taylor_orders",
                "Taylor orders needed",
                f"Order of the exponential's series that misplaces at most {self.within:.0%} of the attention "
                f"({self.orders + 1}: more than {self.orders}).",
                "order",
                "is far from any linear attention",
            ),
            Column(
                "taylor_mean_order",
                "Mean Taylor order",
                "Mean order of the exponential's series under the sizes of its terms.",
                "order",
                "has large scores",
            ),
            Column(
                "taylor_error_2",
                "Error of the second order",
                "Attention that a series cut after the second order misplaces.",
                "share of attention",
                "second-order Taylor attention does not do for it",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return None if self.streams(opened) else "self-attention over words, not patches or sound"

    def streams(self, opened: Opened) -> Sequence[str]:
        return list(dict.fromkeys(s.stream for s in opened.sites if s.kind == "self" and s.stream in OF_WORDS))

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        # No stream has more tokens than the longest ids: a decoder may read more of them than its encoder.
        tensors = [v for v in prompt.inputs.values() if isinstance(v, Tensor)]
        ids = [v.shape[1] for v in tensors if v.ndim == 2 and not v.is_floating_point()]
        most = max([*ids, prompt.length])
        every = torch.arange(most).expand(most, -1)
        return [Scores(targets=every, queries=self.rows, stream=stream) for stream in self.streams(opened)]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        scores = values["scores"].transpose("layer", "head", "sample", "query", "target")
        there = scores.notnull().any(("sample", "query", "target")).values
        size = (*there.shape, self.orders + 1)
        found = {name: np.full(size, np.nan) for name in ("spectrum", "share", "error", "error_sem")}
        found |= {name: np.full(there.shape, np.nan) for name in ("mean_order", "mean_order_sem")}
        count = np.zeros(there.shape)
        for place in zip(*there.nonzero(), strict=True):
            one = HeadOrders.of(scores.values[place].reshape(-1, scores.sizes["target"]), self.orders)
            count[place] = len(one.mean_order)
            found["spectrum"][place] = one.spectrum
            found["share"][place] = one.share.mean(0)
            for name, rows in (("error", one.error), ("mean_order", one.mean_order)):
                found[name][place] = rows.mean(0)
                if len(rows) > 1:
                    found[f"{name}_sem"][place] = rows.std(0, ddof=1) / len(rows) ** 0.5
        dims = ("layer", "head", "order")
        data = {name: (dims[: x.ndim], x) for name, x in found.items()}
        data |= {
            f"{name}_count": (dims[: found[name].ndim], np.broadcast_to(count.T, found[name].T.shape).T)
            for name in ("spectrum", "share", "error", "mean_order")
        }
        place = {"layer": scores["layer"].values, "head": scores["head"].values}
        return xr.Dataset(data, place | {"order": np.arange(self.orders + 1)})

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        error = values["error"]
        return {
            "taylor_orders": orders_needed(error, self.within),
            "taylor_mean_order": values["mean_order"],
            "taylor_mean_order_sem": values["mean_order_sem"],
            "taylor_error_2": error.sel(order=2, drop=True),
            "taylor_error_2_sem": values["error_sem"].sel(order=2, drop=True),
        }

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {f"taylor_{name}": values[name] for name in ("spectrum", "share", "error")}


def orders_needed(error: xr.DataArray, within: float) -> xr.DataArray:
    """The smallest order from which on no error is above `within`; one more than the largest where there is none."""
    above = (error > within).values
    last = above.shape[-1] - 1 - above[..., ::-1].argmax(-1)
    needed = np.where(above.any(-1), last + 1, 0)
    return error.isel(order=0, drop=True).copy(data=needed.astype(float)).where(error.notnull().all("order"))


@dataclass(frozen=True, eq=False)
class HeadOrders:
    """What some rows of one head's scores say."""

    spectrum: Float[np.ndarray, " order"]
    share: Float[np.ndarray, "row order"]
    error: Float[np.ndarray, "row order"]
    mean_order: Float[np.ndarray, " row"]

    @classmethod
    def of(cls, scores: Float[np.ndarray, "row key"], orders: int) -> HeadOrders:
        """Scores that are nan or -inf are of keys the query does not see; rows that see nothing are left out."""
        seen = np.isfinite(scores)
        scores, seen = scores[seen.any(1)].astype(float), seen[seen.any(1)]
        total, share, error, mean = np.zeros(orders + 1), [], [], []
        for rows in blocks(seen.sum(1)):
            s = scores[rows][seen[rows]]
            count = seen[rows].sum(1)
            start = np.r_[0, count.cumsum()[:-1]]
            size = np.abs(s)
            terms, sums = series(s, orders)
            terms = np.abs(terms)
            total += terms.sum(1)
            # |s|^n / n! is e^|s| times a Poisson law of mean |s|: a row's share is these laws, mixed by softmax(|s|).
            mix = softmax(size, start, count)
            share.append(np.add.reduceat(terms * (mix * np.exp(-size)), start, axis=1).T)
            mean.append(np.add.reduceat(mix * size, start))
            error.append(misplaced(sums, softmax(s, start, count), start, count).T)
        return cls(total / seen.sum(), np.concatenate(share), np.concatenate(error), np.concatenate(mean))


def blocks(counts: Sequence[int]) -> Iterator[slice]:
    """Rows in blocks of about `AT_ONCE` scores."""
    start, held = 0, 0
    for row, count in enumerate(counts):
        if held and held + count > AT_ONCE:
            yield slice(start, row)
            start, held = row, 0
        held += count
    yield slice(start, len(counts))


def series(
    scores: Float[np.ndarray, " score"], orders: int
) -> tuple[Float[np.ndarray, "order score"], Float[np.ndarray, "order score"]]:
    """`s^n / n!` and `T_n(s)` for n = 0, ..., orders.

    Where the terms alternate and already fall (s < 0, n >= |s|) adding them up from the front would leave only the
    rounding of the largest: there `T_n(s) = exp(s) - (the terms after n)`, added up from the back, from where they no
    longer count."""
    lowest = min(orders, max(0.0, -scores.min()))
    order = np.arange(1, orders + 25 + int(0.75 * lowest))
    terms = np.concatenate([np.ones((1, len(scores))), scores / order[:, None]]).cumprod(0)
    sums = terms[: orders + 1].cumsum(0)
    falls = (scores < 0) & (-scores <= np.arange(orders + 1)[:, None])
    after = terms[:0:-1].cumsum(0)[::-1][: orders + 1]
    return terms[: orders + 1], np.where(falls, np.exp(np.minimum(scores, 0)) - after, sums)


def misplaced(
    sums: Float[np.ndarray, "order score"],
    weights: Float[np.ndarray, " score"],
    start: np.ndarray,
    count: np.ndarray,
) -> Float[np.ndarray, "order row"]:
    """Half the L1 distance between the weights of the cut series and the softmax's, at most 1."""
    total = np.add.reduceat(sums, start, axis=1)
    cut = sums / np.where(total > 0, total, np.inf).repeat(count, 1)
    distance = np.add.reduceat(np.abs(cut - weights), start, axis=1) / 2
    return np.where(total > 0, np.minimum(distance, 1), 1.0)


def softmax(x: Float[np.ndarray, " score"], start: np.ndarray, count: np.ndarray) -> Float[np.ndarray, " score"]:
    """Each row's softmax."""
    e = np.exp(x - np.maximum.reduceat(x, start).repeat(count))
    return e / np.add.reduceat(e, start).repeat(count)
