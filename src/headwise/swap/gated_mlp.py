"""No attention at all: what a layer does that looks at nothing but the token itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Mechanism, Visible
from headwise.swap.parts.positions import Places

PAPER = Paper("Deconstructing Attention: Investigating Design Principles for Effective Language Modeling", "2510.11602")


class GatedMLPMixer(Mechanism):
    """`y_i = W_down (silu(W_gate x_i) * W_up x_i)`: no token sees another.

    As many parameters as the attention it stands for has, up to rounding: `hidden` is `4/3 dim` with heads of the usual
    width. It has nothing to take over from a trained layer, and nothing for readings to see: masks, positions and what
    is in a cache change nothing.
    """

    paper: ClassVar[Paper] = PAPER
    what: ClassVar[str] = "a gated MLP in the place of attention: no mixing of tokens"
    context_too: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = False,
        hidden: int | None = None,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, causal=causal)
        hidden = round(2 * self.head_dim * (self.heads + self.kv_heads) / 3) if hidden is None else hidden
        if hidden < 1:
            raise HeadwiseError(f"GatedMLPMixer: hidden must be at least 1; got {hidden}.")
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        if context is not None:
            raise HeadwiseError("GatedMLPMixer looks at no other token: leave out context.")
        entries = self.entries(cache, context)
        if entries is not None:
            entries.length += x.shape[1]
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    def flops(self, queries: int, keys: int | None = None) -> int:
        return 6 * queries * self.dim * self.gate.out_features
