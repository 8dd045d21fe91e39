"""Softmax's Taylor series as what it is: a sum of recurrent networks whose states hold powers of the keys."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attention.dense import BLOCKED
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.swap.attention import Heads
from headwise.swap.cache import Cache, Entries
from headwise.swap.mechanism import Visible
from headwise.swap.parts.numerators import Numerator, powers, taylor
from headwise.swap.parts.positions import Places, Position
from headwise.swap.softmax_ablation import SoftmaxAblation

FEATURES = 2**17
"""The widest state of a head that is made."""
BLOCK = 64
"""Tokens that are taken in at once."""


class TaylorRNN(SoftmaxAblation):
    """`SoftmaxAblation` with the series as its numerator, which decodes from a state of constant size.

    The state of order n after token t is `H^n_t = sum_{j <= t} k_j^(n) v_j^T / (n! d^(n/2))`, k^(n) the n-fold
    Kronecker power: `sum_j E(s_tj) v_j = sum_n q_t^(n) H^n_t`. The same sums of the keys alone give the divisor.
    Without a cache this runs in its parallel form, which readings see; with one, from the state, which they don't. A
    state is `sum_n d^n` times the value width: orders up to 2, or 3 with narrow heads. Its masks are padding: what a
    token's own query does not see is never taken in.
    """

    what: ClassVar[str] = "the Taylor series of softmax, decoding from a state of constant size"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        order: int = 2,
        normaliser: Any = "sum",
        **parts: Any,
    ):
        super().__init__(
            dim, heads, kv_heads, head_dim, numerator="taylor", order=order, normaliser=normaliser, **parts
        )  # fmt: skip
        width = sum(self.head_dim**n for n in range(order + 1))
        if width > FEATURES:
            raise HeadwiseError(
                f"TaylorRNN: states are at most {FEATURES} wide; order {order} with heads of {self.head_dim}: {width}."
            )
        if not self.score.plain or type(self.position).bias is not Position.bias:
            raise HeadwiseError("TaylorRNN: a state holds scaled dot products only: leave out score and Alibi.")

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        entries = self.entries(cache, context)
        if entries is None:
            return super().forward(x, context, mask, positions)
        here = self.places(x, positions, entries)
        q, k, v = self.project(x, x, here)
        kept = own_keys(self.visible(mask, len(x)), here.first, x.shape[1])
        kept = torch.ones_like(x[:, :, 0], dtype=torch.bool) if kept is None else kept.expand(len(x), -1)
        blocks = zip(*(t.split(BLOCK, 2) for t in (q, k, v)), kept.split(BLOCK, 1), strict=True)
        z = torch.cat([self.step(q, k, v, kept, entries) for q, k, v, kept in blocks], 2)
        entries.length += x.shape[1]
        return self.combine(z.to(v), x)

    def step(self, q: Heads, k: Heads, v: Heads, kept: Bool[Tensor, "batch token"], entries: Entries) -> Heads:
        """A block of tokens: what the state holds, what they hold for each other, and the state after them."""
        assert isinstance(self.normaliser, Numerator)
        order, dtype = self.normaliser.order, torch.promote_types(q.dtype, torch.float32)
        q = q.to(dtype).unflatten(1, (self.kv_heads, -1)) * self.scale**0.5
        k = k.to(dtype) * self.scale**0.5
        one = kept[:, None, :, None].to(dtype)
        v = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], -1) * one  # the last column: the sums
        now = torch.tril(taylor(torch.einsum("bkgid,bkjd->bkgij", q, k), order))
        z = torch.einsum("bkgij,bkjv->bkgiv", now, v)
        count = one.cumsum(2)
        added = powers(k, order).transpose(-1, -2) @ v
        if entries.states:
            state, seen = entries.states["state"], entries.states["seen"]
            z = z + torch.einsum("bkgif,bkfv->bkgiv", powers(q, order), state)
            count, added = count + seen, added + state
        entries.put(state=added, seen=count[:, :, -1:])
        z, count = z.flatten(1, 2), count.expand(-1, self.heads, -1, -1)
        return z[..., :-1] / self.normaliser.divisor(z[..., -1:], count)


def own_keys(mask: Mask, first: int, count: int) -> Bool[Tensor, "#batch token"] | None:
    """Which of the tokens from `first` on their own queries see; None = all."""
    if mask.left is not None or mask.rule is not None or mask.indices is not None:
        raise HeadwiseError("TaylorRNN: a state keeps what it has seen: with a cache a mask must be padding.")
    kept = None if mask.key_valid is None else mask.key_valid[:, first : first + count]
    for pairs, blocked in ((mask.allowed, False), (mask.added, BLOCKED)):
        if pairs is not None:
            pairs = pairs if pairs.shape[-1] == 1 else pairs[..., first:]
            seen = torch.diagonal(pairs.expand(-1, -1, count, count), dim1=-2, dim2=-1)[:, 0] > blocked
            kept = seen if kept is None else kept & seen
    return kept
