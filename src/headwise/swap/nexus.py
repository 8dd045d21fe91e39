"""Nexus: queries and keys that are themselves results of attention, so that a score depends on the context."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads, merge, split
from headwise.swap.cache import Cache, Entries
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places

Inner = Literal["qkv", "self", "full"]


class NexusAttention(Attention):
    """`order` 1 is plain attention. Each further order mixes the queries Q and keys K of the one below by attention
    under the same mask, the values stay `x W_V`, and the last order's Q and K make the weights. The paper's text leaves
    the inner attention open; `inner` names three readings of it, A = softmax(Q K^T / sqrt(d)):

    - "qkv": `Q <- A Q`, `K <- A K`: one map for both;
    - "self": `Q <- softmax(Q Q^T / sqrt(d)) Q`, `K <- softmax(K K^T / sqrt(d)) K`;
    - "full": `z = concat_h A V`, `Q <- z W_Q`, `K <- z W_K`: a whole layer with the same weights (heads * value_dim
      must be dim).

    `shared=False` (order 2): two inner layers with weights of their own, `Q = A_q x W_V^q`, `K = A_k x W_V^k`, an
    ablation with far more parameters, which has no W_Q and W_K beside these unless there is a gate. `gate`: `Q <- Q +
    tanh(g) (inner - Q)`, keys alike, g learned, one for each order above 1, from that start; without it there are no
    parameters beyond the projections. A trained layer starts with `gate=0.0`: equal output at step 0 (the gate is an
    addition of headwise).

    What is mixed is not turned by positions; what is compared is. With grouped keys the inner maps are those of the
    query heads, and the refined keys of a group are averaged. Readings see the outer map, edits act on all; with
    `attend(..., inner=True)` readings see all `order` (with "self" `2 order - 1`) calls of a forward, the outer last.
    A cache holds for every inner map its keys and what they mix: two to three times as much as plain attention. Costs
    grow with the order alike.
    """

    paper: ClassVar[Paper] = Paper("Nexus: Higher-Order Attention Mechanisms in Transformers", "2512.03377")
    what: ClassVar[str] = "queries and keys that are results of attention themselves"
    context_too: ClassVar[bool] = False

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        order: int = 2, inner: Inner = "qkv", gate: float | None = None, shared: bool = True, **parts: Any,
    ):  # fmt: skip
        super().__init__(dim, heads, kv_heads, head_dim, **parts)
        if order < 1 or inner not in ("qkv", "self", "full"):
            raise HeadwiseError(
                f"NexusAttention: order is at least 1, inner is qkv, self or full; got order={order}, inner={inner!r}."
            )
        if inner == "full" and self.heads * self.value_dim != dim:
            raise HeadwiseError(
                f"NexusAttention(inner='full') projects the inner output again: heads * value_dim must be dim {dim}; "
                f"got {self.heads} * {self.value_dim}."
            )
        if not shared and order != 2:
            raise HeadwiseError(f"NexusAttention(shared=False) is of order 2; got order={order}.")
        self.order, self.inner, self.shared = order, inner, shared
        self.gate = None if gate is None else nn.Parameter(torch.full((order - 1,), float(gate)))
        self.inner_q = None if shared else Projections(dim, heads, self.kv_heads, heads, self.head_dim)
        self.inner_k = None if shared else Projections(dim, heads, self.kv_heads, self.kv_heads, self.head_dim)
        if not shared and gate is None:
            self.leave_out()

    def leave_out(self) -> None:
        """Queries and keys of its own, where those of the inner layers stand for them altogether."""
        self.gate = None
        del self.q_proj, self.k_proj

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        if context is not None:
            raise HeadwiseError("NexusAttention: queries and keys are mixed within one sequence: leave out context.")
        entries = self.entries(cache, None)
        level = Level(self, self.places(x, positions, entries), self.visible(mask, len(x)), entries)
        v = split(self.v_proj(x), self.kv_heads)
        if not self.shared and self.gate is None:
            q, k = self.apart(level, x)
        else:
            q, k = self.raw_queries(x), self.raw_keys(x)
            for order in range(1, self.order):
                mixed = self.mix(level, order, q, k, v, x)
                share = None if self.gate is None else torch.tanh(self.gate[order - 1])
                q, k = (m if share is None else torch.lerp(old, m, share) for old, m in zip((q, k), mixed, strict=True))
        z = level.attend("outer", q, k, v)
        if entries is not None:
            entries.length += x.shape[1]
        return self.combine(z, x)

    def raw_queries(self, x: Float[Tensor, "batch query dim"]) -> Heads:
        return self.q_norm(split(self.q_proj(x), self.heads))

    def mix(self, level: Level, order: int, q: Heads, k: Heads, v: Heads, x: Tensor) -> tuple[Heads, Heads]:
        """The queries and keys of the next order."""
        if not self.shared:
            return self.apart(level, x)
        if self.inner == "full":
            z = merge(level.attend(f"{order}", q, k, v))
            return self.raw_queries(z), self.raw_keys(z)
        every = k.repeat_interleave(self.heads // self.kv_heads, 1)
        if self.inner == "self":
            return level.attend(f"{order} q", q, q, q), self.grouped(level.attend(f"{order} k", every, every, every))
        mixed_q, mixed_k = level.attend(f"{order}", q, every, torch.cat([q, every], -1)).chunk(2, -1)
        return mixed_q, self.grouped(mixed_k)

    def apart(self, level: Level, x: Float[Tensor, "batch token dim"]) -> tuple[Heads, Heads]:
        """Queries and keys from the inner layers with weights of their own."""
        assert self.inner_q is not None
        assert self.inner_k is not None
        return level.attend("q", *self.inner_q(x)), self.grouped(level.attend("k", *self.inner_k(x)))

    def grouped(self, k: Heads) -> Heads:
        """The mean of each group's refined keys."""
        return k.unflatten(1, (self.kv_heads, -1)).mean(2)

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        width = self.head_dim * (2 if self.inner == "qkv" and self.shared else 1)
        value = self.value_dim if self.inner == "full" and self.shared else width
        maps = 1 if self.inner != "self" and self.shared else 2
        score = self.score.flops(queries, keys, self.heads, self.head_dim)
        inner = maps * (score + 2 * queries * keys * self.heads * value)
        if not self.shared:
            inner += sum(2 * queries * p.numel() for m in (self.inner_q, self.inner_k) if m for p in m.parameters())
        elif self.inner == "full":
            inner += 2 * queries * self.dim * (self.heads + self.kv_heads) * self.head_dim
        own = 0
        if not self.shared and self.gate is None:  # neither queries nor keys of its own
            own = 2 * self.dim * self.head_dim * (queries * self.heads + keys * self.kv_heads)
        return super().flops(queries, keys) - own + (self.order - 1) * inner

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        own = {"gate": 0.0, **own}
        if own.get("shared", True) or own["gate"] is not None:
            return super().from_site(site, causal, **own)
        made = super().from_site(site, causal, **{**own, "gate": 0.0})
        made.leave_out()
        return made


