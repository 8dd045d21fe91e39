"""Positional attention: who listens to whom is learned once, for places and not for contents."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads, split
from headwise.swap.mechanism import Mechanism
from headwise.swap.parts.positions import Places, Position


class PositionalAttention(Attention):
    """`A = softmax(Q K^T / sqrt(qk_dim))`, `Q = P W_Q + b`, `K = P W_K + b`: the same weights for every input, which
    enters by its values alone. P [place, pos_dim]: `vectors`, fixed, by default one-hot rows for `length` places, to
    which a model is tied then. `head_dim` is the width of a head's values, `qk_dim` that of queries and keys (pos_dim).
    Weights start as Xavier's, biases at 0.

    In a trained layer values and output are taken over and the pattern is new: the output at step 0 is not the
    model's.
    """

    paper: ClassVar[Paper] = Paper(
        "Positional Attention: Expressivity and Learnability of Algorithmic Computation", "2410.01686"
    )
    what: ClassVar[str] = "weights learned for places; contents enter by the values alone"
    vectors: Tensor

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        length: int = 64, vectors: Float[Tensor, "place pos_dim"] | None = None, qk_dim: int | None = None,
        causal: bool = False, bias: bool = True,
    ):  # fmt: skip
        if vectors is None:
            vectors = torch.eye(length)
        if vectors.ndim != 2:
            raise HeadwiseError(f"vectors: wanted [place, pos_dim]; got shape {tuple(vectors.shape)}.")
        Mechanism.__init__(self, dim, heads, kv_heads, head_dim, causal=causal)  # the sizes are checked by name first
        places, width = vectors.shape
        super().__init__(
            dim, heads, kv_heads, qk_dim or width, value_dim=self.head_dim, causal=causal, bias=bias
        )  # fmt: skip
        self.length = places
        self.register_buffer("vectors", vectors.to(self.v_proj.weight.dtype))
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)

    def project(
        self,
        x: Float[Tensor, "batch query dim"],
        source: Float[Tensor, "batch key dim"],
        here: Places,
        crossed: bool = False,
    ) -> tuple[Heads, Heads, Heads]:
        there = Places(torch.arange(source.shape[1], device=x.device)[None]) if crossed else here
        q = self.placed(self.q_proj, self.heads, here).expand(len(x), -1, -1, -1)
        k = self.placed(self.k_proj, self.kv_heads, there).expand(len(x), -1, -1, -1)
        return q, k, split(self.v_proj(source), self.kv_heads)

    def placed(self, linear: nn.Module, heads: int, places: Places) -> Float[Tensor, "#batch heads token dim"]:
        last = places.first + places.ids.shape[-1]
        if last > self.length:
            raise HeadwiseError(
                f"PositionalAttention has vectors for {self.length} places; got {last} tokens: give length= or "
                "vectors=."
            )
        return split(linear(self.vectors[places.ids]), heads)

    @torch.no_grad()
    def pattern(self) -> Float[Tensor, "heads query key"]:
        """The weights of all places."""
        here = Places(torch.arange(self.length, device=self.vectors.device)[None])
        q, k = self.placed(self.q_proj, self.heads, here)[0], self.placed(self.k_proj, self.kv_heads, here)[0]
        s = q @ k.repeat_interleave(self.heads // self.kv_heads, 0).mT * self.scale
        if self.causal:
            s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf"))
        return s.softmax(-1)

    @classmethod
    def host_parts(cls, position: Position) -> dict[str, Any]:
        return {}

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        trained = Attention.from_site(site, causal)
        made = cls(trained.dim, site.heads, site.kv_heads, site.value_dim, causal=causal, **own)
        made.to(site.W_V.dtype).to(site.W_V.device)
        made.v_proj, made.o_proj = trained.v_proj, trained.o_proj
        return made

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        width = self.vectors.shape[1]
        places = 2 * width * self.head_dim * (queries * self.heads + keys * self.kv_heads)
        values = 2 * self.dim * self.value_dim * (keys * self.kv_heads + queries * self.heads)
        return places + values + 2 * queries * keys * self.heads * (self.head_dim + self.value_dim)
