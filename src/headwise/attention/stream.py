"""The same as `dense.py`, in blocks of queries and keys: any device, memory linear in the length.

For a block of queries the keys are walked in tiles with a running maximum m, normaliser l and sums; the sums that are
linear in the weights (output, masses, distances) ride along in one matrix product. The tile is worked on in place while
it is in cache. Readings that need the finished weights (column sums, rows, top k) walk the tiles a second time.

Inside a sweep, scores are in units of log 2: on a CPU `exp2` costs half of `exp`, and a tenth of it where `exp` meets
masked or very small entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import local

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention.block import LANE, LOG2E, Block
from headwise.attention.call import AttentionCall
from headwise.attention.collect import Collector
from headwise.attention.dense import Values, propagate_rows
from headwise.attention.effects import Bias, Effects, Weigh, key_set
from headwise.attention.mask import cut
from headwise.attention.parallel import in_parallel
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

NEG = -1e30
"""Stands for -inf inside a tile, where 0 * -inf would be nan."""
TILE = 1024
ROWS = 128
COLUMNS = 8
"""The product that carries the riders is quickest when it is a multiple of this wide (a third, for 75 against 80)."""
BUFFER = 2**20
"""Entries of one tile over all samples and heads: every worker holds two such buffers."""
PARALLEL_PLACES = 2**14
"""Query-key pairs a head from which threads are worth starting."""
_kept = local()
"""Each thread's two buffers, kept between calls: fresh memory costs as much as the work on it."""


@dataclass
class Wants:
    """What the sweep has to keep, read off the readings."""

    output: bool
    labels: list[str] = field(default_factory=list)
    windows: list[str] = field(default_factory=list)
    lags: list[str] = field(default_factory=list)
    columns: list[Propagate] = field(default_factory=list)
    entropy: bool = False
    inner: list[str] = field(default_factory=list)
    distance: bool = False
    top: bool = False
    second: list[Reading] = field(default_factory=list)
    places: list[At | Scores] = field(default_factory=list)

    @classmethod
    def of(cls, call: AttentionCall, readings: Sequence[Reading], output: bool) -> Wants:
        wants = cls(output)
        known = call.labels.names if call.labels else ()
        for reading in readings:
            if isinstance(reading, Mass):
                for name in concrete(reading.segments, known):
                    kind = (
                        wants.labels
                        if name in known or name == "first"
                        else wants.lags
                        if name in RELATIVE_LAGS
                        else wants.windows
                    )
                    if name not in kind:
                        kind.append(name)
            elif isinstance(reading, SegmentEntropy):
                for name in concrete(reading.segments, known):
                    wants.inner += [name] * (name not in wants.inner)
                    wants.labels += [name] * (name not in wants.labels)
            elif isinstance(reading, Entropy):
                wants.entropy = True
            elif isinstance(reading, Distance):
                wants.distance = True
            elif isinstance(reading, Top) and reading.k == 1:
                wants.top = True
            elif isinstance(reading, (At, Scores)):
                wants.places.append(reading)
            elif isinstance(reading, Propagate) and reading.side == "right":
                wants.columns.append(reading)
            elif isinstance(reading, (Top, Received, Propagate, Map)):
                wants.second.append(reading)
            elif not isinstance(reading, LogSumExp):
                raise TypeError(f"{type(reading).__name__} is not read off the weights.")
        return wants