class Level:
    """The attention calls of one forward: where its tokens are, what they see, and what the cache holds of each map."""

    def __init__(self, module: NexusAttention, here: Places, seen: Mask, entries: Entries | None):
        self.module, self.here, self.seen, self.entries = module, here, seen, entries

    def attend(self, name: str, q: Heads, k: Heads, content: Heads) -> Heads:
        """Attention of turned queries and keys to what is not turned."""
        turn = self.module.position.turn
        q, k = turn(q, self.here), turn(k, self.here)
        if self.entries is not None:
            k, content = self.entries.extend(**{f"{name} k": k, f"{name} v": content})
        if content.shape[1] != k.shape[1]:
            k, content = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, content))
        return self.module.attend(q, k, content, self.seen, self.here, inner=name != "outer")


class Projections(nn.Module):
    """Queries, keys and values of an inner layer with weights of its own, whose values become what it refines."""

    def __init__(self, dim: int, heads: int, kv_heads: int, out_heads: int, width: int):
        super().__init__()
        self.sizes = heads, kv_heads, out_heads
        self.q, self.k, self.v = (nn.Linear(dim, n * width, bias=False) for n in self.sizes)

    def forward(self, x: Float[Tensor, "batch token dim"]) -> tuple[Heads, Heads, Heads]:
        q, k, v = (split(linear(x), n) for linear, n in zip((self.q, self.k, self.v), self.sizes, strict=True))
        return q, k, v
