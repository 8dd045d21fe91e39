"""Heads whose width is chosen by itself, and widening the heads of a trained layer without changing what it does."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, fill
from headwise.swap.parts.positions import Places, Position


class FixedHeadAttention(Attention):
    """Multi-head attention whose `head_dim` p does not shrink as heads become more: a head of fewer dims than tokens
    can't make every pattern (`rank((log P)(I - 11^T/n)) <= p` is what it can). `4 d H p` parameters instead of `4 d^2`.

    The values are as wide as the keys, as in the paper; `value_dim` sets them apart. In a trained layer the heads are
    widened (`widen_heads`): equal output at the start.
    """

    paper: ClassVar[Paper] = Paper("Low-Rank Bottleneck in Multi-head Attention Models", "2002.07028")
    what: ClassVar[str] = "heads of a fixed width, however many they are"

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = 128, **own: Any):
        super().__init__(dim, heads, kv_heads, 128 if head_dim is None else head_dim, **own)

    @classmethod
    def from_site(
        cls,
        site: Site,
        causal: bool,
        head_dim: int = 128,
        value_dim: int | None = None,
        noise: float = 0.02,
        **own: Any,
    ) -> Self:
        made = super().from_site(site, causal, **own)
        widen_heads(made, head_dim, value_dim, noise)
        return made


def widen_heads(attention: Attention, head_dim: int, value_dim: int | None = None, noise: float = 0.02) -> None:
    """Widens the heads of an attention layer in place (`value_dim` None: as wide as the keys), its function unchanged.

    New rows of W_Q and new columns of W_O are drawn with standard deviation `noise`, those of W_K and W_V are zero, so
    that all of them can learn. The scale stays that of the old width. Rotations and norms of queries and keys go on
    acting on the old dims alone.
    """
    old, old_value = attention.head_dim, attention.value_dim
    value_dim = head_dim if value_dim is None else value_dim
    if head_dim < old or value_dim < old_value:
        raise HeadwiseError(
            f"head_dim, value_dim: wanted at least the {old} and {old_value} there are; got {head_dim}, {value_dim}."
        )
    out = attention.o_proj
    if value_dim > old_value and not isinstance(out, nn.Linear):
        raise HeadwiseError("value_dim: the host keeps this layer's output projection: its values can't be widened.")
    with torch.no_grad():
        for linear, width, heads, more, std in (
            (attention.q_proj, old, attention.heads, head_dim - old, noise),
            (attention.k_proj, old, attention.kv_heads, head_dim - old, 0.0),
            (attention.v_proj, old_value, attention.kv_heads, value_dim - old_value, 0.0),
        ):
            weight = wider(linear.weight.unflatten(0, (heads, width)), more, std).flatten(0, 1)
            bias = None if linear.bias is None else wider(linear.bias.view(heads, width, 1), more, 0.0).flatten()
            fill(linear, weight, bias)
            linear.out_features = len(weight)
        if isinstance(out, nn.Linear):
            columns = out.weight.T.unflatten(0, (attention.heads, old_value))
            fill(out, wider(columns, value_dim - old_value, noise).flatten(0, 1).T, out.bias)
            out.in_features = attention.heads * value_dim
    if head_dim > old:
        attention.position = LeadingTurn(attention.position, old)
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name)
            if not isinstance(norm, nn.Identity):
                setattr(attention, name, Leading(norm, old))
    attention.head_dim, attention.value_dim = head_dim, value_dim


def wider(x: Float[Tensor, "heads width dim"], more: int, std: float) -> Float[Tensor, "heads wider dim"]:
    new = torch.zeros_like(x[:, :1]).repeat(1, more, 1)
    return torch.cat([x, new.normal_(std=std) if std else new], 1)


class Leading(nn.Module):
    """A module for the first dims of a head, the others left as they are."""

    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner, self.width = inner, width

    def forward(self, x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        return torch.cat([self.inner(x[..., : self.width]), x[..., self.width :]], -1)


class LeadingTurn(Position):
    """Positions that turn the first dims of a head only."""

    def __init__(self, inner: Position, width: int):
        super().__init__()
        self.inner, self.width = inner, width

    def turn(self, x: Float[Tensor, "batch heads token dim"], places: Places) -> Float[Tensor, "batch heads token dim"]:
        return torch.cat([self.inner.turn(x[..., : self.width], places), x[..., self.width :]], -1)

    def bias(
        self, heads: int, i: Int[Tensor, " query"], j: Int[Tensor, " key"]
    ) -> Float[Tensor, "one heads query key"] | None:
        return self.inner.bias(heads, i, j)
