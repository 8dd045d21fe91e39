"""Queries of many heads over one key head and one value head, and merging the key-value heads of a trained layer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, fill

Merge = Literal["mean", "first", "random"]


class MultiQueryAttention(Attention):
    """Head h of H uses key-value head `floor(h G / H)` of G = `kv_heads`: one for all by default, G = H is multi-head
    attention, what lies between is grouped-query attention. The cache holds `2 G head_dim` numbers a token.

    Parameters `2 d H p + 2 d G p`. In a trained layer, whose key-value heads are more, those that become one are merged
    by `init`: their "mean", the "first" of them, or "random" weights; the output is then equal at the start only where
    nothing is merged. The paper has G = 1; grouped heads and the merging are later work's. Scores are scaled by
    `head_dim^-1/2`, which the paper's own code leaves to the initial weights.
    """

    paper: ClassVar[Paper] = Paper("Fast Transformer Decoding: One Write-Head is All You Need", "1911.02150")
    what: ClassVar[str] = "one key-value head, or a few, for the queries of all heads: a cache that much smaller"

    def __init__(self, dim: int, heads: int, kv_heads: int | None = 1, head_dim: int | None = None, **own: Any):
        super().__init__(dim, heads, 1 if kv_heads is None else kv_heads, head_dim, **own)

    @property
    def cached_per_token(self) -> int:
        """Numbers a cache keeps of one token."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @classmethod
    def from_site(cls, site: Site, causal: bool, kv_heads: int = 1, init: Merge = "mean", **own: Any) -> Self:
        made = super().from_site(site, causal, **own)
        merge_kv_heads(made, kv_heads, init)
        return made


def merge_kv_heads(attention: Attention, kv_heads: int, init: Merge = "mean") -> None:
    """Makes, in place, `kv_heads` key-value heads of those an attention layer has, each of neighbouring ones. With
    rotary positions means are well defined, as dim d of every head turns at the same speed."""
    if kv_heads < 1 or attention.kv_heads % kv_heads:
        raise HeadwiseError(
            f"kv_heads: the layer has {attention.kv_heads} key-value heads; wanted a divisor; got {kv_heads}."
        )
    if init not in ("mean", "first", "random"):
        raise HeadwiseError(f"init: wanted mean, first or random; got {init!r}.")
    if kv_heads == attention.kv_heads:
        return
    with torch.no_grad():
        for linear in (attention.k_proj, attention.v_proj):
            old = linear.weight, linear.bias
            weight, bias = (None if x is None else merged(x, attention.kv_heads, kv_heads, init) for x in old)
            assert weight is not None
            fill(linear, weight, bias)
            linear.out_features = len(weight)
    attention.kv_heads = kv_heads


def merged(x: Float[Tensor, "rows *dim"], old: int, new: int, init: Merge) -> Float[Tensor, "fewer_rows *dim"]:
    """The rows of `old` heads as those of `new` ones."""
    groups = x.unflatten(0, (new, old // new, -1))
    if init == "random":
        drawn = torch.empty_like(groups[:, 0]).flatten(0, 1)
        return nn.init.normal_(drawn, std=float(x.std())) if x.ndim > 1 else drawn.zero_()
    return (groups.mean(1) if init == "mean" else groups[:, 0]).flatten(0, 1)
