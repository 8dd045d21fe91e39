"""The reference: the whole matrix, and on it the meaning of every reading and edit.

Slow and plain on purpose. `stream.py` and `fused.py` must equal it. `dtype=torch.float64` gives the yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention.call import AttentionCall, pick
from headwise.attention.effects import Effects, KeySet, key_set
from headwise.attention.readings import (
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
from headwise.errors import HeadwiseError

Values = dict[str, Tensor]
BLOCKED = -1e29
"""Scores below this are masked: masks come as -inf, as the dtype's minimum, or as bools."""


@dataclass
class Matrix:
    """Everything of one call: s, a [batch, heads, query, key], lse [batch, heads, query], seen (the mask)."""

    call: AttentionCall
    s: Tensor
    a: Tensor
    lse: Tensor
    seen: Tensor
    visible: Tensor
    """What the mask alone lets a query see; `seen` leaves out what edits knocked out as well."""

    def select(self, rows: Tensor | None, heads: list[int] | None) -> Matrix:
        """Some of the rows and heads, of what was made for all of them."""
        parts = {name: getattr(self, name) for name in ("s", "a", "lse", "seen", "visible")}
        for dim, index in ((2, rows), (1, heads)):
            if index is not None:
                index = torch.as_tensor(index, device=self.a.device)
                parts = {name: pick(x, dim, index) for name, x in parts.items()}
        return Matrix(self.call.select(rows, heads), **parts)


def dense(
    effects: Effects, readings: Sequence[Reading], dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "batch heads query value_dim"], dict[Reading, Values]]:
    """The heads' outputs before Blend and HeadGain, and the values of the readings."""
    call = effects.call
    dtype = dtype or (call.q.dtype if call.q.dtype == torch.float64 else torch.float32)
    matrix = weighed(effects, dtype)
    v = call.v.to(dtype).repeat_interleave(call.group, 1)
    with torch.no_grad():
        values = {reading: read(reading, matrix) for reading in readings}
    return matrix.a @ v, values


def weighed(effects: Effects, dtype: torch.dtype | None = None) -> Matrix:
    """Scores and weights of a call, all edits of them done."""
    q = effects.call.q.dtype
    return weigh(effects, scores(effects, dtype or (q if q == torch.float64 else torch.float32)))


