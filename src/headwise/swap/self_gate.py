"""Attention whose scores know the key alone: every query gives it the same."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads, split
from headwise.swap.gated_mlp import PAPER
from headwise.swap.parts.positions import Places, Position


class SelfGateAttention(Attention):
    """The paper's "non-approximate" variant: `e_j = (silu(W_Q x_j) . W_K x_j) / sqrt(head_dim)`, and
    `a_ij = exp(e_j) / sum_k exp(e_k)` over the keys that i sees.

    It runs as scaled dot products of width 1, queries all 1 and keys e, so that a cache holds one number a key and
    head; with fewer key-value heads the scores are still one for each query head, and values are held for each. No
    rotation could change e, and there is none. `qk_norm` norms both of its factors (before the silu): the scores grow
    without it. Converted, it starts with the layer's projections but not with its output.
    """

    paper: ClassVar[Paper] = PAPER
    what: ClassVar[str] = "softmax over scores of the keys alone, without a query"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = False,
        value_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__(
            dim, heads, kv_heads, head_dim, value_dim=value_dim, causal=causal, bias=bias, qk_norm=qk_norm
        )  # fmt: skip

    @classmethod
    def host_parts(cls, position: Position) -> dict[str, Any]:
        return {}

    def project(
        self,
        x: Float[Tensor, "batch query dim"],
        source: Float[Tensor, "batch key dim"],
        here: Places,
        crossed: bool = False,
    ) -> tuple[Heads, Heads, Heads]:
        gate = torch.nn.functional.silu(self.q_norm(split(self.q_proj(source), self.heads)))
        keys, values = (
            part.repeat_interleave(self.heads // self.kv_heads, 1)
            for part in (self.raw_keys(source), split(self.v_proj(source), self.kv_heads))
        )
        e = (gate * keys).sum(-1, keepdim=True)  # `attend` scales it
        return e.new_ones(len(x), self.heads, x.shape[1], 1), e, values

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        scores = 2 * queries * keys * self.heads * self.head_dim
        return super().flops(queries, keys) - scores + 2 * keys * self.heads * (self.head_dim + queries)
