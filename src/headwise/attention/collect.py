"""From the sums of a block of rows to the values of the readings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.attention.dense import BLOCKED, Values, propagate_rows, reading_places
from headwise.attention.mask import cut
from headwise.attention.places import place_scores
from headwise.attention.readings import (
    RELATIVE_LAGS,
    At,
    Distance,
    Entropy,
    LogSumExp,
    Map,
    Mass,
    Propagate,
    Reading,
    Received,
    Scores,
    SegmentEntropy,
    Top,
    concrete,
)

if TYPE_CHECKING:
    from headwise.attention.block import Block
    from headwise.attention.stream import Sweep


class Collector:
    """Holds the results of one call: `out`, and for every reading its variables, filled block by block."""

    def __init__(self, sweep: Sweep, readings: Sequence[Reading]):
        self.sweep, self.readings = sweep, readings
        call = self.call = sweep.call
        self.out = self._new(call.v.shape[-1]) if sweep.wants.output else None
        self.values: dict[Reading, Values] = {}
        self.places: dict[Reading, tuple[Tensor, Tensor, Tensor]] = {}
        for reading in readings:
            self.values[reading] = self._empty(reading)

    def _new(self, *last: int, fill: float = 0.0, dtype: torch.dtype | None = None, along: int | None = None) -> Tensor:
        call = self.call
        shape = (call.batch, call.heads, call.queries if along is None else along, *last)
        return torch.full(shape, fill, dtype=dtype or self.sweep.dtype, device=call.q.device)

    def _empty(self, reading: Reading) -> Values:
        call, new = self.call, self._new
        known = call.labels.names if call.labels else ()
        if isinstance(reading, (Mass, SegmentEntropy)):
            return {reading.variables[0]: new(len(concrete(reading.segments, known)))}
        if isinstance(reading, Top):
            return {"top_value": new(reading.k), "top_index": new(reading.k, fill=-1, dtype=torch.long)}
        if isinstance(reading, (Received, Propagate)) and not (
            isinstance(reading, Propagate) and reading.side == "right"
        ):
            last = (reading.x.shape[1],) if isinstance(reading, Propagate) else ()
            return {name: new(*last, along=call.keys) for name in reading.variables}
        if isinstance(reading, Propagate):
            return {"propagate": new(reading.x.shape[1])}
        if isinstance(reading, Map):
            return {"map": new(call.keys)}
        if isinstance(reading, (At, Scores)):
            places = self.places[reading] = reading_places(reading, call)
            fill = 0.0 if isinstance(reading, At) else float("nan")
            last = () if reading.kind == "pair" else (places[1].shape[2],)
            return {reading.variables[0]: new(*last, fill=fill, along=len(places[0]))}
        return {name: new() for name in reading.variables}

    def take(self, rows: slice, block: Block, factors: list[Tensor]) -> None:
        """Reads one finished block of rows."""
        riders = self._split(block)
        if self.out is not None:
            self.out[:, :, rows] = riders["output"] * block.share[..., None]
        for reading in self.readings:
            values = self.values[reading]
            if isinstance(reading, Mass) and self.label_places(reading) is not None:
                chosen = riders["labels"][..., self.label_places(reading)]
                values["mass"][:, :, rows] = chosen * block.share[..., None]
            elif isinstance(reading, Mass):
                for number, name in enumerate(
                    concrete(reading.segments, self.call.labels.names if self.call.labels else ())
                ):
                    values["mass"][:, :, rows, number] = self._mass(name, rows, block, factors, riders)
            elif isinstance(reading, Entropy):
                spread = block.sums.get("spread", block.mass * 0)
                nats = (spread + (block.m - block.base) * block.mass) * math.log(2)
                values["entropy"][:, :, rows] = -block.share * nats
            elif isinstance(reading, SegmentEntropy):
                values["segment_entropy"][:, :, rows] = self._inner(reading, block)
            elif isinstance(reading, Distance):
                for name in reading.variables:
                    values[name][:, :, rows] = block.sums.get(name, block.mass * 0) * block.share
            elif isinstance(reading, LogSumExp):
                values["lse"][:, :, rows] = block.lse
            elif isinstance(reading, Top) and reading.k == 1:
                if block.top is not None and block.place is not None:
                    seen = block.top > BLOCKED
                    values["top_value"][:, :, rows, 0] = (block.top - block.base).exp2().masked_fill(~seen, 0.0)
                    values["top_index"][:, :, rows, 0] = torch.where(seen, block.place + self.call.j0, -1)
            elif isinstance(reading, Propagate) and reading.side == "right":
                values["propagate"][:, :, rows] = riders[id(reading)] * block.share[..., None]
            elif isinstance(reading, (At, Scores)):
                self._at(reading, rows, block, factors)
        if self.sweep.wants.second:
            self._second(rows, block, factors)

    def label_places(self, reading: Mass) -> slice | list[int] | None:
        """Where a Mass of labels only has its segments among the riders."""
        labels = self.sweep.wants.labels
        names = concrete(reading.segments, self.call.labels.names if self.call.labels else ())
        if not set(names) <= set(labels):
            return None
        return slice(None) if list(names) == labels else [labels.index(n) for n in names]

    def _split(self, block: Block) -> dict[str | int, Tensor]:
        """The parts of the block's one product: output, masses, columns."""
        wants, sizes = self.sweep.wants, self.sweep.sizes
        shape = block.m.shape
        whole = block.sums.get("riders")
        parts = [block.m.new_zeros(*shape, n) for n in sizes] if whole is None else list(whole.split(sizes, -1))
        riders: dict[str | int, Tensor] = {}
        if wants.output:
            riders["output"] = parts.pop(0)
        parts.pop(0)  # the weights' own sum
        if wants.labels:
            riders["labels"] = parts.pop(0)
        for reading in wants.columns:
            riders[id(reading)] = parts.pop(0)
        return riders

    def _mass(
        self, name: str, rows: slice, block: Block, factors: list[Tensor], riders: dict[str | int, Tensor]
    ) -> Tensor:
        if name in self.sweep.wants.labels:
            return riders["labels"][..., self.sweep.wants.labels.index(name)] * block.share
        if name in self.sweep.wants.windows:
            return block.sums.get(name, block.mass * 0) * block.share
        call = self.call
        j = call.i[rows] - RELATIVE_LAGS[name] - call.j0
        there = (j >= 0) & (j < call.keys) & (j + call.j0 >= 0)
        j = j.clamp(0, call.keys - 1)[None, :, None].expand(call.batch, -1, 1)
        s = place_scores(self.sweep.effects, rows, j, factors, self.sweep.dtype)[..., 0]
        return torch.where(there & (block.share > 0), (s - block.base * math.log(2)).exp(), 0.0)

    def _inner(self, reading: SegmentEntropy, block: Block) -> Tensor:
        names = concrete(reading.segments, self.call.labels.names if self.call.labels else ())
        if "inner" not in block.sums:
            return block.m.new_zeros(*block.m.shape, len(names))
        chosen = [self.sweep.wants.inner.index(n) for n in names]
        mass, spread = block.sums["inner_mass"][..., chosen], block.sums["inner"][..., chosen]
        there = (mass > 0) & (block.share[..., None] > 0)
        safe = torch.where(there, mass, 1.0)
        return torch.where(there, safe.log() - math.log(2) * spread / safe, 0.0)

    def _at(self, reading: At | Scores, rows: slice, block: Block, factors: list[Tensor]) -> None:
        where, columns, there = self.places[reading]
        target = self.values[reading][reading.variables[0]]
        # A pair may ask for any query: those of this block, at their places in it.
        inside = ((where >= rows.start) & (where < rows.stop)).nonzero().flatten()
        if not len(inside):
            return
        local = where[inside] - rows.start
        mine = [f[:, :, local] for f in factors] if isinstance(reading, At) else []
        s = place_scores(self.sweep.effects, where[inside], columns[:, inside], mine, self.sweep.dtype)
        exists = there[:, None, inside] & (s > BLOCKED)
        if isinstance(reading, At):
            alive = block.share[:, :, local, None] > 0
            read = torch.where(exists & alive, (s - block.base[:, :, local, None] * math.log(2)).exp(), 0.0)
        else:
            read = torch.where(exists, s, float("nan"))
        target[:, :, inside] = read[..., 0] if reading.kind == "pair" else read

    def _second(self, rows: slice, block: Block, factors: list[Tensor]) -> None:
        call = self.call
        valid = call.valid()[:, rows].to(self.sweep.dtype)
        for start, stop, a in self.sweep.finished(rows, block, factors):
            end = min(stop, call.keys)
            a = a[..., : end - start]
            for reading in self.sweep.wants.second:
                values = self.values[reading]
                if isinstance(reading, Map):
                    values["map"][:, :, rows, start:end] = a
                elif isinstance(reading, Received):
                    values["received"][:, :, start:end] += torch.einsum("bhij,bi->bhj", a, valid)
                    values["received_visible"][:, :, start:end] += self._visible(rows, valid, start, end)
                elif isinstance(reading, Propagate):
                    x = propagate_rows(reading, call)[rows].to(self.sweep.dtype)
                    values["propagate"][:, :, start:end] += torch.einsum("bhij,bi,ic->bhjc", a, valid, x)
                elif isinstance(reading, Top):
                    self._merge_top(values, rows, a, start)

    def _visible(self, rows: slice, valid: Tensor, start: int, end: int) -> Tensor:
        call = self.call
        seen = valid[:, None, :, None].expand(-1, 1, -1, end - start)
        added = self.sweep.added
        if added is not None:
            seen = seen * (cut(added, rows, start, end) > BLOCKED)
        for a, b, part in call.mask.parts(call.i[rows], rows, call.j0, start, end):
            seen = seen.expand(-1, max(seen.shape[1], part.shape[1]), -1, -1).clone()
            seen[..., a - start : b - start] *= part
        return seen.sum(2)

    def _merge_top(self, values: Values, rows: slice, a: Tensor, start: int) -> None:
        k = values["top_value"].shape[-1]
        value, index = a.sort(dim=-1, descending=True, stable=True)
        value, index = value[..., :k], index[..., :k] + start + self.call.j0
        index = torch.where(value > 0, index, -1)
        value = torch.cat([values["top_value"][:, :, rows], value], -1)
        index = torch.cat([values["top_index"][:, :, rows], index], -1)
        value, order = value.sort(dim=-1, descending=True, stable=True)
        values["top_value"][:, :, rows] = value[..., :k]
        values["top_index"][:, :, rows] = index.gather(-1, order)[..., :k]
