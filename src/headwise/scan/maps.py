"""Rows of every head's map for one block of queries at a time: what comparisons of heads look at.

A block has `BLOCK` rows, so that memory grows with the length of the input, not with its square; every further block
costs a further forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention import LogSumExp, Map, attend
from headwise.models import Opened
from headwise.scan.needs import quiet
from headwise.scan.units import Units

BLOCK = 64


@torch.no_grad()
def map_rows(
    opened: Opened, batch: Mapping[str, Any], units: Units, rows: Int[Tensor, " row"], stream: str
) -> Iterator[Float[Tensor, "layer head row unit"]]:
    """The maps of all heads of a stream between units, for the chosen rows, in blocks. Heads a layer lacks are nan."""
    for some in rows.split(BLOCK):
        tokens, inside = units.part(some)
        with attend(opened, readings=[Map(queries=tokens.tolist(), stream=stream)]) as run:
            opened.model(**batch, **quiet(opened.model))
        seen = run.tree[stream]["map"].isel(sample=0).transpose("layer", "head", "query", "key")
        yield inside.means(units.sums(torch.from_numpy(seen.values)))


@torch.no_grad()
def token_count(opened: Opened, batch: Mapping[str, Any], stream: str) -> int:
    """How many tokens an input has in a stream: seen in a forward pass where they are no token ids."""
    ids = batch.get("input_ids")
    if ids is not None and stream == "text":
        return ids.shape[1]
    with attend(opened, readings=[LogSumExp(stream=stream)]) as run:
        opened.model(**batch, **quiet(opened.model))
    return run.tree[stream].sizes["query"]
