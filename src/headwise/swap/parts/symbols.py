"""Symbols: a vector for every token that says which one it is, and little of what it holds."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.swap.parts.positions import Places


class Symbols(nn.Module):
    """Base: `s = symbols(x, places)`. One module given to several layers is shared by them."""

    relative: ClassVar[bool] = False
    """Symbols belong to pairs of a query and a key: `symbols.table`, by `symbols.index`."""
    table: Tensor

    def index(self, i: Int[Tensor, " query"], j: Int[Tensor, " key"]) -> Int[Tensor, "query key"]:
        raise TypeError(f"{type(self).__name__} has no symbols of pairs.")

    def forward(self, x: Float[Tensor, "batch token dim"], places: Places) -> Float[Tensor, "#batch token dim"]:
        raise TypeError(f"{type(self).__name__} must define forward.")

    def flops(self, tokens: int) -> int:
        return 0


class SymbolicAttention(Symbols):
    """`s_i = softmax(q_i F^T / sqrt(dim / heads)) S`, head by head, q = W x + b: templates F and symbols S [symbols,
    dim], both learned, from N(0, 1). A look-up in a fixed library, not attention to tokens: readings don't see it."""

    def __init__(self, dim: int, heads: int = 4, symbols: int = 512):
        super().__init__()
        if heads < 1 or dim % heads or symbols < 1:
            raise HeadwiseError(
                f"SymbolicAttention: dim must be a multiple of heads, symbols at least 1; got {dim}, {heads}, "
                f"{symbols}."
            )
        self.slices = heads  # "heads" says of a module that it is attention to tokens
        self.q_proj = nn.Linear(dim, dim)
        self.templates = nn.Parameter(torch.randn(symbols, dim))
        self.library = nn.Parameter(torch.randn(symbols, dim))

    def forward(self, x: Float[Tensor, "batch token dim"], places: Places) -> Float[Tensor, "batch token dim"]:
        q, keys, values = (
            part.unflatten(-1, (self.slices, -1)).transpose(-3, -2)
            for part in (self.q_proj(x), self.templates, self.library)
        )
        weights = (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ values).transpose(-3, -2).flatten(-2)

    def flops(self, tokens: int) -> int:
        symbols, dim = self.library.shape
        return 2 * tokens * dim * (dim + 2 * symbols)


class PositionSymbols(Symbols):
    """A learned vector for every place, `length` of them."""

    def __init__(self, dim: int, length: int = 512):
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, dim))

    def forward(self, x: Float[Tensor, "batch token dim"], places: Places) -> Float[Tensor, "#batch token dim"]:
        last = places.first + x.shape[1]
        if last > len(self.table):
            raise HeadwiseError(f"PositionSymbols has vectors for {len(self.table)} places; got {last} tokens.")
        return self.table[places.ids]


class RelativeSymbols(Symbols):
    """A learned vector for every distance, those beyond `reach` tokens as for `reach`: `s_ij = table[clip(j - i)]`."""

    relative: ClassVar[bool] = True

    def __init__(self, dim: int, reach: int = 32):
        super().__init__()
        self.reach = reach
        self.table = nn.Parameter(torch.randn(2 * reach + 1, dim))

    def index(self, i: Int[Tensor, " query"], j: Int[Tensor, " key"]) -> Int[Tensor, "query key"]:
        """The row of the table for every pair."""
        return (j - i[:, None]).clamp(-self.reach, self.reach) + self.reach
