"""One number per head, layer by layer, as an array [layer, head]."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor


def grid(rows: Mapping[int, Float[Tensor, " head"]]) -> xr.DataArray:
    """`rows` holds the heads of each layer; nan where a layer has fewer heads than another."""
    width = max(len(row) for row in rows.values())
    full = torch.full((len(rows), width), float("nan"))
    for place, row in enumerate(rows.values()):
        full[place, : len(row)] = row.cpu()
    return xr.DataArray(full.numpy(), {"layer": list(rows), "head": range(width)}, ("layer", "head"))
