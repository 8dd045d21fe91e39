"""Attention that follows two links: to a token, and to the token that one links to."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.swap.attention import split
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places
from headwise.swap.structural import StructuralAttention


class MultiHopAttention(StructuralAttention):
    """`z = A V1 + A A V2`: the expectation of `f1(x_phi_i) + f2(x_phi_phi_i)`, the links of different tokens being
    independent. One matrix A, with any prior and edge of `StructuralAttention`; two passes over it, `A V2` and
    `A (V1 + A V2)`. In a trained model V2 starts at 0, so that the output at step 0 is equal.
    """

    what: ClassVar[str] = "values one and two links away, in one layer"
    context_too: ClassVar[bool] = False

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, **parts: Any
    ):  # fmt: skip
        super().__init__(dim, heads, kv_heads, head_dim, **parts)
        self.far_proj = nn.Linear(dim, self.kv_heads * self.value_dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        if context is not None:
            raise HeadwiseError("MultiHopAttention: the tokens of a context link to nothing: leave out context.")
        entries = self.entries(cache, context)
        here, seen = self.places(x, positions, entries), self.visible(mask, len(x))
        q, k, v = self.project(x, x, here)
        far = split(self.far_proj(x), self.kv_heads)
        if entries is not None:
            k, v, far = entries.extend(k=k, v=v, far=far)
        near = self.attend(
            q, k, far, seen, here, inner=True
        )  # one link away from a token, two from those that link to it
        if entries is not None:
            (near,) = entries.extend(near=near)
            entries.length += x.shape[1]
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        return self.combine(self.attend(q, k, v + near, seen, here), x)

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        project = 2 * self.dim * keys * self.kv_heads * self.value_dim
        scores = self.score.flops(queries, keys, self.heads, self.head_dim)
        return super().flops(queries, keys) + project + scores + 2 * queries * keys * self.heads * self.value_dim

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        made = super().from_site(site, causal, **own)
        with torch.no_grad():
            made.far_proj.weight.zero_()
        return made
