"""Rotary positions, turned again: what `Rebase` needs to know of a model's own rotation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attention.call import AttentionCall, expand_kv
from headwise.attention.edits import Rebase
from headwise.errors import HeadwiseError


@dataclass(frozen=True)
class Rotary:
    """Frequencies of a model's rotation, and whether it turns pairs (x_i, x_i+d/2) or neighbours (x_2i, x_2i+1)."""

    inv_freq: Float[Tensor, " half"]
    interleaved: bool


def find_rotary(model: nn.Module, attention: nn.Module) -> Rotary | None:
    """The rotation an attention module's queries and keys went through, read off the model itself."""
    inv_freq = next((b for n, b in model.named_buffers() if n.rsplit(".", 1)[-1] == "inv_freq"), None)
    half = getattr(sys.modules.get(type(attention).__module__), "rotate_half", None)
    if inv_freq is None or half is None:
        return None
    turned = half(torch.arange(1.0, 9.0))
    if turned.tolist() == [-5, -6, -7, -8, 1, 2, 3, 4]:
        return Rotary(inv_freq, False)
    return Rotary(inv_freq, True) if turned.tolist() == [-2, 1, -4, 3, -6, 5, -8, 7] else None


def turn(
    x: Float[Tensor, "batch heads token dim"], angle: Float[Tensor, "token half"], interleaved: bool
) -> Float[Tensor, "batch heads token dim"]:
    """Rotates the first 2*half channels by these angles."""
    half = angle.shape[-1]
    body, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = (body[..., 0::2], body[..., 1::2]) if interleaved else (body[..., :half], body[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    body = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([body, rest], -1)


def rebase(call: AttentionCall, edit: Rebase, heads: list[int]) -> AttentionCall:
    """The call with q and k of these heads turned from their own angles to the edit's."""
    rotary = call.rotary
    if rotary is None:
        where = call.site.name if call.site is not None else "this call"
        raise HeadwiseError(f"Rebase needs rotary embeddings headwise can read; {where} has none.")
    old = rotary.inv_freq.to(call.q.device, torch.float64)
    half = min(len(old), call.q.shape[-1] // 2)
    old = old[:half]
    new = old
    if edit.theta is not None:
        new = float(edit.theta) ** (-torch.arange(half, device=old.device, dtype=torch.float64) / half)

    def angle(position: Int[Tensor, " token"]) -> Tensor:
        place = position.to(old)
        if edit.positions is None:
            return place[:, None] * (new - old)
        if len(edit.positions) <= int(position.max()):
            raise HeadwiseError(
                f"Rebase(positions=...) has {len(edit.positions)} entries, but the text has "
                f"{int(position.max()) + 1} tokens."
            )
        moved = edit.positions.to(old.device)[position].to(old)
        return moved[:, None] * new - place[:, None] * old

    chosen = torch.tensor(heads, device=call.q.device)
    keys = torch.arange(call.keys, device=call.q.device) + call.j0
    if len(heads) == call.heads:
        return replace(
            call,
            q=turn(call.q, angle(call.i), rotary.interleaved),
            k=turn(call.k, angle(keys), rotary.interleaved),
        )
    call = expand_kv(call)
    q, k = call.q.clone(), call.k.clone()
    q[:, chosen] = turn(q[:, chosen], angle(call.i), rotary.interleaved)
    k[:, chosen] = turn(k[:, chosen], angle(keys), rotary.interleaved)
    return replace(call, q=q, k=k)
