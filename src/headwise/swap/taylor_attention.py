"""Attention with the first terms of the exponential's series in its place, of linear cost."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.attention import Heads
from headwise.swap.cache import Entries
from headwise.swap.gated_mlp import PAPER
from headwise.swap.parts.normalisers import Normaliser, Scored, Seen
from headwise.swap.parts.numerators import powers
from headwise.swap.taylor_rnn import TaylorRNN


class PerOrder(Normaliser):
    """`a_ij = sum_{n <= order} s_ij^n / sum_k s_ik^n`: every power of the scores divided by its own sum. Sums of odd
    powers may vanish or be negative, and then weights are huge."""

    def __init__(self, order: int = 2):
        super().__init__()
        self.order = order

    def forward(self, s: Scored, seen: Seen) -> Scored:
        one, s = seen.to(s), s.masked_fill(~seen, 0.0)
        terms = [one.expand_as(s) if n == 0 else s**n for n in range(self.order + 1)]
        return sum(term / own_sum(term.sum(-1, keepdim=True)) for term in terms)  # type: ignore[return-value]


def own_sum(total: Tensor) -> Tensor:
    """1 for 0, the sum of a row that sees nothing."""
    return torch.where(total == 0, 1.0, total)


class TaylorAttention(TaylorRNN):
    """The paper's "approximate" variant: `w_ij = 1 + s_ij + s_ij^2 / 2`, s the scaled dot products (`order` 2).

    `normalize`: "joint" divides by `sum_j w_ij`, which for even orders is never 0; "per_order" divides each order by
    its own sum and adds them up, as the paper prints it: `sum_j v_j / i + (sum_j s_ij v_j) / (sum_j s_ij) + ...`, whose
    first-order sum may be 0. Either decodes from a state of constant size, as `TaylorRNN` does. A converted model
    starts elsewhere than it was.
    """

    paper: ClassVar[Paper] = PAPER
    what: ClassVar[str] = "the second-order series in the place of the exponential, joint or by orders"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        order: int = 2,
        normalize: Literal["joint", "per_order"] = "joint",
        **parts: Any,
    ):
        if normalize not in ("joint", "per_order"):
            raise HeadwiseError(f"TaylorAttention: normalize is 'joint' or 'per_order'; got {normalize!r}.")
        super().__init__(dim, heads, kv_heads, head_dim, order=order, normaliser="sum", **parts)
        if normalize == "per_order":
            self.normaliser = PerOrder(order)

    def step(self, q: Heads, k: Heads, v: Heads, kept: Bool[Tensor, "batch token"], entries: Entries) -> Heads:
        if not isinstance(self.normaliser, PerOrder):
            return super().step(q, k, v, kept, entries)
        order, dtype = self.normaliser.order, torch.promote_types(q.dtype, torch.float32)
        q = q.to(dtype).unflatten(1, (self.kv_heads, -1)) * self.scale**0.5
        k = k.to(dtype) * self.scale**0.5
        v = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], -1) * kept[:, None, :, None].to(dtype)
        s = torch.einsum("bkgid,bkjd->bkgij", q, k)
        state = powers(k, order).transpose(-1, -2) @ v
        past = entries.states.get("state")
        widths = [self.head_dim**n for n in range(order + 1)]
        asked = powers(q, order).split(widths, -1)
        held: list[Any] = [None] * (order + 1) if past is None else list(past.split(widths, -2))
        parts = []
        for n, (features, memory) in enumerate(zip(asked, held, strict=True)):
            part = torch.tril(s**n / math.factorial(n)) @ v[:, :, None]
            if memory is not None:
                part = part + torch.einsum("bkgif,bkfv->bkgiv", features, memory)
            parts.append(part[..., :-1] / own_sum(part[..., -1:]))
        entries.put(state=state if past is None else state + past)
        return torch.stack(parts).sum(0).flatten(1, 2)
