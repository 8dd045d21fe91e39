"""Where values of many calls become one labelled result.

`per="query"` keeps every row with its absolute position, so that a prompt and the steps generated after it are one
sequence; `per="head"` keeps a running count, mean and sum of squares, so that a corpus needs no more than a page.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.attention.engine import Part
from headwise.attention.once import on
from headwise.attention.readings import At, Inputs, Mass, Propagate, Reading, Received, Scores, SegmentEntropy, concrete
from headwise.models.anatomy import Site

if TYPE_CHECKING:
    import xarray as xr


PAGES = 2**17
"""Bytes from which memory is worth pages of its own."""


@dataclass
class Chunk:
    """Values [batch, head, place, ...] of one call: which samples, heads and places (positions) they are for."""

    layer: int
    number: int
    start: int
    heads: list[int]
    places: np.ndarray
    values: np.ndarray
    extra: list[Any] | None


class Shelf:
    """Room for the values of all layers of a forward at once, in memory of its own.

    Values that stay, allocated one by one among a forward's large temporaries, would pin the C heap: after 30 layers of
    4,096 tokens it held 1 GB of holes."""

    def __init__(self, slots: int, x: Tensor):
        self.array = own_memory((slots, *x.shape), x.dtype)
        self.used = 0

    def fits(self, x: Tensor) -> bool:
        return self.used < len(self.array) and x.shape == self.array.shape[1:] and x.dtype == self.array.dtype

    def put(self, x: Tensor) -> np.ndarray:
        self.array[self.used].copy_(x)
        self.used += 1
        return self.array[self.used - 1].numpy()


def own_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a large one in pages of its own, which go back to the system with it."""
    count = math.prod(shape)
    if count * dtype.itemsize < PAGES:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, count * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