class Sweep:
    """One call, walked block by block. Every row-wise tensor of a block is [batch, heads, row]."""

    def __init__(self, effects: Effects, wants: Wants, workers: int = 1):
        call = effects.call
        self.effects, self.call, self.wants = effects, call, wants
        self.dtype = call.q.dtype if call.q.dtype == torch.float64 else torch.float32
        kv = call.k.shape[1]
        self.width = -(-call.keys // LANE) * LANE
        pad = (0, 0, 0, self.width - call.keys)
        self.k = torch.nn.functional.pad(call.k.to(self.dtype), pad).flatten(0, 1).transpose(1, 2)
        # Where nothing happens to the scores in their own units, the change of units costs nothing.
        self.plain = not effects.changes_scores and all(x is None for x in (call.softcap, call.bias, call.mask.added))
        scale = call.scale * LOG2E if self.plain else call.scale
        self.q = (call.q.to(self.dtype) * scale).unflatten(1, (kv, call.group))
        members = [key_set(call, n).mask.expand(call.batch, -1) for n in wants.labels]  # type: ignore[union-attr]
        riders = [torch.ones(call.batch, call.keys, 1, dtype=self.dtype, device=call.q.device)]
        riders += [torch.stack(members, -1).to(self.dtype)] if members else []
        riders += [propagate_rows(r, call).to(self.dtype)[None].expand(call.batch, -1, -1) for r in wants.columns]
        if wants.distance:
            # Distance to the end of the tile: |i - j| of a query after the tile is the sum of two positive parts.
            left = (TILE - 1 - torch.arange(call.keys, device=call.q.device) % TILE).to(self.dtype)
            riders.append(torch.stack([left, left**2], -1)[None].expand(call.batch, -1, -1))
            self.positions = torch.arange(call.j0, call.j0 + self.width, dtype=self.dtype, device=call.q.device)
        parts = [call.v.to(self.dtype)] if wants.output else []
        parts += [r[:, None].expand(-1, kv, -1, -1) for r in riders]
        self.sizes = [p.shape[-1] for p in parts]
        wide = sum(self.sizes)
        self.sizes.append(-wide % COLUMNS)
        self.riders = call.v.new_zeros((call.batch, kv, self.width, wide + self.sizes[-1]), dtype=self.dtype)
        self.riders[:, :, : call.keys, :wide] = torch.cat(parts, -1)
        self.riders = self.riders.flatten(0, 1)
        inner = [members[wants.labels.index(n)].to(self.dtype) for n in wants.inner]
        self.inner = torch.nn.functional.pad(torch.stack(inner, -1), pad) if inner else None
        added = call.mask.added
        self.added = None if added is None else added.to(self.dtype).clamp(min=NEG)
        self.vectors = [
            None if b.vector is None else (b.vector.to(self.dtype) * b.value).clamp(min=NEG) for b in effects.biases
        ]
        # Enough blocks that all workers are busy to the end, of at most a buffer each.
        rows = BUFFER // (call.batch * call.heads * min(TILE, self.width))
        share = -(-call.queries // (2 * workers)) if workers > 1 else ROWS
        self.rows = max(8, min(ROWS, rows, share))
        self.size = call.batch * call.heads * min(self.rows, call.queries) * min(TILE, self.width)

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.call.queries, self.rows):
            yield slice(start, min(start + self.rows, self.call.queries))

    def tiles(self, rows: slice) -> list[tuple[int, int]]:
        call = self.call
        start, stop = call.mask.extent(call.i[rows], call.j0, call.keys)
        if start >= stop:
            return []
        start, stop = start // LANE * LANE, -(-stop // LANE) * LANE
        cuts = [start, *range((start // TILE + 1) * TILE, stop, TILE), stop]
        return list(pairwise(cuts))

    def buffer(self, number: int, rows: slice, width: int) -> Tensor:
        kept: list[Tensor] = getattr(_kept, "buffers", [])
        if not kept or len(kept[0]) < self.size or kept[0].dtype != self.dtype or kept[0].device != self.q.device:
            with torch.inference_mode(False):
                kept = [torch.empty(self.size, dtype=self.dtype, device=self.q.device) for _ in range(2)]
            _kept.buffers = kept
        shape = (self.call.batch, self.call.heads, rows.stop - rows.start, width)
        return kept[number][: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)

    def scores(self, rows: slice, start: int, stop: int, factors: list[Tensor]) -> Tensor:
        """The edited, masked scores of one tile, in the first buffer, in units of log 2:
        [batch, heads, row, column]."""
        call, effects = self.call, self.effects
        s = self.buffer(0, rows, stop - start)
        kv = call.k.shape[1]
        q = self.q[:, :, :, rows].reshape(call.batch * kv, -1, call.q.shape[-1])
        torch.bmm(q, self.k[..., start:stop], out=s.view(call.batch * kv, -1, stop - start))
        if call.softcap is not None:
            s.div_(call.softcap).tanh_().mul_(call.softcap)
        end = min(stop, call.keys)
        body = s[..., : end - start]
        if call.bias is not None:
            body += cut(call.bias, rows, start, end).to(self.dtype)
        i = call.i[rows]
        for change in effects.maps:
            part = body[:, change.heads]
            chosen = torch.ones((), dtype=torch.bool, device=s.device)
            if change.keys is not None:
                chosen = chosen & change.keys.block(i, call.j0, start, end)
            if change.queries is not None:
                chosen = chosen & change.queries[:, None, rows, None]
            j = torch.arange(start, end, device=s.device) + call.j0
            body[:, change.heads] = torch.where(chosen, change(part, i[:, None], j), part)
        for bias, vector in zip(effects.biases, self.vectors, strict=True):
            self._bias(body, bias, vector, rows, i, start, end)
        for factor, weigh in zip(factors, effects.weighs, strict=False):
            self._factor(body, factor, weigh, i, start, end)
        if self.added is not None:
            body += cut(self.added, rows, start, end)
        if not self.plain:
            body *= LOG2E
        for a, b, seen in call.mask.parts(i, rows, call.j0, start, end):
            s[..., a - start : b - start].masked_fill_(~seen, NEG)
        if end < stop:
            s[..., end - start :] = NEG
        return s

    def _bias(
        self, body: Tensor, bias: Bias, vector: Tensor | None, rows: slice, i: Tensor, start: int, end: int
    ) -> None:
        step: Tensor | float = max(bias.value, NEG) if vector is None else vector[start:end]
        chosen = None if bias.keys is None else bias.keys.block(i, self.call.j0, start, end)
        if bias.queries is not None:
            of = bias.queries[:, None, rows, None]
            chosen = of if chosen is None else chosen & of
        step = torch.as_tensor(step, dtype=self.dtype, device=body.device)
        step = step if chosen is None else torch.where(chosen, step, 0.0)
        if len(bias.heads) == self.call.heads:
            body += step
        else:
            body[:, bias.heads] += step

    def _factor(self, body: Tensor, factor: Tensor, weigh: Weigh, i: Tensor, start: int, end: int) -> None:
        """Reweight as a bias: the log of each row's factor for the keys of each group."""
        part = body[:, weigh.heads]
        for number, group in enumerate(weigh.groups):
            chosen = group.block(i, self.call.j0, start, end)
            part = torch.where(chosen, part + factor[..., number, None], part)
        body[:, weigh.heads] = part

    def sweep(self, rows: slice, factors: list[Tensor], lse: Tensor | None = None, full: bool = True) -> Block:
        """One walk over the keys. With `lse` given, weights are exp(s - lse): Reweight keeps the old normaliser."""
        call = self.call
        shape = (call.batch, call.heads, rows.stop - rows.start)
        block = Block(self.q.new_full(shape, NEG), self.q.new_zeros(shape), self.q.new_zeros(shape))
        if call.sinks is not None:
            block.m = (call.sinks.to(self.dtype) * LOG2E)[None, :, None].expand(shape).clone()
            block.total += 1
        i = call.i[rows]
        block.tiles = self.tiles(rows)
        for start, stop in block.tiles:
            s = self.scores(rows, start, stop, factors)
            high = block.find_top(s, start) if full and self.wants.top else s.amax(-1)
            if start == block.tiles[0][0] and call.sinks is None:
                block.m = high
            else:
                block.raise_to(torch.maximum(block.m, high))
            t = s.sub_(block.m[..., None])
            p = torch.exp2(t, out=self.buffer(1, rows, stop - start))
            amount = self._collect(block, p, t, i, start, stop) if full else p.sum(-1)
            block.total += amount
            block.mass += amount
        block.close(lse)
        return block

    def _collect(self, block: Block, p: Tensor, t: Tensor, i: Tensor, start: int, stop: int) -> Tensor:
        """Adds one tile to the sums; returns its mass. `t` is s - m and may be overwritten."""
        call, wants = self.call, self.wants
        flat = p.view(self.riders.shape[0], -1, stop - start)
        carried = torch.bmm(flat, self.riders[:, start:stop]).view(*p.shape[:-1], -1)
        amount = carried[..., self.sizes[0] * wants.output]
        wide = sum(self.sizes[:-1])
        block.add("riders", carried)
        for name in wants.windows:
            inside = key_set(call, name).block(i, call.j0, start, stop)
            block.add(name, (p * inside).sum(-1) if inside.any() else torch.zeros_like(block.m))
        if wants.entropy or self.inner is not None:
            spread = t.mul_(p)
            block.add("spread", spread.sum(-1))
            if self.inner is not None:
                block.add("inner", torch.einsum("bhij,bjg->bhig", spread, self.inner[:, start:stop]))
                block.add("inner_mass", torch.einsum("bhij,bjg->bhig", p, self.inner[:, start:stop]))
        end = (start // TILE + 1) * TILE - 1 + call.j0
        if wants.distance and int(i.min()) >= end:
            past = (i - end).to(self.dtype)
            first, second = carried[..., wide - 2], carried[..., wide - 1]
            block.add("distance", past * amount + first)
            block.add("distance_sq", past**2 * amount + 2 * past * first + second)
        elif wants.distance:
            gap = (i.to(self.dtype)[:, None] - self.positions[start:stop]).abs_()
            moment = torch.mul(p, gap, out=t)
            block.add("distance", moment.sum(-1))
            block.add("distance_sq", moment.mul_(gap).sum(-1))
        return amount

    def finished(
        self, rows: slice, block: Block, factors: list[Tensor], reuse: bool = True
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The finished weights, tile by tile: start, stop, a [batch, heads, row, column]. With one tile only, the
        sweep's own is still in the buffer (`reuse`)."""
        if reuse and len(block.tiles) == 1:
            start, stop = block.tiles[0]
            yield start, stop, self.buffer(1, rows, stop - start).mul_(block.share[..., None])
            return
        for start, stop in block.tiles:
            t = self.scores(rows, start, stop, factors).sub_(block.base[..., None])
            yield start, stop, torch.exp2(t, out=self.buffer(1, rows, stop - start))

    def factors(self, rows: slice) -> tuple[list[Tensor], Tensor | None]:
        """Reweight: the log of every rule's factors [batch, heads chosen, row, group], and the normaliser they keep.
        Each rule sees the masses its forerunners left."""
        if not self.effects.weighs:
            return [], None
        block = self.sweep(rows, [], full=False)
        i, found = self.call.i[rows], []  # type: tuple[Tensor, list[Tensor]]
        for weigh in self.effects.weighs:
            masses = self.q.new_zeros(self.call.batch, len(weigh.heads), rows.stop - rows.start, len(weigh.groups))
            for start, stop, a in self.finished(rows, block, found, reuse=False):
                end = min(stop, self.call.keys)
                part = a[:, weigh.heads, :, : end - start]
                for number, group in enumerate(weigh.groups):
                    masses[..., number] += (part * group.block(i, self.call.j0, start, end)).sum(-1)
            log = weigh.edit.weights(masses).log().clamp(min=NEG)
            found.append(log if weigh.queries is None else torch.where(weigh.queries[:, None, rows, None], log, 0.0))
        return found, block.lse


def stream(
    effects: Effects, readings: Sequence[Reading], output: bool = True
) -> tuple[Float[Tensor, "batch heads query value_dim"] | None, dict[Reading, Values]]:
    """The heads' outputs before Blend and HeadGain (None if not wanted), and the values of the readings."""
    wants = Wants.of(effects.call, readings, output)
    workers = threads(effects.call, wants)
    sweep = Sweep(effects, wants, workers)
    collector = Collector(sweep, readings)

    def walk(rows: slice) -> None:
        factors, lse = sweep.factors(rows)
        block = sweep.sweep(rows, factors, lse)
        collector.take(rows, block, factors)

    in_parallel(walk, list(sweep.blocks()), workers)
    return collector.out, collector.values


def threads(call: AttentionCall, wants: Wants) -> int:
    """How many blocks are worked on at once. One where blocks add to the same sums: the order would show."""
    shared = any(isinstance(r, Received | Propagate) for r in wants.second)
    if call.q.device.type != "cpu" or shared or call.queries * call.keys < PARALLEL_PLACES:
        return 1
    return torch.get_num_threads()