def scores(effects: Effects, dtype: torch.dtype) -> Matrix:
    """Scores with all edits of them, the mask, and their softmax over keys and the sink column."""
    call = effects.call
    k = call.k.to(dtype).repeat_interleave(call.group, 1)
    if call.form is None:
        s = torch.einsum("bhid,bhjd->bhij", call.q.to(dtype), k) * call.scale
    else:
        s = call.form.scores(call.q.to(dtype), k, call)
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + call.bias.to(dtype)
    i, j = call.i[:, None], torch.arange(call.keys, device=s.device) + call.j0
    for edit in effects.maps:
        part = s[:, edit.heads]
        s = _put(s, edit.heads, torch.where(_where(call, edit.keys, edit.queries, part), edit(part, i, j), part))
    for bias in effects.biases:
        part = s[:, bias.heads]
        step = (
            torch.full_like(part, bias.value) if bias.vector is None else part * 0 + bias.value * bias.vector.to(dtype)
        )
        s = _put(s, bias.heads, part + torch.where(_where(call, bias.keys, bias.queries, part), step, 0.0))
    seen = call.mask.dense(call.i, call.j0, call.keys)
    if call.mask.added is not None:
        seen = seen & (call.mask.added > BLOCKED)
        s = s + call.mask.added.to(dtype)
    visible, seen = seen, seen & (s > BLOCKED)
    s = s.masked_fill(~seen, float("-inf"))
    column = (
        s
        if call.sinks is None
        else torch.cat([s, call.sinks.to(dtype)[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    )
    lse = torch.logsumexp(column, -1)
    if call.form is None or call.form.softmax:
        a = torch.where(seen, torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None]), 0.0)
    else:
        a, lse = call.form.weights(s, seen), torch.full_like(lse, float("nan"))
    return Matrix(call, s, a, lse, seen, visible)


def weigh(effects: Effects, matrix: Matrix) -> Matrix:
    """Reweight: each rule sees the masses its forerunners left."""
    for edit in effects.weighs:
        part = matrix.a[:, edit.heads]
        members = [_where(matrix.call, g, None, part) for g in edit.groups]
        masses = torch.stack([(part * m).sum(-1) for m in members], -1)
        weights = edit.edit.weights(masses)
        factor = torch.ones_like(part)
        for number, member in enumerate(members):
            factor = torch.where(member, weights[..., number, None], factor)
        if edit.queries is not None:
            factor = torch.where(edit.queries[:, None, :, None], factor, 1.0)
        matrix.a = _put(matrix.a, edit.heads, part * factor)
    return matrix


def _where(call: AttentionCall, keys: KeySet | None, queries: Tensor | None, like: Tensor) -> Tensor:
    chosen = torch.ones(1, 1, call.queries, call.keys, dtype=torch.bool, device=like.device)
    if keys is not None:
        chosen = chosen & keys.block(call.i, call.j0, 0, call.keys)
    if queries is not None:
        chosen = chosen & queries[:, None, :, None]
    return chosen.expand(like.shape)


def _put(x: Tensor, heads: Tensor, part: Tensor) -> Tensor:
    return x.index_copy(1, heads, part.to(x.dtype))


@singledispatch
def read(reading: Reading, matrix: Matrix) -> Values:
    raise TypeError(f"{type(reading).__name__} is not read off the weights.")


@read.register
def _(reading: Mass, matrix: Matrix) -> Values:
    call = matrix.call
    names = concrete(reading.segments, call.labels.names if call.labels else ())
    return {
        "mass": torch.stack([(matrix.a * _where(call, key_set(call, n), None, matrix.a)).sum(-1) for n in names], -1)
    }


@read.register
def _(reading: Entropy, matrix: Matrix) -> Values:
    return {"entropy": torch.special.entr(matrix.a).sum(-1)}


@read.register
def _(reading: Top, matrix: Matrix) -> Values:
    k = min(reading.k, matrix.a.shape[-1])
    value, index = torch.sort(matrix.a, dim=-1, descending=True, stable=True)
    value, index = value[..., :k], index[..., :k] + matrix.call.j0
    index = torch.where(value > 0, index, -1)
    short = (0, reading.k - k)
    return {
        "top_value": torch.nn.functional.pad(value, short),
        "top_index": torch.nn.functional.pad(index, short, value=-1),
    }


@read.register
def _(reading: Distance, matrix: Matrix) -> Values:
    call = matrix.call
    gap = (call.i[:, None] - torch.arange(call.keys, device=call.i.device) - call.j0).abs().to(matrix.a.dtype)
    return {"distance": (matrix.a * gap).sum(-1), "distance_sq": (matrix.a * gap**2).sum(-1)}


@read.register
def _(reading: LogSumExp, matrix: Matrix) -> Values:
    form = matrix.call.form
    if form is not None and not form.softmax:
        raise HeadwiseError(f"LogSumExp: {type(form).__name__} makes no softmax, so there is no log-sum-exp to read.")
    return {"lse": matrix.lse}


@read.register(At)
@read.register(Scores)
def _(reading: At | Scores, matrix: Matrix) -> Values:
    rows, columns, there = reading_places(reading, matrix.call)
    source = matrix.a if isinstance(reading, At) else matrix.s.masked_fill(~matrix.seen, float("nan"))
    absent = 0.0 if isinstance(reading, At) else float("nan")
    picked = source[:, :, rows].gather(3, columns[:, None].expand(-1, source.shape[1], -1, -1))
    picked = torch.where(there[:, None], picked, absent)
    return {reading.variables[0]: picked[..., 0] if reading.kind == "pair" else picked}


def reading_places(reading: At | Scores, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [row], key columns [batch, row, place] (clamped) and whether the place exists, for an At or Scores."""
    device = call.q.device
    if reading.pairs is not None:
        pairs = torch.tensor(reading.pairs, device=device).view(-1, 2)
        where = {int(p): n for n, p in enumerate(call.i)}
        known = torch.tensor([int(p) in where for p in pairs[:, 0]], dtype=torch.bool, device=device)
        rows = torch.tensor([where.get(int(p), 0) for p in pairs[:, 0]], dtype=torch.long, device=device)
        j = pairs[None, :, 1:]
    else:
        rows = torch.arange(call.queries, device=device)
        known = torch.ones(call.queries, dtype=torch.bool, device=device)
        if reading.lags is not None:
            j = (call.i[:, None] - torch.tensor(reading.lags, device=device))[None]
        else:
            assert reading.targets is not None
            targets = reading.targets.to(device)
            targets = targets[None] if targets.ndim == 2 else targets
            known = call.i < targets.shape[1]
            j = targets[:, call.i.clamp(max=targets.shape[1] - 1)]
    column = j - call.j0
    there = (j >= 0) & (column >= 0) & (column < call.keys) & known[None, :, None]
    column = column.clamp(0, call.keys - 1).expand(call.batch, -1, -1)
    return rows, column.contiguous(), there.expand(call.batch, -1, -1)


@read.register
def _(reading: Received, matrix: Matrix) -> Values:
    valid = matrix.call.valid()[:, None, :, None]
    visible = (matrix.visible & valid).expand_as(matrix.a)
    return {"received": (matrix.a * valid).sum(2), "received_visible": visible.sum(2).to(matrix.a.dtype)}


@read.register
def _(reading: SegmentEntropy, matrix: Matrix) -> Values:
    call = matrix.call
    values = []
    for name in concrete(reading.segments, call.labels.names if call.labels else ()):
        part = matrix.a * _where(call, key_set(call, name), None, matrix.a)
        mass = part.sum(-1, keepdim=True)
        values.append(torch.special.entr(part / mass.clamp(min=torch.finfo(part.dtype).tiny)).sum(-1))
    return {"segment_entropy": torch.stack(values, -1)}


@read.register
def _(reading: Propagate, matrix: Matrix) -> Values:
    x = propagate_rows(reading, matrix.call).to(matrix.a)
    if reading.side == "right":
        return {"propagate": matrix.a @ x}
    valid = matrix.call.valid()[:, None, :, None]
    return {"propagate": torch.einsum("bhij,ic->bhjc", matrix.a * valid, x)}


def propagate_rows(reading: Propagate, call: AttentionCall) -> Tensor:
    """The vectors' entries for this call's keys (side="right") or queries (side="left")."""
    position = torch.arange(call.keys, device=call.i.device) + call.j0 if reading.side == "right" else call.i
    if len(reading.x) <= int(position.max()):
        raise HeadwiseError(
            f"Propagate(x=...) has {len(reading.x)} rows, but the text has {int(position.max()) + 1} tokens."
        )
    return reading.x.to(call.q.device)[position]


@read.register
def _(reading: Map, matrix: Matrix) -> Values:
    return {"map": matrix.a}
