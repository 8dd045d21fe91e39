"""Do tokens grow alike through the layers, and how strongly can an early token reach a late one?

Rank collapse of a layer's output X [n, d]: `||X - 1 mean(X)||_F` (0: all tokens the same), also relative to `||X||_F`;
representational collapse: `||x_n - x_(n-1)||` of the last two tokens. The over-mixing bound says that token i can reach
token j at most in proportion to entry (j, i) of `prod_l (sum_h A^{l,h} + I)`: it ranks, it is no value. A head that
rests on the first token adds nothing to it for i > 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from headwise.attention import Propagate, attend
from headwise.attention.hidden import hidden
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.needs import lacks_language_model, quiet


@torch.no_grad()
def collapse_curves(opened: Opened, inputs: Mapping[str, Any], drop_first: int = 1) -> xr.Dataset:
    """`spread`, `relative_spread` and `last_step` after every layer, dims layer, averaged over the samples (without
    padding). The first `drop_first` tokens are left out: a massive activation there would drown the others."""
    found: dict[int, tuple[float, float, float]] = {}

    def look(layer: int, x: Tensor) -> None:
        x = x[:, drop_first:].float()
        if x.shape[1] < 2:
            raise HeadwiseError(
                f"collapse_curves: wanted at least 2 tokens after the first {drop_first}; got {x.shape[1]}."
            )
        spread = (x - x.mean(1, keepdim=True)).norm(dim=(1, 2))
        step = (x[:, -1] - x[:, -2]).norm(dim=-1)
        found[layer] = tuple(float(v.mean()) for v in (spread, spread / x.norm(dim=(1, 2)), step))  # type: ignore[assignment]

    with hidden(opened, {"block_out": look}):
        opened.model(**inputs, **quiet(opened.model))
    layers = sorted(found)
    names = ("spread", "relative_spread", "last_step")
    data = {name: ("layer", [found[layer][n] for layer in layers]) for n, name in enumerate(names)}
    return xr.Dataset(data, {"layer": layers})


@torch.no_grad()
def mixing_bound(
    opened: Opened, inputs: Mapping[str, Any], sources: Sequence[int], without: Sequence[tuple[int, int]] = ()
) -> xr.DataArray:
    """Columns of the product for the tokens `sources`, after every layer: dims layer, query, source.

    Divided by `(heads + 1)` a layer, so that a row of the whole product sums to 1. Heads in `without` are left out of
    the sum (and of nothing else). One forward pass a layer, and no matrix: each layer multiplies what came before."""
    reason = lacks_language_model(opened)
    if reason is not None:
        raise HeadwiseError(f"mixing_bound needs {reason}; {opened.name} does not have that.")
    samples, n = inputs["input_ids"].shape
    if samples != 1 or not sources or not all(0 <= s < n for s in sources):
        raise HeadwiseError(
            f"sources: wanted places in one text of {n} tokens (0 to {n - 1}); got {list(sources)} and {samples} texts."
        )
    x = torch.zeros(n, len(sources), device=opened.device)
    x[list(sources), range(len(sources))] = 1
    rows = []
    sites = [site for site in opened.sites if site.stream == "text"]
    for site in sites:
        kept = [head for head in range(site.heads) if (site.layer, head) not in set(without)]
        moved = torch.zeros_like(x)
        if kept:
            reading = Propagate(x, side="right", layers=site.layer, heads=kept, stream="text")
            with attend(opened, readings=[reading]) as run:
                opened.model(**inputs, **quiet(opened.model))
            seen = run.tree["text"]["propagate"].isel(sample=0, layer=0).sum("head").transpose("query", "column")
            moved = torch.as_tensor(seen.values, device=x.device, dtype=x.dtype)
        x = (moved + x) / (site.heads + 1)
        rows.append(x.cpu())
    coords = {"layer": [site.layer for site in sites], "query": range(n), "source": list(sources)}
    return xr.DataArray(torch.stack(rows).numpy(), dims=("layer", "query", "source"), coords=coords)
