"""Scores at single (query, key) places: what lags, targets and pairs need, at the cost of those places only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention.effects import Effects
from headwise.attention.mask import gather_places


def place_scores(
    effects: Effects, rows: slice | Tensor, j: Int[Tensor, "batch row place"], factors: list[Tensor], dtype: torch.dtype
) -> Float[Tensor, "batch heads row place"]:
    """Edited, masked scores s_ij (-inf where unseen) of these queries at key columns j. `factors` as in
    `stream`; without them the scores are those before Reweight."""
    call = effects.call
    kv = call.k.shape[1]
    i = call.i[rows]
    q = call.q[:, :, rows].to(dtype).unflatten(1, (kv, call.group)) * call.scale
    flat = j.flatten(1)[:, None, :, None].expand(-1, kv, -1, call.k.shape[-1])
    k = call.k.gather(2, flat).to(dtype).unflatten(2, j.shape[1:])
    s = torch.einsum("bkgrd,bkrmd->bkgrm", q, k).flatten(1, 2)
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + gather_places(call.bias.to(dtype), rows, j)
    for change in effects.maps:
        part = s[:, change.heads]
        chosen = torch.ones_like(part, dtype=torch.bool)
        if change.keys is not None:
            chosen = chosen & change.keys.at(i, call.j0, j)[:, None]
        if change.queries is not None:
            chosen = chosen & change.queries[:, None, rows, None]
        s[:, change.heads] = torch.where(chosen, change(part, i[:, None], (j + call.j0)[:, None]), part)
    for bias in effects.biases:
        part = s[:, bias.heads]
        if bias.vector is not None:
            step = (bias.value * bias.vector.to(dtype))[j][:, None]
        else:
            step = torch.full((), bias.value, dtype=dtype, device=s.device)
        chosen = torch.ones_like(part, dtype=torch.bool)
        if bias.keys is not None:
            chosen = chosen & bias.keys.at(i, call.j0, j)[:, None]
        if bias.queries is not None:
            chosen = chosen & bias.queries[:, None, rows, None]
        s[:, bias.heads] = part + torch.where(chosen, step, 0.0)
    for factor, weigh in zip(factors, effects.weighs, strict=False):
        part = s[:, weigh.heads]
        for number, group in enumerate(weigh.groups):
            part = torch.where(group.at(i, call.j0, j)[:, None], part + factor[..., number, None], part)
        s[:, weigh.heads] = part
    if call.mask.added is not None:
        s = s + gather_places(call.mask.added.to(dtype), rows, j)
    return s.masked_fill(~call.mask.at(i, rows, j, call.j0), float("-inf"))