@dataclass
class Moments:
    """Running count, mean and sum of squared deviations, [head, ...]; grows when a call brings more places."""

    heads: list[int]
    count: Tensor
    mean: Tensor
    m2: Tensor

    def merge(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        shape = tuple(max(a, b) for a, b in zip(self.count.shape, count.shape, strict=True))
        mine = [grown(x, shape) for x in (self.count, self.mean, self.m2)]
        other = [grown(x, shape) for x in (count, mean, m2)]
        total = mine[0] + other[0]
        share = torch.where(total > 0, other[0] / total.clamp(min=1), 0.0)
        gap = other[1] - mine[1]
        self.mean = mine[1] + gap * share
        self.m2 = mine[2] + other[2] + gap**2 * mine[0] * share
        self.count = total


def grown(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    pad: list[int] = []
    for size, wanted in zip(reversed(x.shape), reversed(shape), strict=True):
        pad += [0, wanted - size]
    return torch.nn.functional.pad(x, pad)


@dataclass
class Tally:
    """All values of one run. `layers`: how many attention layers a stream has."""

    layers: dict[str, int] = field(default_factory=dict)
    chunks: dict[tuple[str, Reading, str], list[Chunk]] = field(default_factory=lambda: defaultdict(list))
    moments: dict[tuple[str, Reading, str], dict[tuple[int, int], Moments]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    extras: dict[tuple[str, Reading, str], list[Any]] = field(default_factory=dict)
    shelves: dict[tuple[str, Reading, str], Shelf] = field(default_factory=dict)
    totals: dict[tuple[str, int], int] = field(default_factory=dict)
    starts: dict[tuple[str, int], int] = field(default_factory=dict)
    _tree: Any = None

    @property
    def empty(self) -> bool:
        return not self.chunks and not self.moments

    def start(self, site: str, number: int, batch: int, continued: bool) -> int:
        """The number of this call's first sample: the last one's again while a cache continues it."""
        key = (site, number)
        if not (continued and key in self.starts):
            self.starts[key] = self.totals.get(key, 0)
            self.totals[key] = self.starts[key] + batch
        return self.starts[key]

    def add(
        self, part: Part, site: Site, number: int, start: int, call: AttentionCall, values: dict[str, Tensor]
    ) -> None:
        self._tree = None
        reading = part.reading
        heads = list(range(call.heads)) if part.heads is None else list(part.heads)
        if isinstance(reading, Inputs) and reading.moments:
            values = {f"{name}_mean": x for name, x in values.items()}
        for name, x in values.items():
            extra = extra_labels(reading, call, x)
            key = (site.stream, reading, name)
            if extra is not None and len(extra) >= len(self.extras.get(key, [])):
                self.extras[key] = extra
            along, places = where(reading, name, part, call, x)
            if reading.per == "head" or (isinstance(reading, Inputs) and reading.moments):
                if name != "top_index":
                    self._fold(key, site, number, heads, along, part, call, x)
                continue
            if along == "query":
                x = without_padding(x, part, call)
            self.chunks[key].append(Chunk(site.layer, number, start, heads, places, self._shelve(key, x), extra))

    def _shelve(self, key: tuple[str, Reading, str], x: Tensor) -> np.ndarray:
        shelf = self.shelves.get(key)
        if shelf is None or not shelf.fits(x):
            layers = key[1].chosen_layers
            slots = self.layers.get(key[0], 1) if layers is None else len(layers)
            shelf = self.shelves[key] = Shelf(slots, x)
        return shelf.put(x.detach())

    def _fold(
        self,
        key: tuple,
        site: Site,
        number: int,
        heads: list[int],
        along: str,
        part: Part,
        call: AttentionCall,
        x: Tensor,
    ) -> None:
        x = x.detach().double()
        valid = call.valid()
        if along == "query":
            valid = valid if part.rows is None else valid[:, on(part.rows, valid.device)]
            if valid.shape[1] != x.shape[2]:
                valid = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
            over: tuple[int, ...] = (0, 2)
        else:
            valid = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
            over = (0,)
        if isinstance(part.reading, Inputs) and part.reading.moments:
            self._covariance(key, site, number, heads, x, valid)
        there = valid[:, None, :].reshape(valid.shape[0], 1, valid.shape[1], *(1,) * (x.ndim - 3)) & ~x.isnan()
        count = there.sum(over).double()
        total = torch.where(there, x, 0.0).sum(over)
        mean = total / count.clamp(min=1)
        centre = mean.unsqueeze(0).unsqueeze(2) if len(over) == 2 else mean.unsqueeze(0)
        m2 = torch.where(there, (x - centre) ** 2, 0.0).sum(over)
        self._merge(key, site, number, heads, count.expand_as(mean), mean, m2)

    def _covariance(self, key: tuple, site: Site, number: int, heads: list[int], x: Tensor, valid: Tensor) -> None:
        """Second moments about the running mean, as an outer product [head, channel, channel]."""
        stream, reading, name = key
        rows = torch.where(valid[:, None, :, None], x, 0.0)
        count = valid.sum().double()
        mean = rows.sum((0, 2)) / count.clamp(min=1)
        centred = torch.where(valid[:, None, :, None], x - mean[None, :, None], 0.0)
        outer = torch.einsum("bhtc,bhtd->hcd", centred, centred)
        place = self.moments[(stream, reading, name.replace("_mean", "_cov"))]
        old = place.get((site.layer, number))
        if old is None:
            place[(site.layer, number)] = Moments(
                heads, count.expand(outer.shape), mean[..., None].expand(outer.shape), outer
            )
            return
        gap = mean - old.mean[..., 0]
        n, m = old.count.flatten()[0], count
        old.m2 = old.m2 + outer + torch.einsum("hc,hd->hcd", gap, gap) * n * m / (n + m)
        old.mean = (old.mean[..., 0] + gap * m / (n + m))[..., None].expand(outer.shape)
        old.count = (n + m).expand(outer.shape)

    def _merge(
        self, key: tuple, site: Site, number: int, heads: list[int], count: Tensor, mean: Tensor, m2: Tensor
    ) -> None:
        place = self.moments[key]
        old = place.get((site.layer, number))
        if old is None:
            place[(site.layer, number)] = Moments(heads, count, mean, m2)
        else:
            old.merge(count, mean, m2)

    def tree(self, sites: dict[str, Site]) -> xr.DataTree:
        if self._tree is None:
            from headwise.attention.tree import build

            self._tree = build(self, sites)
            self.shelves.clear()
        return self._tree


def without_padding(x: Tensor, part: Part, call: AttentionCall) -> Tensor:
    """Rows of padding are no queries: nan, or -1 for places."""
    if call.query_valid is None:
        return x
    valid = call.valid() if part.rows is None else call.valid()[:, on(part.rows, x.device)]
    if valid.shape[1] != x.shape[2] or bool(valid.all()):
        return x
    gone = ~valid.reshape(len(valid), 1, -1, *(1,) * (x.ndim - 3))
    return x.masked_fill(gone, float("nan") if x.is_floating_point() else -1)


def extra_labels(reading: Reading, call: AttentionCall, x: Tensor) -> list[Any] | None:
    """The coordinate of the last dim, where it has one."""
    if isinstance(reading, (Mass, SegmentEntropy)):
        return list(concrete(reading.segments, call.labels.names if call.labels else ()))
    if isinstance(reading, (At, Scores)) and reading.kind == "lag":
        return list(reading.lags or ())  # type: ignore[arg-type]
    return None


def where(reading: Reading, name: str, part: Part, call: AttentionCall, x: Tensor) -> tuple[str, np.ndarray]:
    """What dim 2 of the values runs along, and its positions."""
    if isinstance(reading, Received) or (isinstance(reading, Propagate) and reading.side == "left"):
        return "key", np.arange(call.keys) + call.j0
    if isinstance(reading, (At, Scores)) and reading.kind == "pair":
        return "pair", np.arange(x.shape[2])
    positions = call.places if part.rows is None else call.places[part.rows]
    if isinstance(reading, Inputs) and not name.startswith("input_q") and x.shape[2] != len(positions):
        return "query", np.arange(call.keys) + call.j0
    return "query", positions.numpy()
