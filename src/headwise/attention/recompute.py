"""Queries that are computed with other queries, keys or values than the model's: two calls, one output.

The way that most queries go is run for the whole call, the other one for its own queries again: a change of the last
row costs one more row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.attention.call import AttentionCall, expand_kv
from headwise.attention.edits import Blend, Edit, HeadGain, Recompute, Recomputed
from headwise.attention.effects import finish, resolve
from headwise.attention.engine import Part, Result, plain, run_call, uniform
from headwise.attention.readings import At, HeadOutput, Inputs, Propagate, Reading, Received, Scores
from headwise.errors import HeadwiseError

Edits = Sequence[tuple[Edit, list[int]]]


def run_rows(call: AttentionCall, edits: Edits, parts: Sequence[Part]) -> Result:
    """`run_call`, with what a `Recompute` wants."""
    found = [(edit, heads) for edit, heads in edits if isinstance(edit, Recompute)]
    if not found:
        return run_call(call, edits, parts)
    if len(found) > 1:
        raise HeadwiseError(f"Recompute: one at a time in a layer; {call.site and call.site.name} is given several.")
    if not call.local:
        raise HeadwiseError(f"Recompute: {type(call.form).__name__} mixes rows or heads: none stands alone.")
    edits = [pair for pair in edits if not isinstance(pair[0], Recompute)]
    [(edit, heads)] = found
    made = edit.make(call)
    if made is None:
        return run_call(call, edits, parts)
    other, rows = recomputed(call, made, heads), made.rows.expand(call.batch, -1)
    if not bool(rows.any()):
        return run_call(call, edits, parts)
    if bool(rows.all()):
        return run_call(other, edits, parts)
    late = [pair for pair in edits if isinstance(pair[0], Blend | HeadGain)]
    early = [pair for pair in edits if not isinstance(pair[0], Blend | HeadGain)]
    if 2 * int(rows.sum()) > rows.numel():
        return both(call, other, call, ~rows, early, late, parts)
    return both(call, call, other, rows, early, late, parts)


def recomputed(call: AttentionCall, made: Recomputed, heads: list[int]) -> AttentionCall:
    """The call with other queries, keys and values in these heads."""
    new: dict[str, Any] = {name: x for name in "qkv" if (x := getattr(made, name)) is not None}
    for name, x in new.items():
        if x.shape != getattr(call, name).shape:
            raise HeadwiseError(
                f"Recompute(make=...): {name} must have shape {tuple(getattr(call, name).shape)}; got {tuple(x.shape)}."
            )
    other = replace(call, **new)
    if len(heads) < call.heads:
        some = torch.zeros(call.heads, 1, 1, dtype=torch.bool, device=call.q.device)
        some[heads] = True
        mine, other = expand_kv(call), expand_kv(other)
        new = {name: torch.where(some, getattr(other, name), getattr(mine, name)) for name in "qkv"}
        other = replace(other, **new)
    return other


def both(
    own: AttentionCall,
    call: AttentionCall,
    other: AttentionCall,
    rows: Bool[Tensor, "batch query"],
    early: Edits,
    late: Edits,
    parts: Sequence[Part],
) -> Result:
    """The call, with the rows chosen taken from the other one. Edits of outputs come after, and are told of the model's
    own values."""
    weights = [p for p in parts if not isinstance(p.reading, HeadOutput | Inputs)]
    places = rows.any(0).nonzero().flatten().cpu()
    device, valid = places.to(call.q.device), call.valid()
    first = run_call(replace(call, query_valid=valid & ~rows), early, weights)
    few = replace(other, query_valid=valid & rows).select(rows=places)
    inner = {id(p): within(p, places) for p in weights}
    asked = [p for p in weights if inner[id(p)].rows is None or len(inner[id(p)].rows)]  # type: ignore[arg-type]
    second = run_call(few, early, [inner[id(p)] for p in asked])
    out = first.out.clone()
    out[:, :, device] = torch.where(rows[:, None, device, None], second.out, out[:, :, device])
    out = finish(resolve(own, late), out, uniform)
    merged = dict(zip(map(id, weights), first.values, strict=True))
    for part, values in zip(asked, second.values, strict=True):
        mine = merged[id(part)]
        merged[id(part)] = {name: joined(part, call, rows, places, mine[name], values[name]) for name in mine}
    seen = replace(call, q=torch.where(rows[:, None, :, None], other.q, call.q))
    with torch.no_grad():
        merged |= {id(p): plain(p, seen, out) for p in parts if id(p) not in merged}
    reason = f"{first.reason}; {len(places)} of {call.queries} queries recomputed"
    return Result(out, [merged[id(p)] for p in parts], first.path, reason)


def within(part: Part, places: Int[Tensor, " row"]) -> Part:
    """The same reading of the call that holds only these rows."""
    if part.rows is None:
        return part
    return replace(part, rows=torch.isin(places, part.rows).nonzero().flatten())


def joined(
    part: Part,
    call: AttentionCall,
    rows: Bool[Tensor, "batch query"],
    places: Int[Tensor, " row"],
    a: Tensor,
    b: Tensor,
) -> Tensor:
    """Values of the whole call, with those of the rows chosen in their places."""
    reading: Reading = part.reading
    if isinstance(reading, Received) or (isinstance(reading, Propagate) and reading.side == "left"):
        return a + b  # sums over the valid queries, of which each call has its own
    if isinstance(reading, At | Scores) and reading.kind == "pair":
        assert reading.pairs is not None
        where = {int(p): n for n, p in enumerate(call.places)}
        place = torch.tensor([where.get(int(i), -1) for i, _ in reading.pairs], device=rows.device)
        mine = rows[:, place] & (place >= 0)
        return torch.where(mine[:, None], b, a)
    whole = torch.arange(call.queries) if part.rows is None else part.rows
    at = torch.isin(whole, places).nonzero().flatten().to(a.device)
    mine = rows[:, whole.to(rows.device)][:, at]
    mine = mine.reshape(len(mine), 1, -1, *(1,) * (a.ndim - 3))
    a = a.clone()
    a[:, :, at] = torch.where(mine, b, a[:, :, at])
    return a
