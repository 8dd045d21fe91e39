"""Calls with a form of their own, in blocks of rows: dense on each block, joined. Memory is linear in the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.attention.dense import Values, dense
from headwise.attention.effects import Effects
from headwise.attention.readings import At, Propagate, Reading, Received, Scores

PLACES = 2**18
"""Query-key pairs a head in one block."""


def by_rows(effects: Effects, readings: Sequence[Reading], output: bool) -> tuple[Tensor, dict[Reading, Values]]:
    """The same as `dense`, never with the whole matrix. Without gradients."""
    call = effects.call
    size = max(1, PLACES // call.keys)
    outs, found = [], []
    for rows in torch.arange(call.queries).split(size):
        out, values = dense(effects.select(call.select(rows), rows, None), readings)
        outs.append(out)
        found.append(values)
    return torch.cat(outs, 2), {r: {n: join(r, [f[r][n] for f in found]) for n in found[0][r]} for r in readings}


def join(reading: Reading, blocks: list[Tensor]) -> Tensor:
    """Blocks of rows as one: what is summed over queries is summed on, single pairs stand in one block each."""
    if isinstance(reading, Received) or (isinstance(reading, Propagate) and reading.side == "left"):
        return torch.stack(blocks).sum(0)
    if isinstance(reading, (At, Scores)) and reading.kind == "pair":
        joined = torch.stack(blocks)
        return (
            joined.sum(0) if isinstance(reading, At) else joined.nansum(0).masked_fill(joined.isnan().all(0), torch.nan)
        )
    return torch.cat(blocks, 2)
